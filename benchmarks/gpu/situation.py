"""Where a check runs: the device, how large things may be, how long there is, and what has been found so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Situation:
    """`tiny` is the rehearsal in Triton's interpreter: every line of the check at sizes that mean nothing."""

    device: torch.device
    tiny: bool
    deadline: float
    found: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, bool] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def time_left(self, what: str) -> bool:
        """Whether there is still time for this; if not, that is remembered."""
        if time.monotonic() < self.deadline:
            return True
        self.not_run.append(f"{what}: out of time")
        return False

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", flush=True)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def milliseconds(self, task: Callable[[], object]) -> float:
        """The median of several runs, by the device's own clock, its cache emptied before each; once where tiny."""
        if self.device.type == "cuda":
            from triton.testing import do_bench

            return float(do_bench(task, warmup=20, rep=60, return_mode="median"))
        began = time.perf_counter()
        task()
        return 1e3 * (time.perf_counter() - began)


def attempt(task: Callable[[], Any]) -> tuple[Any, str | None]:
    """A task's result, or the first line of what went wrong with it: a peer that fails must not end the check."""
    try:
        return task(), None
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {lines[0][:160]}"


def rms(x: torch.Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()
