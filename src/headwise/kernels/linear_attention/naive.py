"""Linear attention as it is written on paper: a state, token by token; and the same as a masked matrix of scores."""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent(
    q_BHTE: Tensor,
    k_BKTE: Tensor,
    v_BKTD: Tensor,
    *,
    log_decay: Tensor | None = None,
    resets_BT: Tensor | None = None,
    state_BKED: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(a_t) S_{t−1} + k_t v_tᵀ, y_t = q_t S_t (Katharopoulos et al. 2020; with decay Sun et al. 2023, Yang et
    al. 2024; document 002). The definition, and the form that decodes.

    Args:
        q_BHTE, k_BKTE, v_BKTD: features; query head h reads the state of key/value head ⌊h·K/H⌋.
        log_decay: log a_t ≤ 0: [B,K,T] a head, [B,K,T,E] a key dimension; sizes of 1 broadcast. None: a = 1.
        resets_BT: boolean; where True the state is zero before the token.
        state_BKED: the state before the first token; None: zero.

    Returns:
        y [B,H,T,D] and the state after the last token [B,K,E,D].
    """
    T, K = q_BHTE.shape[2], k_BKTE.shape[1]
    q_BKGTE = q_BHTE.unflatten(1, (K, -1))
    S = state_BKED if state_BKED is not None else k_BKTE.new_zeros(*k_BKTE.shape[:2], k_BKTE.shape[3], v_BKTD.shape[3])
    decay = None
    if log_decay is not None:
        decay = (log_decay if log_decay.dim() == 4 else log_decay[..., None]).exp()
        decay = decay.expand(*decay.shape[:2], T, decay.shape[3])[..., None]
    ys = []
    for t in range(T):
        if resets_BT is not None:
            S = S.masked_fill(resets_BT[:, t, None, None, None], 0)
        if decay is not None:
            S = decay[:, :, t] * S
        S = S + k_BKTE[:, :, t, :, None] @ v_BKTD[:, :, t, None, :]
        ys.append(q_BKGTE[:, :, :, t] @ S)
    return torch.stack(ys, 3).flatten(1, 2), S


LEAST = 1e-12


def normalised(
    q_BHTE: Tensor,
    k_BKTE: Tensor,
    v_BKTD: Tensor,
    *,
    resets_BT: Tensor | None = None,
    state_BKED: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_i = Σ_j (q_i·k_j) v_j / Σ_j q_i·k_j over j ≤ i of i's run, for features that are not negative.

    Returns:
        y [B,H,T,D] and the state [B,K,E,D+1], in whose last column the keys are summed.
    """
    y_BHTD, state = recurrent(q_BHTE, k_BKTE, with_one(v_BKTD), resets_BT=resets_BT, state_BKED=state_BKED)
    return divided(y_BHTD), state


def with_one(v: Tensor) -> Tensor:
    """v' = [v, 1]: the sum of the weights comes out as the last column."""
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def divided(y: Tensor) -> Tensor:
    """[Σ w v, Σ w] → Σ w v / Σ w. Where all features are 0, as ELU + 1 of numbers far below zero, so is y."""
    sums, total = y.split([y.shape[-1] - 1, 1], -1)
    return sums * total.clamp_min(LEAST).reciprocal()  # a division has twice the backward pass


def bidirectional(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTD: Tensor, *, resets_BT: Tensor | None = None) -> Tensor:
    """y_i = Σ_j (q_i·k_j) v_j over all j of i's run [B,H,T,D]: one state for all, or the masked matrix of scores."""
    if resets_BT is not None:
        return parallel(q_BHTE, k_BKTE, v_BKTD, resets_BT=resets_BT, causal=False)[0]
    S_BK1ED = (k_BKTE.transpose(-1, -2) @ v_BKTD).unsqueeze(2)
    return (q_BHTE.unflatten(1, (k_BKTE.shape[1], -1)) @ S_BK1ED).flatten(1, 2)


def parallel(
    q_BHTE: Tensor,
    k_BKTE: Tensor,
    v_BKTD: Tensor,
    *,
    log_decay: Tensor | None = None,
    resets_BT: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """y_i = Σ_j (a_{j+1} … a_i) (q_i·k_j) v_j over j ≤ i of i's run: no decay, or one a head. O(T²).

    With `causal=False`, which takes no decay, the sum goes over the whole run.

    Returns:
        y [B,H,T,D] and the scores [B,H,T,T].
    """
    H, T, K = q_BHTE.shape[1], q_BHTE.shape[2], k_BKTE.shape[1]
    k_BHTE, v_BHTD = (x.repeat_interleave(H // K, 1) for x in (k_BKTE, v_BKTD))
    keep = torch.ones(T, T, dtype=torch.bool, device=q_BHTE.device)
    keep = keep.tril() if causal else keep
    if resets_BT is not None:
        run_BT = resets_BT.cumsum(1)
        keep = keep & (run_BT[:, None, :, None] == run_BT[:, None, None, :])
    scores_BHTT = q_BHTE @ k_BHTE.transpose(-1, -2)
    if log_decay is not None:
        b = log_decay.expand(*log_decay.shape[:-1], T).cumsum(-1)
        apart = (b[..., :, None] - b[..., None, :]).masked_fill(~keep, -torch.inf)
        scores_BHTT = scores_BHTT * apart.exp().repeat_interleave(H // K, 1)
    scores_BHTT = scores_BHTT.masked_fill(~keep, 0)
    return scores_BHTT @ v_BHTD, scores_BHTT
