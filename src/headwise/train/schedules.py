"""Learning rates as pure functions of the update's number, so that a resumed run needs no scheduler state.

All begin with a linear warm-up that reaches `lr` at update `warmup` (the first already moves: lr / (warmup + 1));
all but `constant` would reach `min_lr` at update `steps`, one after the last. Cosine is Loshchilov & Hutter 2017
(arXiv:1608.03983) without restarts, as nanoGPT has it; wsd (warm-up, stable, decay) is MiniCPM's (arXiv:2404.06395)
with a linear decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from headwise.train.settings import TrainSettings

Schedule = Callable[[int], float]


def _cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _linear(done: float) -> float:
    return 1.0 - done


def make_schedule(settings: TrainSettings) -> Schedule:
    """The learning rate of update `step` (0-based), for `settings.schedule`, `lr`, `min_lr`, `warmup` and `steps`."""
    lr, min_lr, warmup, steps = settings.lr, settings.final_lr, settings.warmup_steps, settings.steps
    if settings.schedule == "wsd":
        shape, start = _linear, max(warmup, steps - round(settings.decay_fraction * steps))
    elif settings.schedule == "constant":
        shape, start = _linear, steps
    else:
        shape, start = {"cosine": _cosine, "linear": _linear}[settings.schedule], warmup

    def rate(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / (warmup + 1)
        if step <= start or start == steps:
            return lr
        return min_lr + (lr - min_lr) * shape(min(1.0, (step - start) / (steps - start)))

    return rate
