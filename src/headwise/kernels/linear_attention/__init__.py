"""Linear attention with or without decay: `naive` token by token or as a matrix, `chunked` for training."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.kernels import naive_wanted
from headwise.kernels.chunks import by_what_suits, without_autocast
from headwise.kernels.linear_attention import chunked, naive
from headwise.kernels.linear_attention.chunked import FLOOR

__all__ = ["FLOOR", "bidirectional", "linear_attention"]


def linear_attention(
    q_BHTE: Tensor,
    k_BKTE: Tensor,
    v_BKTD: Tensor,
    *,
    log_decay: Tensor | None = None,
    resets_BT: Tensor | None = None,
    state_BKED: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`naive.recurrent` by the form that suits: token by token inside `kernels.naive()` and for one token, else chunks.

    Returns:
        y [B,H,T,D] in v's dtype, and the state after the last token [B,K,E,D] in float32 (float64 where v is).
    """
    return by_what_suits(
        naive.recurrent, chunked.chunked, q_BHTE, k_BKTE, v_BKTD, dtype=v_BKTD.dtype,
        log_decay=log_decay, resets_BT=resets_BT, state_BKED=state_BKED,
    )  # fmt: skip


def bidirectional(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTD: Tensor, *, resets_BT: Tensor | None = None) -> Tensor:
    """y_i = Σ_j (q_i·k_j) v_j over all j of i's run: `naive.parallel(causal=False)`, or in linear time, as above.

    Returns:
        [B,H,T,D] in v's dtype.
    """
    wide = torch.promote_types(v_BKTD.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q_BHTE, k_BKTE, v_BKTD))
    with without_autocast(q_BHTE.device):
        if naive_wanted() or resets_BT is None:
            return naive.bidirectional(q, k, v, resets_BT=resets_BT).to(v_BKTD.dtype)
        return chunked.bidirectional(q, k, v, resets_BT=resets_BT).to(v_BKTD.dtype)
