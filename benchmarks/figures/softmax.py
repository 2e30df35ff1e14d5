"""Softmax attention and its windows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from figures.measuring import KEPT, TIME, kept_bytes, layers, random, ratios, step
from headwise import kernels
from headwise.attention import Context
from headwise.cache import LayerCache
from headwise.dims import Dims
from tables import Table, table


def heads() -> Table:
    """Numbers of key/value heads: training, decoding, cache; and what the fused form saves."""
    d_model, n_heads, length, held, batch = 256, 8, 1024, 2048, 8
    kinds: dict[str, dict[str, Any]] = {
        "`softmax` (MHA)": {"kind": "softmax"},
        "`gqa(kv_heads=2)`": {"kind": "gqa", "kv_heads": 2},
        "`mqa`": {"kind": "mqa"},
        "`softmax(qk_norm=true)`": {"kind": "softmax", "qk_norm": True},
    }
    made = layers(kinds, d_model, n_heads, length)
    plain = next(iter(made.values()))[1]

    def readable() -> Tensor:
        with kernels.naive():
            return plain()

    tasks = {label: step(forward) for label, (_, forward) in made.items()}
    time_ratio = ratios({**tasks, "`softmax`, readable form": step(readable)})
    token_BTC = random(batch, 1, d_model)
    caches = {}
    for label, (layer, _) in made.items():
        caches[label] = LayerCache()
        caches[label].append(*(random(batch, layer.kv_heads, held, layer.head_dim, seed=s) for s in (1, 2)))

    def decode(label: str) -> None:
        with torch.no_grad():
            made[label][0](token_BTC, context=Context(causal=True, cache=caches[label]))
            caches[label].crop(held)

    decode_ratio = ratios({label: partial(decode, label) for label in made})
    rows = [
        {
            "name": label,
            "time": time_ratio[label],
            "kept": kept_bytes(forward, layer),
            "decode": decode_ratio[label],
            "cache": 2 * layer.spec.kv_numbers_per_token(Dims(d_model, n_heads)),
        }
        for label, (layer, forward) in made.items()
    ]
    last = "`softmax`, readable form"
    layer = next(iter(made.values()))[0]
    rows.append({"name": last, "time": time_ratio[last], "kept": kept_bytes(readable, layer)})
    return table(
        f"One causal layer, width {d_model}, {n_heads} heads, float32. Training: 1 sequence of {length} tokens. "
        f"Decoding: {batch} sequences, one token against {held} cached ones. Cache: bytes a token at 2 bytes a number.",
        ("name", "attention", "text"), TIME, KEPT, ("decode", "decoding a token", "ratio"), ("cache", "cache", "bytes"),
        rows=rows,
    )  # fmt: skip


def window() -> Table:
    """Windows against full attention: cost follows the window."""
    d_model, n_heads, length = 128, 4, 4096
    kinds: dict[str, dict[str, Any]] = {"`softmax`": {"kind": "softmax"}}
    kinds |= {f"`window({w})`": {"kind": "window", "window": w} for w in (2048, 1024, 512, 256, 64)}
    made = layers(kinds, d_model, n_heads, length)
    time_ratio = ratios({label: step(forward) for label, (_, forward) in made.items()})
    rows = [
        {"name": label, "time": time_ratio[label], "kept": kept_bytes(forward, layer),
         "keys": layer.spec.keys_seen(length, causal=True) / (length / 2)}
        for label, (layer, forward) in made.items()
    ]  # fmt: skip
    return table(
        f"One causal layer, width {d_model}, {n_heads} heads, {length} tokens, float32.",
        ("name", "attention", "text"), TIME, KEPT, ("keys", "share of the scores", "number"), rows=rows,
    )  # fmt: skip


TABLES: dict[str, Callable[[], Table]] = {"heads": heads, "window": window}
