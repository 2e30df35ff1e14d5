"""Multi-head latent attention: what its cache saves, and what each of its forms costs in decoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch

from figures.measuring import KEPT, TIME, kept_bytes, layers, random, ratios, step
from headwise.attention import Context
from headwise.attention.mla import MLAAttention
from headwise.cache import LayerCache
from headwise.dims import Dims
from tables import Table, table


def latent() -> Table:
    """Training, decoding and cache, against attention with a cache a head."""
    d_model, n_heads, length, held, batch = 512, 8, 1024, 2048, 2
    kinds: dict[str, dict[str, Any]] = {
        "`softmax` (MHA)": {"kind": "softmax"},
        "`gqa(kv_heads=2)`": {"kind": "gqa", "kv_heads": 2},
        "`mla`": {"kind": "mla"},
        "`mla(kv_lora_rank=96)`": {"kind": "mla", "kv_lora_rank": 96},
    }
    made = layers(kinds, d_model, n_heads, length)
    times = ratios({label: step(forward) for label, (_, forward) in made.items()}, rounds=9)
    token_BTC = random(batch, 1, d_model)

    def decode(label: str, cache: LayerCache, absorbed: bool | None) -> None:
        layer = made[label][0]
        if isinstance(layer, MLAAttention):
            layer.absorbed = absorbed
        with torch.no_grad():
            layer(token_BTC, context=Context(causal=True, cache=cache))
        cache.crop(held)

    tasks: dict[str, Callable[[], object]] = {}
    for label, (layer, _) in made.items():
        cache = cast(LayerCache, layer.new_cache())
        with torch.no_grad():
            layer(random(batch, held, d_model, seed=1), context=Context(causal=True, cache=cache))
        tasks[label] = partial(decode, label, cache, None)
        if isinstance(layer, MLAAttention):
            tasks[f"{label}, expanded"] = partial(decode, label, cache, False)
    decoding = ratios(tasks, rounds=15)
    rows: list[dict[str, Any]] = []
    for label in tasks:
        row: dict[str, Any] = {"name": label, "decode": decoding[label]}
        if label in made:
            layer, forward = made[label]
            row |= {
                "params": sum(p.numel() for p in layer.parameters()),
                "time": times[label],
                "kept": kept_bytes(forward, layer),
                "cache": 2 * layer.spec.kv_numbers_per_token(Dims(d_model, n_heads)),
            }
        rows.append(row)
    return table(
        f"One causal layer, width {d_model}, {n_heads} heads of {d_model // n_heads}, float32. Training: 1 sequence of "
        f"{length} tokens. Decoding: {batch} sequences, one token against {held} cached ones. Cache: bytes a token at "
        "2 bytes a number.",
        ("name", "attention", "text"), ("params", "parameters", "count"), TIME, KEPT,
        ("decode", "decoding a token", "ratio"), ("cache", "cache", "bytes"), rows=rows,
    )  # fmt: skip


TABLES: dict[str, Callable[[], Table]] = {"mla": latent}
