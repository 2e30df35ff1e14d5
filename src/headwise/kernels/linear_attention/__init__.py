"""Linear attention with or without decay: `naive` token by token or as a matrix, `chunked` for training, and `streamed`
for training without decay on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.kernels import naive_wanted
from headwise.kernels.chunks import by_what_suits, without_autocast
from headwise.kernels.linear_attention import chunked, naive, streamed
from headwise.kernels.linear_attention.chunked import FLOOR
from headwise.kernels.linear_attention.naive import divided, with_one

__all__ = ["FLOOR", "bidirectional", "linear_attention", "normalised"]


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


def normalised(
    q_BHTE: Tensor,
    k_BKTE: Tensor,
    v_BKTD: Tensor,
    *,
    resets_BT: Tensor | None = None,
    state_BKED: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`naive.normalised` by the form that suits: as above, but `streamed` on a CPU, where no compiler fuses the chunks.

    Returns:
        y [B,H,T,D] in v's dtype, and the state after the last token [B,K,E,D+1] in float32 (float64 where v is).
    """
    by_hand = q_BHTE.device.type == "cpu" and not torch.compiler.is_compiling()
    return by_what_suits(
        naive.normalised, streamed.normalised if by_hand else chunked.normalised, q_BHTE, k_BKTE, v_BKTD,
        dtype=v_BKTD.dtype, resets_BT=resets_BT, state_BKED=state_BKED,
    )  # fmt: skip


def bidirectional(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTD: Tensor, *, resets_BT: Tensor | None = None) -> Tensor:
    """y_i = Σ_j (q_i·k_j) v_j / Σ_j q_i·k_j over all j of i's run, whole or, where runs end, from both sides in chunks.

    Returns:
        [B,H,T,D] in v's dtype.
    """
    wide = torch.promote_types(v_BKTD.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q_BHTE, k_BKTE, v_BKTD))
    v1 = with_one(v)
    with without_autocast(q_BHTE.device):
        if naive_wanted() or resets_BT is None:
            sums = naive.bidirectional(q, k, v1, resets_BT=resets_BT)
        else:
            sums = chunked.bidirectional(q, k, v1, resets_BT=resets_BT)
        return divided(sums).to(v_BKTD.dtype)
