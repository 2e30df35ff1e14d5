"""Softmax attention with everything the flash kernels know, as it is written on paper."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSD: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    lead: int = 0,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """y_i = Σ_j softmax_j(s_ij) v_j with s_ij = c·tanh(scale·q_i·k_j / c) + g_j (documents 001, 002; Gemma 2).

    Query head h reads key head ⌊h·K/H⌋. Queries are the last T of the S positions. `window` keeps |i − j| < window and
    the first `lead` keys; `key_bias` g is [B or 1, N, S] with N = 1, K or H; `segments` (queries [B,T], keys [B,S])
    keeps keys of the query's own segment. A query that sees no key gets y = 0.

    Returns:
        y [B,H,T,D] and the logarithm of each row's sum, log Σ_j e^{s_ij}, [B,H,T] (−∞ where no key is seen).
    """
    (_, H, T, _), (_, K, S, _) = q_BHTE.shape, k_BKSE.shape
    k_BHSE, v_BHSD = (x.repeat_interleave(H // K, dim=1) for x in (k_BKSE, v_BKSD))
    scores_BHTS = scale * (q_BHTE @ k_BHSE.transpose(-1, -2))
    if softcap is not None:
        scores_BHTS = softcap * (scores_BHTS / softcap).tanh()
    if key_bias is not None:
        scores_BHTS = scores_BHTS + key_bias.repeat_interleave(H // key_bias.shape[1], dim=1)[:, :, None, :]
    hidden = ~visible(T, S, causal, window, lead, segments, q_BHTE.device)
    scores_BHTS = scores_BHTS.masked_fill(hidden, -torch.inf)
    lse_BHT = scores_BHTS.logsumexp(-1)
    # −∞ − −∞ is not a number; a row that sees nothing is set to zero by its mask.
    shift_BHT1 = lse_BHT.masked_fill(lse_BHT == -torch.inf, 0.0)[..., None]
    weights_BHTS = (scores_BHTS - shift_BHT1).exp().masked_fill(hidden, 0.0)
    return weights_BHTS.to(v_BHSD.dtype) @ v_BHSD, lse_BHT


def visible(
    T: int,
    S: int,
    causal: bool,
    window: int | None,
    lead: int,
    segments: tuple[Tensor, Tensor] | None,
    device: torch.device | None = None,
) -> Tensor:
    """Which keys each query sees: boolean [T,S], or [B,1,T,S] with segments."""
    i = torch.arange(S - T, S, device=device)[:, None]
    j = torch.arange(S, device=device)[None, :]
    keep = (j <= i) if causal else torch.ones(T, S, dtype=torch.bool, device=device)
    if window is not None:
        keep = keep & (((i - j).abs() < window) | (j < lead))
    if segments is not None:
        keep = keep & (segments[0][:, None, :, None] == segments[1][:, None, None, :])
    return keep
