"""The same attention on torch's fused kernel, in memory linear in the length.

**Low-rank bias.** A bias that is a short inner product, bias_ij = Σ_n a_in·b_jn, costs n more dimensions of q and k and
nothing else: q' = [a, q], k' = [b, k]. ALiBi is n = 2, a key's own bias g(j) is n = 1 (the key-bias identity).
The factors go *before* q and k: the kernel adds the products up in order, so two large terms that nearly cancel
(−m·i and m·j) have cancelled before the small ones arrive, and the score loses no bits. Put last, they cost a
factor of 20 in accuracy at 1,000 tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Query rows a masked call handles at once: bounds its mask to ROWS × S. A window shorter than this still pays for
# ROWS keys.
ROWS = 256


def attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    bias_factors: tuple[Tensor, Tensor] | None = None,
    bias_rows: Callable[[Tensor, int, int], Tensor | None] | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """As `naive.attention`, with the bias as factors ([H,T,n], [S,n]) or as a function of a range of rows ([H,rows,S]).

    One call of the fused kernel where nothing but causality masks. Otherwise blocks of query rows, each with the keys
    it can reach, so a window costs O(T·window); a block's mask is made anew for the backward pass, so no T×S tensor
    is ever held.

    Returns:
        [B,H,T,D], D the width of `v_BKSD`.
    """
    D = v_BKSD.shape[-1]
    if bias_factors is not None:
        q_BHTD, k_BKSD = with_bias(q_BHTD, k_BKSD, bias_factors, scale)
        scale = 1.0
    wider = q_BHTD.shape[-1] - D  # the CPU kernel is fused only for equal widths
    if wider > 0:
        v_BKSD = F.pad(v_BKSD, (0, wider))
    elif wider < 0:
        q_BHTD, k_BKSD = F.pad(q_BHTD, (0, -wider)), F.pad(k_BKSD, (0, -wider))
    T, S = q_BHTD.shape[2], k_BKSD.shape[2]
    if window is not None and window >= S:
        window = None
    enable_gqa = q_BHTD.shape[1] != k_BKSD.shape[1]
    biased = bias_rows is not None and bias_rows(q_BHTD, 0, 0) is not None
    plain = attn_mask is None and segments is None and window is None and not biased
    if plain and (not causal or T == 1 or T == S):
        y = F.scaled_dot_product_attention(
            q_BHTD, k_BKSD, v_BKSD, is_causal=causal and T > 1, scale=scale, dropout_p=dropout, enable_gqa=enable_gqa
        )
        return y[..., :D]

    def block(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, start: int) -> Tensor:
        stop = min(start + ROWS, T)
        first, last = S - T + start, S - T + stop - 1
        low = 0 if window is None else max(0, first - window + 1)
        high = min(S, last + 1) if causal else (S if window is None else min(S, last + window))
        mask = _mask(first, last, low, high, causal, window, q_BHTD.device)
        if segments is not None:
            q_seg, k_seg = segments[0][:, start:stop], segments[1][:, low:high]
            mask = mask & (q_seg[:, None, :, None] == k_seg[:, None, None, :])
        added = bias_rows(q_BHTD, start, stop) if bias_rows is not None else None
        if attn_mask is not None:
            given = attn_mask[..., start:stop, :] if attn_mask.shape[-2] > 1 else attn_mask
            if given.dtype == torch.bool:
                mask = mask & _columns(given, low, high)
            else:
                added = given if added is None else given + added
        if added is not None:
            mask = _columns(added, low, high).to(q_BHTD.dtype).masked_fill(~mask, -torch.inf)
        return F.scaled_dot_product_attention(
            q_BHTD[:, :, start:stop], k_BKSD[:, :, low:high], v_BKSD[:, :, low:high],
            attn_mask=mask, scale=scale, dropout_p=dropout, enable_gqa=enable_gqa,
        )  # fmt: skip

    starts = range(0, T, ROWS)
    if torch.is_grad_enabled() and len(starts) > 1 and window is None:
        blocks = [checkpoint(block, q_BHTD, k_BKSD, v_BKSD, start, use_reentrant=False) for start in starts]
    else:
        blocks = [block(q_BHTD, k_BKSD, v_BKSD, start) for start in starts]
    return torch.cat(blocks, dim=2)[..., :D]


def with_bias(
    q_BHTD: Tensor, k_BKSD: Tensor, bias_factors: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """q' and k' whose plain inner product is scale·q·k + bias; the factors stand first (see the module's note)."""
    a_HTn, b_Sn = (f.to(q_BHTD.dtype) for f in bias_factors)
    a = a_HTn.expand(q_BHTD.shape[0], *a_HTn.shape[-3:])
    b = b_Sn[..., None, :, :].expand(k_BKSD.shape[0], k_BKSD.shape[1], *b_Sn.shape[-2:])
    return torch.cat([a, q_BHTD * scale], -1), torch.cat([b, k_BKSD], -1)


def _columns(mask: Tensor, low: int, high: int) -> Tensor:
    """The keys low…high-1 of a mask whose last dimension may be broadcast."""
    return mask[..., low:high] if mask.shape[-1] > 1 else mask


def _mask(first: int, last: int, low: int, high: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Boolean [rows, keys] for query positions first…last and key positions low…high-1."""
    i = torch.arange(first, last + 1, device=device)[:, None]
    j = torch.arange(low, high, device=device)[None, :]
    keep = (j <= i) if causal else torch.ones(i.shape[0], j.shape[1], dtype=torch.bool, device=device)
    return keep if window is None else keep & ((i - j).abs() < window)
