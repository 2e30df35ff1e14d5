"""A dilated window: tokens whose positions leave the same rest by the dilation see one another alone, and for them it
is a plain window over a sequence so much shorter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.kernels.attention import sdpa


def attention(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSD: Tensor,
    *,
    window: int,
    dilation: int,
    bias_factors: tuple[Tensor, Tensor] | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    attn_mask: Tensor | None = None,
    **scores: Any,
) -> Tensor:
    """As `sdpa.attention` with a window, in O(T·window): one call for each rest. A bias must be given as factors.

    Returns:
        [B,H,T,D].
    """
    T, S = q_BHTE.shape[2], k_BKSE.shape[2]
    parts, places = [], []
    for row in range(min(dilation, T)):
        rows, keys = slice(row, None, dilation), slice((S - T + row) % dilation, None, dilation)
        factors, mask = bias_factors, attn_mask
        if factors is not None:
            factors = factors[0][..., rows, :], factors[1][..., keys, :]
        if mask is not None:
            mask = mask[..., rows, :] if mask.shape[-2] > 1 else mask
            mask = mask[..., keys] if mask.shape[-1] > 1 else mask
        parts.append(
            sdpa.attention(
                q_BHTE[:, :, rows], k_BKSE[:, :, keys], v_BKSD[:, :, keys], window=window, bias_factors=factors,
                segments=None if segments is None else (segments[0][:, rows], segments[1][:, keys]), attn_mask=mask,
                **scores,
            )
        )  # fmt: skip
        places.append(torch.arange(row, T, dilation, device=q_BHTE.device))
    return torch.cat(parts, 2).index_select(2, torch.cat(places).argsort())
