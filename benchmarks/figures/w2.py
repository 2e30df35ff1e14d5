"""Wasserstein-2 attention: what distances cost against inner products, and what the two widths hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from figures.measuring import KEPT, TIME, kept_bytes, layers, random, ratios, step
from headwise.dims import Dims
from headwise.kernels.attention import naive, sdpa
from headwise.kernels.w2 import fast
from headwise.kernels.w2 import naive as distances
from tables import Table, table

WIDTH = 64


def lengths() -> Table:
    """Time and memory against length: stock causal attention, the key-bias form, and the distances written out."""
    n_heads, tau = 4, torch.full((1, 1, 1), 14.0)
    names = ("stock causal attention", "`w2`", "`w2`, distances written out")
    rows: list[dict[str, Any]] = [{"name": name} for name in names]
    for length in (512, 1024, 2048, 4096):
        q, k, v = (random(1, n_heads, length, WIDTH, seed=s).requires_grad_() for s in range(3))

        def stock(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def quick(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return sdpa.attention(*fast.products(q, k, None, tau), v, scale=1.0)

        def written_out(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return naive.attention(q, k, v, scale=0.0, bias_HTS=distances.scores(q, k, None, tau))[0]

        forms: dict[str, Callable[[], Tensor]] = dict(zip(names, (stock, quick, written_out)))
        if length > 2048:
            del forms[names[2]]  # its tensors of length by length fill a small machine
        times = ratios({name: step(form) for name, form in forms.items()}, rounds=7)
        for row in rows:
            if row["name"] in forms:
                row[f"time{length}"] = times[row["name"]]
                if length in (1024, 2048):
                    row[f"kept{length}"] = kept_bytes(forms[row["name"]])
    return table(
        f"Causal attention of given queries, keys and values alone, {n_heads} heads of width {WIDTH} (for `w2`, "
        "points [Rμ, σ] of that width), float32. Times are forward and backward.",
        ("name", "form", "text"), *((f"time{n}", f"{n} tokens", "ratio") for n in (512, 1024, 2048, 4096)),
        *((f"kept{n}", f"kept for backward, {n} tokens", "bytes") for n in (1024, 2048)), rows=rows,
    )  # fmt: skip


def widths() -> Table:
    """Whole layers at the two widths: parameters, time, cache."""
    d_model, n_heads, length = 512, 8, 1024
    kinds: dict[str, dict[str, Any]] = {
        "`softmax`": {"kind": "softmax"},
        "`w2`": {"kind": "w2"},
        "`w2(score=precision)`": {"kind": "w2", "score": "precision"},
        "`w2(sigma_dim=head_dim)`, document 003's": {"kind": "w2", "sigma_dim": "head_dim"},
    }
    made = layers(kinds, d_model, n_heads, length)
    times = ratios({label: step(forward) for label, (_, forward) in made.items()}, rounds=9)
    rows = [
        {"name": label, "params": sum(p.numel() for p in layer.parameters()), "time": times[label],
         "kept": kept_bytes(forward, layer),
         "cache": 2 * layer.spec.kv_numbers_per_token(Dims(d_model, n_heads))}
        for label, (layer, forward) in made.items()
    ]  # fmt: skip
    return table(
        f"One causal layer, width {d_model}, {n_heads} heads, {length} tokens, float32. Cache: bytes a token at "
        "2 bytes a number.",
        ("name", "attention", "text"), ("params", "parameters", "count"), TIME, KEPT, ("cache", "cache", "bytes"),
        rows=rows,
    )  # fmt: skip


TABLES: dict[str, Callable[[], Table]] = {"w2_lengths": lengths, "w2_widths": widths}
