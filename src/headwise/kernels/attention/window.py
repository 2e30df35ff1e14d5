"""A window on the fused kernel in one call: blocks of queries side by side as if they were sequences of a batch.

Block n of R queries meets the R + w − 1 keys from w − 1 before its first to its last (in an encoder w − 1 after it as
well), which are copied out for each block, so that all blocks share one mask [R, R + w − 1]. The blocks at the ends,
whose keys are fewer, go through the general way. One call for each block would cost less memory, but its backward pass
fills a gradient of the whole length for each block: O(T²/R).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headwise.kernels.attention.block import attend

# Attention of the queries start…stop-1, however it is done.
Rows = Callable[[int, int], Tensor]


def block_rows(window: int) -> int:
    """Queries in a block: few enough that little beside the window is computed, enough that few keys are copied."""
    return 64 if window <= 64 else max(128, -(-window // 256) * 64)


def attention(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSD: Tensor,
    rows: Rows,
    *,
    scale: float,
    causal: bool,
    window: int,
    first: int = 0,
    sink_H: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention to the nearest `window` keys and the `first` ones of all; `rows` does the blocks at the ends.

    Returns:
        [B,H,T,D].
    """
    (B, H, T, _), S, R = q_BHTE.shape, k_BKSE.shape[2], block_rows(window)
    back, ahead = window - 1, 0 if causal else window - 1
    # The blocks are those whose bands lie whole behind the first keys and before the end.
    begin = max(0, back + first - (S - T))
    n = (T - ahead - begin) // R
    if n < 2:
        return rows(0, T)
    end = begin + n * R
    low = S - T + begin - back

    def keys(x_BKSD: Tensor) -> Tensor:
        """[B,K,S,D] → [n,B·K,first+band,D]."""
        # Band n is the rest of a block's width, then whole blocks; each part of all bands is one slice.
        band, parts, at = R + back + ahead, [], low
        for width in (band % R, *[R] * (band // R)):
            if width:
                parts.append(x_BKSD[:, :, at : at + n * R].unflatten(2, (n, R))[..., :width, :])
            at += width
        if first:
            parts.insert(0, x_BKSD[:, :, None, :first].expand(-1, -1, n, -1, -1))
        return _fold(torch.cat(parts, 3))

    q = _fold(q_BHTE[:, :, begin:end].unflatten(2, (n, R)))
    i = torch.arange(back, back + R, device=q.device)[:, None]
    j = torch.arange(R + back + ahead, device=q.device)[None]
    mask = (i - j < window) & (j - i <= ahead)
    if first:
        mask = torch.cat([mask.new_ones(R, first), mask], 1)
    sink = None if sink_H is None else sink_H.repeat(B)
    y = attend(q, keys(k_BKSE), keys(v_BKSD), mask, scale=scale, sink_H=sink, dropout=dropout)
    y_BHTD = y.unflatten(1, (B, H)).permute(1, 2, 0, 3, 4).flatten(2, 3)
    parts = [rows(0, begin)] if begin else []
    parts.append(y_BHTD)
    if end < T:
        parts.append(rows(end, T))
    return torch.cat(parts, 2)


def _fold(x_BHNRD: Tensor) -> Tensor:
    """[B,H,n,R,D] → [n,B·H,R,D]."""
    return x_BHNRD.permute(2, 0, 1, 3, 4).flatten(1, 2)
