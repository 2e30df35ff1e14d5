"""Attention of a few queries to keys that lie in pieces: blocks of a pool, or stretches read back one after another.

Scores are few when queries are. So those of all pieces are formed and stand under one softmax, and only keys and values
come a piece at a time; nothing is put together but numbers that are one a key and query.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FEW = 16  # so many queries at most


def serves(q_BHTE: Tensor, S: int, *, bias_factors: object = None, **scores: Any) -> bool:
    """Whether this form is the better one for such queries."""
    return q_BHTE.shape[2] <= FEW and not torch.is_grad_enabled()


def first_seen(T: int, S: int, window: int | None) -> int:
    """The first of S keys that the last T positions can see."""
    return 0 if window is None else max(0, S - T - window + 1)


def attention(
    q_BHTE: Tensor,
    keys: Iterable[Tensor],
    values: Iterable[Tensor],
    low: int,
    S: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    bias_factors: tuple[Tensor, Tensor] | None = None,
    mask_HTS: Tensor | None = None,
) -> Tensor:
    """Causal attention of the queries at the last T of S positions, as `sdpa.attention` defines it.

    Args:
        keys, values: float [B·K,n,E] and [B·K,n,D] each; all together positions low…S−1. They are run through once.
        bias_factors: a [H,T,n] and b [S,n] for all S positions.
        mask_HTS: added to the scores, broadcast to [B,H,T,S−low].

    Returns:
        [B,H,T,D].
    """
    B, H, T, E = q_BHTE.shape
    # With several pieces the calls themselves are what costs: products of three dimensions have the fewest steps.
    scores: list[Tensor] = []
    for k in keys:
        if not scores:  # the query heads of one key head, one below the other
            grouped = (q_BHTE * scale).reshape(len(k), -1, E)
        scores.append(torch.bmm(grouped, k.transpose(1, 2)))
    s_BHTS = (torch.cat(scores, -1) if len(scores) > 1 else scores[0]).view(B, H, T, -1)
    s_BHTS = s_BHTS.to(torch.promote_types(s_BHTS.dtype, torch.float32))
    if softcap is not None:
        s_BHTS = softcap * torch.tanh(s_BHTS / softcap)
    if bias_factors is not None:
        a_HTn, b_Sn = bias_factors
        s_BHTS = s_BHTS + a_HTn @ b_Sn[..., low:S, :].transpose(-1, -2)
    if mask_HTS is not None:
        s_BHTS = s_BHTS + mask_HTS
    if T > 1 or (window is not None and S - low > window):
        i = torch.arange(S - T, S, device=s_BHTS.device)[:, None]
        j = torch.arange(low, S, device=s_BHTS.device)
        hidden = j > i if window is None else (j > i) | (i - j >= window)
        s_BHTS = s_BHTS.masked_fill(hidden, -torch.inf)
    if sink_H is not None:
        sink_BHT1 = sink_H.to(s_BHTS.dtype)[:, None, None].expand(B, -1, T, 1)
        weights = torch.cat([s_BHTS, sink_BHT1], -1).softmax(-1)
    else:
        weights = s_BHTS.softmax(-1)
    weights = weights.to(q_BHTE.dtype).reshape(*grouped.shape[:2], -1)
    y, at = None, 0
    for v in values:
        part = weights[..., at : at + v.shape[1]]
        y = torch.bmm(part, v) if y is None else torch.baddbmm(y, part, v)
        at += v.shape[1]
    assert y is not None
    return y.view(B, H, T, -1)
