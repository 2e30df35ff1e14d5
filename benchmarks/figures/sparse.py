"""Patterns of keys, and what is done to the scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from figures.measuring import KEPT, TIME, kept_bytes, layers, random, ratios, step
from headwise.attention import Context
from headwise.cache import LayerCache
from tables import Table, table

FULL: dict[str, dict[str, Any]] = {"`softmax`": {"kind": "softmax"}}


def _patterns(kinds: dict[str, dict[str, Any]], length: int) -> Table:
    """Training time, memory and scores of causal layers against full attention."""
    d_model, n_heads = 128, 4
    made = layers({**FULL, **kinds}, d_model, n_heads, length)
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


def strided() -> Table:
    """Strides around the square root of the length."""
    return _patterns({f"`strided({n})`": {"kind": "strided", "stride": n} for n in (16, 64, 256)}, 4096)


def longformer() -> Table:
    """Global tokens beside a window, in an encoder too."""
    d_model, n_heads, length = 128, 4, 4096
    kinds: dict[str, dict[str, Any]] = dict(FULL)
    for n in (0, 16, 64):
        kinds[f"`longformer(256, global_tokens={n})`"] = {"kind": "longformer", "window": 256, "global_tokens": n}
    made = layers(kinds, d_model, n_heads, length)
    x_BTC = random(1, length, d_model)

    def encoder(label: str) -> Tensor:
        return made[label][0](x_BTC, context=Context(causal=False))[0]

    causal = ratios({label: step(forward) for label, (_, forward) in made.items()})
    both = ratios({label: step(partial(encoder, label)) for label in made})
    rows = [
        {"name": label, "time": causal[label], "encoder": both[label], "kept": kept_bytes(forward, layer)}
        for label, (layer, forward) in made.items()
    ]
    return table(
        f"One layer, width {d_model}, {n_heads} heads, {length} tokens, float32; forward and backward.",
        ("name", "attention", "text"), ("time", "causal", "ratio"), ("encoder", "in an encoder", "ratio"), KEPT,
        rows=rows,
    )  # fmt: skip


def bigbird() -> Table:
    """What random blocks cost, and how far they carry."""
    length, size = 4096, 64
    kinds: dict[str, dict[str, Any]] = dict(FULL)
    for n in (0, 3, 6):
        label = f"`bigbird(192, global_tokens=64, random_blocks={n})`"
        kinds[label] = {"kind": "bigbird", "window": 192, "global_tokens": 64, "random_blocks": n, "block_size": size}
    return _patterns({label: fields for label, fields in kinds.items() if label not in FULL}, length)


def scores() -> Table:
    """A soft-cap, a learned sink and gates: training and decoding against plain softmax attention."""
    d_model, n_heads, length, held, batch = 256, 8, 1024, 2048, 8
    kinds: dict[str, dict[str, Any]] = {
        **FULL,
        "`softmax(sink=true)`": {"kind": "softmax", "sink": True},
        "`softmax(softcap=50.0)`": {"kind": "softmax", "softcap": 50.0},
        "`gated`": {"kind": "gated"},
        "`gated(gate=headwise)`": {"kind": "gated", "gate": "headwise"},
    }
    made = layers(kinds, d_model, n_heads, length)
    time_ratio = ratios({label: step(forward) for label, (_, forward) in made.items()})
    token_BTC, caches = random(batch, 1, d_model), {label: LayerCache() for label in made}
    for cache in caches.values():
        cache.append(*(random(batch, n_heads, held, d_model // n_heads, seed=s) for s in (1, 2)))

    def decode(label: str) -> None:
        with torch.no_grad():
            made[label][0](token_BTC, context=Context(causal=True, cache=caches[label]))
            caches[label].crop(held)

    decode_ratio = ratios({label: partial(decode, label) for label in made})
    rows = [
        {"name": label, "time": time_ratio[label], "kept": kept_bytes(forward, layer), "decode": decode_ratio[label],
         "params": sum(p.numel() for p in layer.parameters())}
        for label, (layer, forward) in made.items()
    ]  # fmt: skip
    return table(
        f"One causal layer, width {d_model}, {n_heads} heads, float32. Training: 1 sequence of {length} tokens. "
        f"Decoding: {batch} sequences, one token against {held} cached ones.",
        ("name", "attention", "text"), TIME, KEPT, ("decode", "decoding a token", "ratio"),
        ("params", "parameters", "count"), rows=rows,
    )  # fmt: skip


def window_fields() -> Table:
    """What dilation, sink tokens and a learned sink add to a window."""
    window = {"kind": "window", "window": 256}
    return _patterns(
        {
            "`window(256)`": window,
            "`window(256, dilation=4)`": {**window, "dilation": 4},
            "`window(256, sink_tokens=4)`": {**window, "sink_tokens": 4},
            "`window(256, sink=true)`": {**window, "sink": True},
            "`window(256, softcap=50.0)`": {**window, "softcap": 50.0},
        },
        4096,
    )


TABLES: dict[str, Callable[[], Table]] = {
    "strided": strided,
    "longformer": longformer,
    "bigbird": bigbird,
    "scores": scores,
    "window_fields": window_fields,
}
