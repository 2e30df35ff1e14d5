"""Flash attention on a processor: what one kernel saves over written-out scores, and what is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from figures.measuring import kept_bytes, random, ratios, rms, step
from headwise.kernels.attention import naive as plain
from headwise.kernels.flash import naive, online
from tables import Table, table

N_HEADS, WIDTH = 4, 64
SCALE = WIDTH**-0.5
LENGTHS = (512, 1024, 2048, 4096)


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain.attention(q, k, v, scale=SCALE)[0]


def added_softmaxes(q: Tensor, k: Tensor, v: Tensor, blocks: int) -> Tensor:
    """Document 001's blocked class: the softmaxes of blocks of keys, applied and added up."""
    columns = q.shape[2] // blocks
    seen = naive.visible(q.shape[2], q.shape[2], True, None, 0, None)
    y = torch.zeros_like(q)
    for left in range(0, q.shape[2], columns):
        block = slice(left, left + columns)
        scores = (SCALE * q @ k[:, :, block].mT).masked_fill(~seen[:, block], -torch.inf)
        y += scores.softmax(-1).nan_to_num(0.0) @ v[:, :, block]
    return y


def flash_speed() -> Table:
    """The fused kernel against written-out scores, by length."""
    rows = []
    for length in LENGTHS:
        q, k, v = (random(1, N_HEADS, length, WIDTH, seed=s).requires_grad_() for s in range(3))
        tasks = {"fused": lambda q=q, k=k, v=v: _fused(q, k, v), "naive": lambda q=q, k=k, v=v: _plain(q, k, v)}
        time_ratio = ratios({name: step(task) for name, task in tasks.items()}, rounds=5)
        row: dict[str, Any] = {"name": f"{length:,} tokens", "time": time_ratio["naive"]}
        rows.append(row | {name: kept_bytes(task) for name, task in tasks.items()})
    return table(
        f"Causal attention alone, {N_HEADS} heads of width {WIDTH}, float32, forward and backward: the time with every "
        "score written out as a multiple of the fused kernel's, and what each keeps for the backward pass.",
        ("name", "length", "text"), ("time", "written out / fused", "ratio"), ("naive", "kept, written out", "bytes"),
        ("fused", "kept, fused", "bytes"), rows=rows,
    )  # fmt: skip


@torch.no_grad()
def flash_error() -> Table:
    """What is exact: every form against float64."""
    forms: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "written out": _plain,
        "tiles of 64, running maximum": lambda q, k, v: online.attention(q, k, v, scale=SCALE)[0],
        "torch's fused kernel": _fused,
        **{
            f"softmaxes of {blocks} block{'s' * (blocks > 1)} added up": lambda q, k, v, n=blocks: added_softmaxes(
                q, k, v, n
            )
            for blocks in (1, 2, 4, 8)
        },
    }
    made = {length: [random(1, N_HEADS, length, WIDTH, seed=s) for s in range(3)] for length in (256, 2048)}
    exact = {length: _plain(*(x.double() for x in tensors)) for length, tensors in made.items()}
    rows = [
        {"name": name, **{f"at{n}": rms(form(*made[n]) - exact[n]) / rms(exact[n]) for n in made}}
        for name, form in forms.items()
    ]
    return table(
        f"Relative error (root mean square) of the output against float64: causal, {N_HEADS} heads of width {WIDTH}, "
        "float32.",
        ("name", "form", "text"), *((f"at{n}", f"{n:,} tokens", "error") for n in made), rows=rows,
    )  # fmt: skip


TABLES: dict[str, Callable[[], Table]] = {"flash_speed": flash_speed, "flash_error": flash_error}
