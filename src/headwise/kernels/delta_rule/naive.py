"""The delta rule as it is written on paper: the state corrects what it has stored under a key, token by token."""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent(
    q_BHTE: Tensor,
    k_BKTE: Tensor,
    v_BKTD: Tensor,
    beta_BKT: Tensor,
    *,
    log_decay: Tensor | None = None,
    resets_BT: Tensor | None = None,
    state_BKED: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t−1} + k_t u_tᵀ with u_t = β_t (v_t − a_t S_{t−1}ᵀ k_t), y_t = q_t S_t.

    The definition, and the form that decodes. In other words S_t = a_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ, a
    step of size β_t down the gradient of ½‖Sᵀk_t − v_t‖² (Yang, Wang, Zhang et al. 2024; with decay Yang, Kautz and
    Hatamizadeh 2025).

    Args:
        q_BHTE, k_BKTE, v_BKTD: query head h reads the state of key/value head ⌊h·K/H⌋.
        beta_BKT: the step sizes; with unit keys, 0 … 1 (up to 2) keeps the state bounded.
        log_decay: log a_t ≤ 0, [B,K,T]; sizes of 1 broadcast. None: a = 1.
        resets_BT: boolean; where True the state is zero before the token.
        state_BKED: the state before the first token; None: zero.

    Returns:
        y [B,H,T,D] and the state after the last token [B,K,E,D].
    """
    T, K = q_BHTE.shape[2], k_BKTE.shape[1]
    q_BKGTE = q_BHTE.unflatten(1, (K, -1))
    S = state_BKED if state_BKED is not None else k_BKTE.new_zeros(*k_BKTE.shape[:2], k_BKTE.shape[3], v_BKTD.shape[3])
    decay = log_decay.exp().expand(*log_decay.shape[:2], T) if log_decay is not None else None
    ys = []
    for t in range(T):
        k, v, beta = k_BKTE[:, :, t, None], v_BKTD[:, :, t, None], beta_BKT[:, :, t, None, None]
        if resets_BT is not None:
            S = S.masked_fill(resets_BT[:, t, None, None, None], 0)
        if decay is not None:
            S = decay[:, :, t, None, None] * S
        S = S + k.transpose(-1, -2) @ (beta * (v - k @ S))
        ys.append(q_BKGTE[:, :, :, t] @ S)
    return torch.stack(ys, 3).flatten(1, 2), S
