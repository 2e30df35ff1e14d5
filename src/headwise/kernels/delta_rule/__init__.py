"""The delta rule with or without decay: `naive` token by token, `chunked` for training."""

from __future__ import annotations

from torch import Tensor

from headwise.kernels.chunks import by_what_suits
from headwise.kernels.delta_rule import chunked, naive


def delta_rule(
    q_BHTE: Tensor,
    k_BKTE: Tensor,
    v_BKTD: Tensor,
    beta_BKT: Tensor,
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
        naive.recurrent, chunked.chunked, q_BHTE, k_BKTE, v_BKTD, beta_BKT, dtype=v_BKTD.dtype,
        log_decay=log_decay, resets_BT=resets_BT, state_BKED=state_BKED,
    )  # fmt: skip
