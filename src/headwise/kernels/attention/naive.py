"""Softmax attention as it is written on paper: every score is formed, masked, normalised, applied."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    keep: Tensor | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    bias_HTS: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_i = Σ_j softmax_j(scale · q_i·k_j + bias_ij) v_j (documents 001 and 002; Vaswani et al. 2017).

    Query head h reads key head ⌊h·K/H⌋. Queries are the last T of the S positions. `window` keeps the nearest
    `window` keys, the query's own included; `keep` (boolean, broadcast to [B,H,T,S]) keeps what it says; `segments`
    (query [B,T], key [B,S]) keeps keys of the query's own segment; `attn_mask` is added to the scores (broadcast to
    [B,H,T,S]; True keeps where it is boolean).

    `softcap` c bends the scores s = scale · q_i·k_j, before anything is added to them, to c·tanh(s/c) (Gemma 2, Team et
    al. 2024). `sink_H` s adds exp(s_h) to the softmax's denominator: a key without a value (gpt-oss).

    Returns:
        the output [B,H,T,D] and the weights [B,H,T,S]; with a sink they sum to less than 1.
    """
    n_heads, n_kv = q_BHTD.shape[1], k_BKSD.shape[1]
    k_BHSD = k_BKSD.repeat_interleave(n_heads // n_kv, dim=1)
    v_BHSD = v_BKSD.repeat_interleave(n_heads // n_kv, dim=1)
    scores_BHTS = scale * (q_BHTD @ k_BHSD.transpose(-1, -2))
    if softcap is not None:
        scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
    if bias_HTS is not None:
        scores_BHTS = scores_BHTS + bias_HTS
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores_BHTS = scores_BHTS + attn_mask
    kept = visible(q_BHTD, k_BKSD, causal, window, segments, attn_mask)
    scores_BHTS = scores_BHTS.masked_fill(~(kept if keep is None else kept & keep), -torch.inf)
    if sink_H is not None:
        sink_BHT1 = sink_H.to(scores_BHTS.dtype)[None, :, None, None].expand(*scores_BHTS.shape[:3], 1)
        scores_BHTS = torch.cat([sink_BHT1, scores_BHTS], -1)
    weights_BHTS = scores_BHTS.softmax(-1)[..., int(sink_H is not None) :]
    return weights_BHTS @ v_BHSD, weights_BHTS


def visible(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    causal: bool,
    window: int | None,
    segments: tuple[Tensor, Tensor] | None,
    attn_mask: Tensor | None,
) -> Tensor:
    """Which key each query may see: boolean, broadcastable to [B,H,T,S]."""
    T, S = q_BHTD.shape[2], k_BKSD.shape[2]
    i = torch.arange(S - T, S, device=q_BHTD.device)[:, None]
    j = torch.arange(S, device=q_BHTD.device)[None, :]
    keep = torch.ones(T, S, dtype=torch.bool, device=q_BHTD.device)
    if causal:
        keep = keep & (j <= i)
    if window is not None:
        keep = keep & ((i - j).abs() < window)
    if segments is not None:
        keep = keep & (segments[0][:, None, :, None] == segments[1][:, None, None, :])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        keep = keep & attn_mask
    return keep
