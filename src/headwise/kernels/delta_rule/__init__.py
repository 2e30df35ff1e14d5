"""The delta rule with or without decay: `naive` token by token, `chunked` for training."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.kernels import naive_wanted
from headwise.kernels.chunks import without_autocast
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

    Computed in float32 at least, autocast or not: a state adds up over all tokens.

    Returns:
        y [B,H,T,D] in v's dtype, and the state after the last token [B,K,E,D] in float32 (float64 where v is).
    """
    wide = torch.promote_types(v_BKTD.dtype, torch.float32)
    form = naive.recurrent if naive_wanted() or q_BHTE.shape[2] == 1 else chunked.chunked
    with without_autocast(q_BHTE.device):
        y_BHTD, state_BKED = form(
            q_BHTE.to(wide), k_BKTE.to(wide), v_BKTD.to(wide), beta_BKT.to(wide),
            log_decay=log_decay, resets_BT=resets_BT, state_BKED=state_BKED,
        )  # fmt: skip
    return y_BHTD.to(v_BKTD.dtype), state_BKED
