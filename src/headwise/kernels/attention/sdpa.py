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
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headwise.kernels import flash
from headwise.kernels.attention import one_query
from headwise.kernels.attention import window as windows
from headwise.kernels.attention.block import attend
from headwise.kernels.segments import Keep

# Query rows a masked call handles at once: bounds its mask, or its scores, to ROWS × S.
ROWS = 256


def attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    first: int = 0,
    keep: Keep | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    bias_factors: tuple[Tensor, Tensor] | None = None,
    bias_rows: Callable[[Tensor, int, int], Tensor | None] | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """As `naive.attention`, with the bias as factors ([H,T,n], [S,n]) or as a function of a range of rows ([H,rows,S]),
    `keep` as a function of a range of rows, and the `first` keys seen beside a window.

    One call of the fused kernel where nothing but causality masks, and for a window (see `window.py`). On CUDA one
    Triton kernel for windows, soft-caps, sinks and segments (see `flash`). For the one query of a compiled step the
    compiler's own loops (see `one_query`). Otherwise blocks of query rows, each with the keys it can reach, so a window
    costs O(T·window); a block's mask is made anew for the backward pass, so no T×S tensor is ever held.

    Returns:
        [B,H,T,D], D the width of `v_BKSD`.
    """
    T, S = q_BHTD.shape[2], k_BKSD.shape[2]
    if window is not None and window >= S:
        window = None
    by_rows = bias_rows is not None and bias_rows(q_BHTD, 0, 0) is not None
    unmasked = attn_mask is None and segments is None and keep is None and not by_rows
    if unmasked and not dropout and (window is None or (causal and not first)) and one_query.serves(q_BHTD):
        seen = slice(None if window is None else S - window, None)
        if bias_factors is not None:
            bias_factors = bias_factors[0], bias_factors[1][..., seen, :]
        return one_query.attention(
            q_BHTD, k_BKSD[:, :, seen], v_BKSD[:, :, seen],
            scale=scale, softcap=softcap, sink_H=sink_H, bias_factors=bias_factors,
        )  # fmt: skip
    if bias_factors is not None and softcap is None:
        q_BHTD, k_BKSD = with_bias(q_BHTD, k_BKSD, bias_factors, scale)
        scale, bias_factors = 1.0, None
    biased = bias_factors is not None or by_rows
    if attn_mask is None and keep is None and not biased and not dropout:
        y_BHTD = flash.fused(
            q_BHTD, k_BKSD, v_BKSD, scale=scale, causal=causal, window=window, lead=first, softcap=softcap,
            sink_H=sink_H, segments=segments,
        )  # fmt: skip
        if y_BHTD is not None:
            return y_BHTD
    plain = unmasked and softcap is None and not biased
    if plain and window is None and (not causal or T == 1 or T == S):
        return attend(q_BHTD, k_BKSD, v_BKSD, scale=scale, causal=causal and T > 1, sink_H=sink_H, dropout=dropout)

    def block(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, start: int, stop: int) -> Tensor:
        low, high = 0, min(S, S - T + stop) if causal else S
        if window is not None:
            low = max(0, S - T + start - window + 1)
            high = min(high, S - T + stop - 1 + window)
        ranges = [(0, first), (low, high)] if 0 < first < low else [(0 if low <= first else low, high)]

        def columns(x: Tensor, dim: int) -> Tensor:
            """The keys within reach, of a tensor with one entry a key, or one for all."""
            if x.shape[dim] == 1 < S:
                return x
            parts = [x.narrow(dim, a, b - a) for a, b in ranges]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

        i = torch.arange(S - T + start, S - T + stop, device=q_BHTD.device)[:, None]
        j = columns(torch.arange(S, device=q_BHTD.device), 0)
        mask = (j <= i) if causal else torch.ones(len(i), len(j), dtype=torch.bool, device=i.device)
        if window is not None:
            mask = mask & (((i - j).abs() < window) | (j < first))
        if keep is not None:
            mask = mask & columns(keep(start, stop), -1)
        if segments is not None:
            mask = mask & (segments[0][:, None, start:stop, None] == columns(segments[1], -1)[:, None, None])
        added = None
        if bias_factors is not None:
            a_HTn, b_Sn = bias_factors
            added = a_HTn[..., start:stop, :] @ columns(b_Sn[..., None, :, :], -2).transpose(-1, -2)
        if bias_rows is not None and (rows_HTS := bias_rows(q_BHTD, start, stop)) is not None:
            added = columns(rows_HTS, -1)
        if attn_mask is not None:
            given = columns(attn_mask[..., start:stop, :] if attn_mask.shape[-2] > 1 else attn_mask, -1)
            if given.dtype == torch.bool:
                mask = mask & given
            else:
                added = given if added is None else given + added
        if added is not None:
            mask = added.to(q_BHTD.dtype).masked_fill(~mask, -torch.inf)
        return attend(
            q_BHTD[:, :, start:stop], columns(k_BKSD, 2), columns(v_BKSD, 2), mask,
            scale=scale, softcap=softcap, sink_H=sink_H, dropout=dropout,
        )  # fmt: skip

    def rows(start: int, stop: int) -> Tensor:
        if plain and causal and T == S and start == 0 and window is not None and stop <= window + first:
            # Too early for the window to hide anything.
            return attend(
                q_BHTD[:, :, :stop], k_BKSD[:, :, :stop], v_BKSD[:, :, :stop],
                scale=scale, causal=True, sink_H=sink_H, dropout=dropout,
            )  # fmt: skip
        starts = range(start, stop, ROWS)
        again = torch.is_grad_enabled() and len(starts) > 1 and (window is None or softcap is not None)
        blocks = []
        for at in starts:
            args = (q_BHTD, k_BKSD, v_BKSD, at, min(at + ROWS, stop))
            blocks.append(checkpoint(block, *args, use_reentrant=False) if again else block(*args))
        return torch.cat(blocks, dim=2)

    if plain and window is not None:
        return windows.attention(
            q_BHTD, k_BKSD, v_BKSD, rows,
            scale=scale, causal=causal, window=window, first=first, sink_H=sink_H, dropout=dropout,
        )  # fmt: skip
    return rows(0, T)


def with_bias(
    q_BHTD: Tensor, k_BKSD: Tensor, bias_factors: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """q' and k' whose plain inner product is scale·q·k + bias; the factors stand first (see the module's note)."""
    a_HTn, b_Sn = (f.to(q_BHTD.dtype) for f in bias_factors)
    a = a_HTn.expand(q_BHTD.shape[0], *a_HTn.shape[-3:])
    b = b_Sn[..., None, :, :].expand(k_BKSD.shape[0], k_BKSD.shape[1], *b_Sn.shape[-2:])
    return torch.cat([a, q_BHTD * scale], -1), torch.cat([b, k_BKSD], -1)
