"""Mixtures of experts against dense feed-forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import headwise as hw
from figures.measuring import KEPT, TIME, kept_bytes, random, ratios, step
from headwise import kernels
from headwise.dims import Dims
from headwise.registry import FFN
from tables import Table, table


def moe() -> Table:
    """Time and memory at equal active and at equal total parameters."""
    d_model, tokens = 256, 2048
    kinds: dict[str, dict[str, Any]] = {
        "`swiglu(d_ff=688)`": {"kind": "swiglu", "d_ff": 688},
        "`moe(8, 2, d_ff=344)`": {"kind": "moe", "n_experts": 8, "top_k": 2, "d_ff": 344},
        "`moe(32, 8, d_ff=86)`": {"kind": "moe", "n_experts": 32, "top_k": 8, "d_ff": 86},
        "`swiglu(d_ff=2752)`": {"kind": "swiglu", "d_ff": 2752},
        "`moe(8, 2, rank=64)`": {"kind": "moe", "n_experts": 8, "top_k": 2, "rank": 64},
    }
    x_BTC = random(1, tokens, d_model).requires_grad_()
    layers = {label: hw.get_ffn(d_model=d_model, **fields) for label, fields in kinds.items()}
    forward: dict[str, Callable[[], Tensor]] = {
        label: lambda layer=layer: layer(x_BTC) for label, layer in layers.items()
    }
    mixture = "`moe(8, 2, d_ff=344)`"

    def readable() -> Tensor:
        with kernels.naive():
            return layers[mixture](x_BTC)

    forward[f"{mixture}, readable form"], layers[f"{mixture}, readable form"] = readable, layers[mixture]
    time_ratio = ratios({label: step(each) for label, each in forward.items()}, rounds=7)
    rows = []
    for label, each in forward.items():
        spec = FFN.spec(kinds[label.removesuffix(", readable form")])
        flops = spec.flops_per_token(Dims(d_model, 4), tokens, causal=True)
        rows.append(
            {"name": label, "time": time_ratio[label], "kept": kept_bytes(each, layers[label]), "flops": int(flops),
             "params": sum(p.numel() for p in layers[label].parameters())}
        )  # fmt: skip
    return table(
        f"One feed-forward, width {d_model}, {tokens} tokens, float32.",
        ("name", "feed-forward", "text"), ("params", "parameters", "count"), ("flops", "FLOPs a token", "count"),
        TIME, KEPT, rows=rows,
    )  # fmt: skip


TABLES: dict[str, Callable[[], Table]] = {"moe": moe}
