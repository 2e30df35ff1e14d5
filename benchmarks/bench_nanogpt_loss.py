"""Validation loss at nanoGPT's CPU setting: the mean of three seeds, over the whole validation split.

Target: at most 1.90 nats a character (nanoGPT's own code gives 1.898 by this evaluation).
"""

from __future__ import annotations

import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import headwise as hw
from common import report
from nanogpt import LINE, SETTINGS


def loss(seed: int) -> float:
    return hw.train(LINE, seed=seed, threads=1, progress=False, **SETTINGS).val_loss


if __name__ == "__main__":
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        losses = list(pool.map(loss, range(3)))
    mean = statistics.mean(losses)
    figures = {"line": LINE, "val_loss": losses, "mean": mean, "target": 1.90}
    report("nanogpt-loss", figures, reached={"mean at most 1.90": mean <= 1.90})
