"""Paged attention (document 002; Kwon et al. 2023): keys and values in the blocks of a pool, found by block tables.

`naive` gathers them, `stretches` is the form for a CPU, `triton` for CUDA. The kernel is imported when it is first
asked for.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.kernels import naive_wanted
from headwise.kernels.paged_attention import naive, stretches

_INSTALLED = find_spec("triton") is not None


def available(query: Tensor) -> bool:
    """Whether the Triton kernel serves such queries: on CUDA."""
    return _INSTALLED and query.is_cuda


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each row's newest tokens to all of its tokens, wherever in a pool they lie.

    Args:
        query: float [B,H,E], a token a row, or [B,H,T,E], each row's last T tokens, which see each other causally.
        key_cache: float [N,block_size,K,E], K dividing H.
        value_cache: float [N,block_size,K,D].
        block_tables: int32 [B,max_blocks], each row's blocks in order; what lies behind its last block is not read.
        context_lens: int32 [B], each row's tokens, the queries' own included.
        scale: of the inner products; 1/√E by default.
        window: how many keys a query sees, the nearest; None: all.
        softcap: c in c·tanh(score/c), before the bias.
        sink_H: a score a head in the softmax's denominator, without a value.
        key_bias: float [B or 1,n,max_context_len], n = 1, K or H: added to each key's scores.

    Returns:
        as `query`, D wide.

    Raises:
        HeadwiseError: shapes that do not fit together.
    """
    _check(query, key_cache, value_cache, block_tables, context_lens, key_bias)
    decoding = query.dim() == 3
    q_BHTE = query[:, :, None] if decoding else query
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sink_H": sink_H}
    if naive_wanted():
        y = naive.attention(q_BHTE, key_cache, value_cache, block_tables, context_lens, key_bias=key_bias, **scores)
    elif available(query):
        from headwise.kernels.paged_attention import triton

        y = triton.attention(q_BHTE, key_cache, value_cache, block_tables, context_lens, key_bias=key_bias, **scores)
    else:
        y = _on_cpu(q_BHTE, key_cache, value_cache, block_tables, context_lens, key_bias, scores)
    return y[:, :, 0] if decoding else y


def _on_cpu(
    q_BHTE: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    key_bias: Tensor | None,
    scores: dict[str, Any],
) -> Tensor:
    k_KNE, v_KND = (cache.flatten(0, 1).transpose(0, 1) for cache in (key_cache, value_cache))
    rows = []
    for b, (table, length) in enumerate(zip(block_tables.tolist(), context_lens.tolist())):
        bias_HS = None
        if key_bias is not None:
            bias_HS = key_bias[b if len(key_bias) > 1 else 0]
            bias_HS = bias_HS.repeat_interleave(q_BHTE.shape[1] // len(bias_HS), 0)
        found = stretches.stretches_of(table, length, key_cache.shape[1])
        rows.append(stretches.attention(q_BHTE[b], k_KNE, v_KND, found, key_bias_HS=bias_HS, **scores))
    return torch.stack(rows)


def _check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    key_bias: Tensor | None,
) -> None:
    """The first thing that does not fit, said in one line."""
    if query.dim() not in (3, 4) or key_cache.dim() != 4 or value_cache.dim() != 4:
        given = ", ".join(str(tuple(x.shape)) for x in (query, key_cache, value_cache))
        raise HeadwiseError(f"given {given}; wanted query [B,H,E] or [B,H,T,E] and caches [N,block_size,K,·]")
    B, H, E = *query.shape[:2], query.shape[-1]
    _, block_size, K, _ = key_cache.shape
    if key_cache.shape[-1] != E or H % K or value_cache.shape[:3] != key_cache.shape[:3]:
        given = ", ".join(str(tuple(x.shape)) for x in (query, key_cache, value_cache))
        raise HeadwiseError(
            f"query and caches are {given}; keys want the query's width {E}, K must divide H={H}, and both caches "
            "have the same blocks and heads"
        )
    if block_tables.dim() != 2 or len(block_tables) != B or context_lens.shape != (B,):
        given = f"{tuple(block_tables.shape)} and {tuple(context_lens.shape)}"
        raise HeadwiseError(f"block_tables and context_lens are {given}; wanted [{B},max_blocks] and [{B}]")
    most = block_tables.shape[1] * block_size
    if key_bias is not None and not (
        key_bias.dim() == 3 and len(key_bias) in (1, B) and key_bias.shape[1] in (1, K, H)
    ):
        raise HeadwiseError(f"key_bias is {tuple(key_bias.shape)}; wanted [{B} or 1, 1, {K} or {H}, max_context_len]")
    if query.is_cuda:
        return  # the lengths would have to be waited for
    T = query.shape[2] if query.dim() == 4 else 1
    if not T <= int(context_lens.min()) <= int(context_lens.max()) <= most:
        raise HeadwiseError(f"context_lens are {context_lens.tolist()}; wanted T={T} to max_blocks·block_size={most}")
