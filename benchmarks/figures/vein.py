"""Vein-flow attention and feed-forward: what the vein saves, and what stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import headwise as hw
from figures.measuring import TIME, layers, random, ratios, step
from headwise.dims import Dims
from tables import Table, table

FORWARD = ("forward", "forward", "ratio")
PARAMS = ("params", "parameters", "count")


def without_grad(task: Callable[[], Tensor]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return task()

    return run


def tva() -> Table:
    """A whole attention layer, projections included: as trained, folded, and with a model-wide vein."""
    d_model, n_heads, length = 768, 12, 128
    kinds: dict[str, dict[str, Any]] = {
        "`softmax`": {"kind": "softmax"},
        "`tva(rank=8)`": {"kind": "tva", "rank": 8},
        "`tva(rank=8, folded=true)`": {"kind": "tva", "rank": 8, "folded": True},
        "`tva(rank=4, folded=true)`": {"kind": "tva", "rank": 4, "folded": True},
        "`tva(rank=32, folded=true)`": {"kind": "tva", "rank": 32, "folded": True},
        "`tva(rank=8, vein=model)`": {"kind": "tva", "rank": 8, "vein": "model"},
    }
    made = layers(kinds, d_model, n_heads, length)
    alone = ratios({label: without_grad(forward) for label, (_, forward) in made.items()})
    both = ratios({label: step(forward) for label, (_, forward) in made.items()})
    dims = Dims(d_model, n_heads)
    rows = [
        {"name": label, "forward": alone[label], "time": both[label], "params": layer.spec.param_count(dims),
         "cache": layer.spec.kv_numbers_per_token(dims) // (2 * n_heads)}
        for label, (layer, _) in made.items()
    ]  # fmt: skip
    return table(
        f"One causal layer, width {d_model}, {n_heads} heads, one sequence of {length} tokens, float32. "
        "Cache: numbers a token and head, for each of K and V.",
        ("name", "attention", "text"), FORWARD, TIME, PARAMS, ("cache", "cache", "count"), rows=rows,
    )  # fmt: skip


def vft() -> Table:
    """The feed-forward with each stabilizer, and with a compensation that meets all tokens or few."""
    tokens, d_model = 1024, 768
    x = random(1, tokens, d_model).requires_grad_()
    fields: dict[str, dict[str, Any]] = {
        "`mlp`": {"kind": "mlp"},
        "`vft(rank=16)`": {"kind": "vft"},
        "`vft(rank=16, stabilizer=diagonal)`": {"kind": "vft", "stabilizer": "diagonal"},
        "`vft(rank=16, stabilizer=none)`": {"kind": "vft", "stabilizer": "none"},
        "`vft(rank=16, s_normals=1)`, all over τ": {"kind": "vft", "s_normals": 1, "tau": 0.0},
        "`vft(rank=16, s_normals=1)`, none over τ": {"kind": "vft", "s_normals": 1, "tau": 2.0},
    }
    made = {label: hw.get_ffn(d_model=d_model, **each).eval() for label, each in fields.items()}

    def forward(ffn: Any) -> Tensor:
        y = ffn(x)
        return ffn.finish(x + y, x) if hasattr(ffn, "finish") else x + y

    tasks = {label: partial(forward, ffn) for label, ffn in made.items()}
    alone = ratios({label: without_grad(task) for label, task in tasks.items()})
    both = ratios({label: step(task) for label, task in tasks.items()})
    rows = [
        {"name": label, "params": sum(p.numel() for p in ffn.parameters()), "forward": alone[label],
         "time": both[label]}
        for label, ffn in made.items()
    ]  # fmt: skip
    return table(
        f"{tokens} tokens of width {d_model}, float32. Every row adds the stream, which the compensation corrects.",
        ("name", "feed-forward", "text"), PARAMS, FORWARD, TIME, rows=rows,
    )  # fmt: skip


TABLES: dict[str, Callable[[], Table]] = {"tva": tva, "vft": vft}
