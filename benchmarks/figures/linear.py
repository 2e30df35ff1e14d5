"""Linear attention and its kin: what a state in place of keys and values costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from figures.measuring import KEPT, TIME, kept_bytes, layers, random, ratios, step
from headwise.attention import Attention, Context
from headwise.cache import LayerCache
from headwise.dims import Dims
from tables import Table, table

D_MODEL, N_HEADS = 256, 4
LENGTHS = (1024, 2048, 4096)


def recurrences() -> Table:
    """Every recurrent kind against softmax: training at three lengths, decoding, what the cache holds."""
    held, batch = 4096, 4
    kinds = ("softmax", "linear", "retention", "gla", "deltanet", "gated_deltanet")
    rows: dict[str, dict[str, Any]] = {kind: {"name": f"`{kind}`"} for kind in kinds}
    made: dict[str, tuple[Attention, Callable[[], Tensor]]] = {}
    for length in LENGTHS:
        made = layers({kind: {"kind": kind} for kind in kinds}, D_MODEL, N_HEADS, length)
        for kind, found in ratios({kind: step(forward) for kind, (_, forward) in made.items()}, rounds=7).items():
            rows[kind][f"time{length}"] = found
    token_BTC = random(batch, 1, D_MODEL)
    caches = {kind: layer.new_cache() for kind, (layer, _) in made.items()}
    dims = Dims(D_MODEL, N_HEADS)
    for kind, (layer, forward) in made.items():
        with torch.no_grad():
            layer(random(batch, held, D_MODEL), context=Context(causal=True, cache=caches[kind]))
        rows[kind]["kept"] = kept_bytes(forward, layer)
        numbers = layer.spec.kv_numbers_per_token(dims) * held
        rows[kind]["cache"] = 2 * numbers + 4 * layer.spec.state_numbers(dims)

    def decode(kind: str) -> None:
        cache = caches[kind]
        with torch.no_grad():
            made[kind][0](token_BTC, context=Context(causal=True, cache=cache))
        if isinstance(cache, LayerCache):
            cache.crop(held)

    for kind, found in ratios({kind: partial(decode, kind) for kind in kinds}).items():
        rows[kind]["decode"] = found
    return table(
        f"One causal layer, width {D_MODEL}, {N_HEADS} heads, float32. Training: forward + backward of one sequence. "
        f"Decoding: {batch} sequences, one token after {held}. Cache: a sequence's, after {held} tokens, at 2 bytes a "
        "number, states at 4.",
        ("name", "attention", "text"),
        *((f"time{length}", f"training, {length}", "ratio") for length in LENGTHS),
        ("kept", f"kept for backward, {LENGTHS[-1]}", "bytes"), ("decode", "decoding a token", "ratio"),
        ("cache", "cache", "bytes"), rows=list(rows.values()),
    )  # fmt: skip


def features() -> Table:
    """Linear attention's feature maps."""
    length = 2048
    kinds: dict[str, dict[str, Any]] = {"`softmax`": {"kind": "softmax"}}
    kinds |= {f"`linear({f})`": {"kind": "linear", "feature_map": f} for f in ("elu", "relu", "softmax", "taylor")}
    made = layers(kinds, D_MODEL, N_HEADS, length)
    time_ratio = ratios({label: step(forward) for label, (_, forward) in made.items()}, rounds=7)
    dims = Dims(D_MODEL, N_HEADS)
    rows = [
        {"name": label, "time": time_ratio[label], "kept": kept_bytes(forward, layer),
         "params": sum(p.numel() for p in layer.parameters()), "state": layer.spec.state_numbers(dims) or None}
        for label, (layer, forward) in made.items()
    ]  # fmt: skip
    return table(
        f"One causal layer, width {D_MODEL}, {N_HEADS} heads, {length} tokens, float32.",
        ("name", "attention", "text"), TIME, KEPT, ("params", "parameters", "count"),
        ("state", "numbers in the state", "count"), rows=rows,
    )  # fmt: skip


TABLES: dict[str, Callable[[], Table]] = {"recurrences": recurrences, "features": features}
