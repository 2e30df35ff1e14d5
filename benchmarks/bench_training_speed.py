"""Training speed: one run and two workers against a plain eager loop, and a compiled step against matrix products.

The setting is nanoGPT's for a CPU (`nanogpt.py`), the same model on both sides. Our side is `headwise.train` as it is,
data, guards, schedule and metrics included; the peer is the plain loop. Rounds are interleaved; figures are ratios.

Targets: one run at least 1.1× the plain loop, two workers together at least 1.8×, and the compiled training step of a
10 M model at least 60 % of the rate at which this machine multiplies matrices.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

import headwise as hw
from common import interleaved, report
from headwise.data import load_dataset
from headwise.train import TrainSettings
from headwise.train.job import prepare, torch_state
from headwise.train.trainer import Trainer
from nanogpt import LINE, SETTINGS, PlainLoop

STEPS = 30
TOKENS = STEPS * 12 * 64


def trainer(line: str, **settings: object) -> Trainer:
    return Trainer(prepare(hw.parse(line), TrainSettings(**settings), load_dataset()))  # type: ignore[arg-type]


def run(one: Trainer, steps: int = STEPS) -> None:
    for _ in range(steps):
        one.update()


def plain_loop() -> PlainLoop:
    return PlainLoop(load_dataset().train.array)


def worker(kind: str, threads: int, rounds: int) -> None:
    """A process that trains a round whenever it is told to on stdin, and answers with the seconds it took."""
    torch.set_num_threads(threads)
    if kind == "plain":
        task: Callable[[int], None] = plain_loop().run
    else:
        ours = trainer(LINE, **SETTINGS, compile=kind == "compiled")

        def task(steps: int) -> None:
            with torch_state(ours.job.settings, ours.job.device):
                run(ours, steps)

    task(STEPS)
    print("ready", flush=True)
    for _ in range(rounds):
        sys.stdin.readline()
        start = time.perf_counter()
        task(STEPS)
        print(time.perf_counter() - start, flush=True)


class Worker:
    """The other end of such a process."""

    def __init__(self, kind: str, threads: int, rounds: int) -> None:
        command = [sys.executable, __file__, "--worker", kind, str(threads), str(rounds)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.read()

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def start(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)


def round_of(*workers: Worker) -> None:
    """One round of several workers at once."""
    for w in workers:
        w.start()
    for w in workers:
        w.read()


def against_the_plain_loop(rounds: int) -> dict[str, float]:
    """Tokens a second, as ratios to the plain loop in as many threads, or in one."""
    cores = torch.get_num_threads()
    n = rounds + 1
    alone = {f"{kind}, {t} threads": Worker(kind, t, n) for kind in ("plain", "ours", "compiled") for t in (1, cores)}
    tasks = {name: partial(round_of, w) for name, w in alone.items()}
    for kind in ("ours", "compiled"):
        tasks[f"two workers, {kind}"] = partial(round_of, Worker(kind, 1, n), Worker(kind, 1, n))
    seconds = interleaved(tasks, rounds)
    runs = {name: 2 if name.startswith("two") else 1 for name in seconds}
    rate = {name: [runs[name] * TOKENS / s for s in values] for name, values in seconds.items()}

    def ratio(a: str, b: str) -> float:
        return round(statistics.median(x / y for x, y in zip(rate[a], rate[b])), 3)

    figures: dict[str, float] = {f"tokens/s, {name}": round(statistics.median(v)) for name, v in rate.items()}
    for kind in ("ours", "compiled"):
        for t in (1, cores):
            figures[f"one run ({kind}) / plain loop, both in {t} threads"] = ratio(
                f"{kind}, {t} threads", f"plain, {t} threads"
            )
            figures[f"two workers ({kind}) / plain loop in {t} threads"] = ratio(
                f"two workers, {kind}", f"plain, {t} threads"
            )
    return figures


def compiled_step(rounds: int) -> dict[str, float]:
    """The compiled training step of a 10 M model against the rate of one large matrix product, both in all threads."""
    line = "gpt2(d_model=512, n_layers=3, n_heads=8, bias=false, ffn=mlp(gelu))"
    ours = trainer(line, seq_len=256, batch_size=8, compile=True, steps=10_000)
    flops = hw.count(ours.job.spec, context=256).train_flops_per_token * 8 * 256
    a = torch.randn(2048, 2048)
    seconds = interleaved({"step": ours.update, "product": lambda: a @ a}, rounds)
    rate = {"step": [flops / s for s in seconds["step"]], "product": [2 * 2048**3 / s for s in seconds["product"]]}
    best = max(rate["product"])
    return {
        "line": line,  # type: ignore[dict-item]
        "params": hw.count(ours.job.spec).params,
        "matrix product, GFLOP/s (median)": round(statistics.median(rate["product"]) / 1e9, 1),
        "step, GFLOP/s (median)": round(statistics.median(rate["step"]) / 1e9, 1),
        "step / product": round(statistics.median(s / p for s, p in zip(rate["step"], rate["product"])), 3),
        "step (median) / product (best)": round(statistics.median(rate["step"]) / best, 3),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        raise SystemExit
    loop, step = against_the_plain_loop(6), compiled_step(15)
    cores = torch.get_num_threads()
    report(
        "training-speed",
        {"nanogpt setting": loop, "compiled 10 M step": step},
        reached={
            f"one run, compiled, at least 1.1x, both in {t} threads": loop[
                f"one run (compiled) / plain loop, both in {t} threads"
            ]
            >= 1.1
            for t in (1, cores)
        }
        | {
            f"two workers at least 1.8x the plain loop in {t} threads": loop[
                f"two workers (ours) / plain loop in {t} threads"
            ]
            >= 1.8
            for t in (1, cores)
        }
        | {
            "compiled step at least 60 % of the product": step["step / product"] >= 0.6,
        },
    )
