"""How the tables are measured: ratios of interleaved times, and the bytes kept for the backward pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import headwise as hw
from headwise.attention import Attention, Context
from headwise.lab.stats import ratio_summary
from headwise.lab.timing import interleaved
from headwise.lab.timing import kept_bytes as kept_bytes

ROUNDS = 11
SLICE_SECONDS = 0.03  # a task is repeated until one round's share takes about this long
TIME = ("time", "forward + backward", "ratio")
KEPT = ("kept", "kept for backward", "bytes")


def ratios(tasks: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float | None]]:
    """Time of each task as a ratio to the first one's: [median, lowest, highest of its interval]."""
    first = next(iter(tasks))
    tasks[first]()
    began = time.perf_counter()
    tasks[first]()
    times = max(1, round(SLICE_SECONDS / (time.perf_counter() - began)))

    def repeated(task: Callable[[], object]) -> Callable[[], object]:
        return lambda: [task() for _ in range(times)]

    seconds = interleaved({name: repeated(task) for name, task in tasks.items()}, rounds)
    found: dict[str, list[float | None]] = {}
    for name in tasks:
        summary = ratio_summary(seconds[name], seconds[first])
        assert summary is not None
        found[name] = [1.0, None, None] if name == first else [summary.ratio, summary.lo, summary.hi]
    return found


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms(x: Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()


def step(forward: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward and backward; gradients add up, which costs every task the same."""
    return lambda: forward().sum().backward()


def layers(
    kinds: dict[str, dict[str, Any]], d_model: int, n_heads: int, length: int
) -> dict[str, tuple[Attention, Callable[[], Tensor]]]:
    """Causal attention layers by label, each with its forward pass on one sequence."""
    x_BTC = random(1, length, d_model).requires_grad_()

    def forward(layer: Attention) -> Tensor:
        return layer(x_BTC, context=Context(causal=True))[0]

    made = {label: hw.get_attention(d_model=d_model, n_heads=n_heads, **fields) for label, fields in kinds.items()}
    return {label: (layer, partial(forward, layer)) for label, layer in made.items()}
