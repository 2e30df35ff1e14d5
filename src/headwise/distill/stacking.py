"""Caches as one tensor of keys and one of values, `[B,L,H,T,D]`, as document 004 has them.

transformers 5 hands out cache objects where it once handed out tuples; both are read, and Headwise's own caches too.
Gradients flow through the result into the model that filled the cache. A cache holds keys with their positions worked
in: `Encoding.unrotate` takes them out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.cache import LayerCache, ModelCache
from headwise.errors import HeadwiseError

_ADVICE = "fill a plain growing cache, or take `capture`, which needs none"


def stack_past_kv(past_key_values: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of all layers, each float [B,L,H,T,D], H the key/value heads.

    Args:
        past_key_values: a transformers cache object, a Headwise model's contiguous cache, or (key, value) pairs
            [B,H,T,D] of the layers.

    Raises:
        HeadwiseError: there is no cache, its kind keeps no keys and values of every token (recurrent, latent,
            quantised, rolled over), or its layers differ in shape.
    """
    pairs = _pairs(past_key_values)
    for which, name in ((0, "keys"), (1, "values")):
        shapes = [list(pair[which].shape) for pair in pairs]
        unlike = next((n for n, shape in enumerate(shapes) if shape != shapes[0]), None)
        if unlike is not None:
            raise HeadwiseError(
                f"layers of one shape are wanted, but the {name} of layer 0 are {shapes[0]} and those of layer "
                f"{unlike} {shapes[unlike]}; stack the layers of each shape apart"
            )
    return torch.stack([k for k, _ in pairs], 1), torch.stack([v for _, v in pairs], 1)


def _pairs(past: Any) -> list[tuple[Tensor, Tensor]]:
    if past is None:
        raise HeadwiseError("no cache was given (None); run the model with use_cache=True")
    if isinstance(past, ModelCache):
        return [_own(layer, cache) for layer, cache in enumerate(past.layers)]
    if hasattr(past, "self_attention_cache"):  # transformers' encoder–decoder
        past = past.self_attention_cache
    layers = getattr(past, "layers", None)
    if isinstance(layers, list) and layers:
        return [_theirs(layer, cache) for layer, cache in enumerate(layers)]
    pairs = list(past) if isinstance(past, tuple | list) else []
    if not pairs or not all(_is_pair(pair) for pair in pairs):
        raise HeadwiseError(
            f"a {type(past).__name__} is no cache that can be read; give a transformers cache, a Headwise cache, or "
            "(key, value) pairs of [B,H,T,D]"
        )
    return [(pair[0], pair[1]) for pair in pairs]


def _is_pair(pair: Any) -> bool:
    """Newer tuples carry more than the two; the first two are keys and values."""
    return isinstance(pair, tuple | list) and len(pair) >= 2 and all(_is_4d(t) for t in pair[:2])


def _is_4d(t: Any) -> bool:
    return isinstance(t, Tensor) and t.dim() == 4


def _own(layer: int, cache: Any) -> tuple[Tensor, Tensor]:
    held = cache.held() if isinstance(cache, LayerCache) else ()
    if len(held) != 2:
        raise HeadwiseError(
            f"layer {layer}: a {cache.kind} cache of {cache.length} tokens holds no keys and values of every token; "
            + _ADVICE
        )
    return held[0], held[1]


def _theirs(layer: int, cache: Any) -> tuple[Tensor, Tensor]:
    k: Any = getattr(cache, "keys", None)
    v: Any = getattr(cache, "values", None)
    seen = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    if not _is_4d(k) or not _is_4d(v) or k.shape[2] < seen or not seen:
        raise HeadwiseError(
            f"layer {layer}: a {type(cache).__name__} of {seen} tokens holds no keys and values of every token; "
            + _ADVICE
        )
    return k[:, :, :seen], v[:, :, :seen]  # a static cache has room to spare


def flatten_kv_heads(x: Tensor) -> Tensor:
    """The heads side by side: [B,L,H,T,D] → [B,L,T,H·D]."""
    return x.transpose(2, 3).flatten(-2)


def unflatten_kv_heads(x: Tensor, n_heads: int) -> Tensor:
    """The inverse: [B,L,T,H·D] → [B,L,H,T,D].

    Raises:
        HeadwiseError: the width does not divide by the heads.
    """
    if x.shape[-1] % n_heads:
        raise HeadwiseError(f"{x.shape[-1]} numbers a token do not divide into {n_heads} heads; give their number")
    return x.unflatten(-1, (n_heads, -1)).transpose(2, 3)
