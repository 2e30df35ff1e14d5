"""Some queries against some keys, in one call: what the ways through a long sequence have in common.

**A learned sink** (gpt-oss) is one more key in the softmax's denominator, with a score s_h of its own and no value. It
costs the fused kernel one key and one dimension: q' = [s_h, scale·q], the keys k' = [0, k], the sink's key [1, 0], its
value 0. For a few queries, as in decoding, copying all keys for that would cost more than the scores: then those are
formed.
**A soft-cap** (Gemma 2) bends every score, which the fused kernel cannot do on a CPU: the scores are formed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 16  # so many queries at most have their scores formed rather than the keys copied for a sink


def attend(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSD: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention under a mask (boolean or added, broadcast to [B,H,T,S]) or, where T = S, the causal triangle.

    A soft-cap takes a mask in place of the triangle.

    Returns:
        [B,H,T,D].
    """
    if softcap is not None or (sink_H is not None and not causal and q_BHTE.shape[2] <= FEW):
        assert not causal
        return _formed(q_BHTE, k_BKSE, v_BKSD, mask, scale, softcap, sink_H, dropout)
    if sink_H is not None:
        q_BHTE, k_BKSE, v_BKSD, mask = _with_sink(q_BHTE, k_BKSE, v_BKSD, mask, scale, causal, sink_H)
        scale = 1.0
    D = v_BKSD.shape[-1]
    wider = q_BHTE.shape[-1] - D  # the CPU kernel is fused only for equal widths
    if wider > 0:
        v_BKSD = F.pad(v_BKSD, (0, wider))
    elif wider < 0:
        q_BHTE, k_BKSE = F.pad(q_BHTE, (0, -wider)), F.pad(k_BKSE, (0, -wider))
    y_BHTD = F.scaled_dot_product_attention(
        q_BHTE, k_BKSE, v_BKSD, attn_mask=mask, is_causal=causal, scale=scale, dropout_p=dropout,
        enable_gqa=q_BHTE.shape[1] != k_BKSE.shape[1],
    )  # fmt: skip
    y_BHTD = y_BHTD[..., :D] if wider > 0 else y_BHTD
    return y_BHTD[:, :, 1:] if causal and sink_H is not None else y_BHTD


def _with_sink(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, sink_H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The sink as key 0, and under the causal triangle a query 0 that sees nothing else, so that the rest still fit."""
    scores_BHT1 = sink_H.to(q.dtype)[None, :, None, None].expand(*q.shape[:3], 1)
    q = F.pad(torch.cat([scores_BHT1, q * scale], -1), (0, 0, int(causal), 0))
    key_BK1E = F.pad(k.new_ones(1, 1, 1, 1), (0, k.shape[-1])).expand(*k.shape[:2], 1, -1)
    k = torch.cat([key_BK1E, F.pad(k, (1, 0))], 2)
    v = F.pad(v, (0, 0, 1, 0))
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
    return q, k, v, mask


def _formed(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSD: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sink_H: Tensor | None,
    dropout: float,
) -> Tensor:
    """With every score of the block in memory; the softmax is taken in float32 at least, as the fused kernel does."""
    n_kv, T = k_BKSE.shape[1], q_BHTE.shape[2]
    grouped_BKNE = q_BHTE.unflatten(1, (n_kv, -1)).flatten(2, 3)  # the query heads of one key head, one below the other
    scores_BHTS = scale * (grouped_BKNE @ k_BKSE.transpose(-1, -2)).unflatten(2, (-1, T)).flatten(1, 2)
    scores_BHTS = scores_BHTS.to(torch.promote_types(scores_BHTS.dtype, torch.float32))
    if softcap is not None:
        scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
    if mask is not None:
        bool_mask = mask.dtype == torch.bool
        scores_BHTS = scores_BHTS.masked_fill(~mask, -torch.inf) if bool_mask else scores_BHTS + mask
    if sink_H is not None:
        sink_BHT1 = sink_H.to(scores_BHTS.dtype)[None, :, None, None].expand(*scores_BHTS.shape[:3], 1)
        scores_BHTS = torch.cat([sink_BHT1, scores_BHTS], -1)
    weights_BHTS = scores_BHTS.softmax(-1)[..., int(sink_H is not None) :].to(v_BKSD.dtype)
    weights_BHTS = F.dropout(weights_BHTS, dropout) if dropout else weights_BHTS
    return (weights_BHTS.unflatten(1, (n_kv, -1)).flatten(2, 3) @ v_BKSD).unflatten(2, (-1, T)).flatten(1, 2)
