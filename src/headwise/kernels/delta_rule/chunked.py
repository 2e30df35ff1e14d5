"""The same in chunks, by the WY form: a chunk's corrections u all at once, from one triangular system.

Inside a chunk, with S the state before it and the factors of `kernels/chunks.py` (reach_i: how much of S is left at
token i, pair_ij: how much of token j):

    u_i = β_i (v_i − reach_i Sᵀk_i − Σ_{j<i} pair_ij (k_i·k_j) u_j)

so (I + A) U = diag(β) V − diag(β reach) K S with A_ij = β_i pair_ij (k_i·k_j) below the diagonal: U = U₀ − W S, both
solved for before S is known. What the chunk hands on is then linear in S, and what it puts out is linear attention with
U in place of V:

    S' = (carry I − K_tᵀ W) S + K_tᵀ U₀   with K_t = diag(tail) K
    y_i = reach_i q_i S + Σ_{j ≤ i} pair_ij (q_i·k_j) u_j

One matrix product a chunk goes one after another, all others at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.kernels.chunks import causal_part, decays, grouped, over_chunks, scaled, ungrouped

CHUNK = 64


def chunked(
    q_BHTE: Tensor,
    k_BKTE: Tensor,
    v_BKTD: Tensor,
    beta_BKT: Tensor,
    *,
    log_decay: Tensor | None = None,
    resets_BT: Tensor | None = None,
    state_BKED: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """As `naive.recurrent`, in float32 or float64 (Yang, Wang, Zhang et al. 2024, section 3)."""
    xs = (q_BHTE, k_BKTE, v_BKTD, beta_BKT)
    return over_chunks(_chunks, xs, log_decay, resets_BT, state_BKED, chunk)


def _chunks(
    xs: tuple[Tensor, ...], log_decay: Tensor | None, resets_BT: Tensor | None, state_BKED: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    q_BHTE, k_BKTE, v_BKTD, beta_BKT = xs
    q = grouped(q_BHTE, k_BKTE.shape[1], chunk)
    k, v = (x.unflatten(2, (-1, chunk)) for x in (k_BKTE, v_BKTD))
    beta = beta_BKT.unflatten(2, (-1, chunk))[..., None]
    pair, reach, tail, carry = decays(log_decay, resets_BT, chunk, k.dtype) or (None,) * 4

    seen = k if reach is None else k * reach
    overlap = k @ k.transpose(-1, -2)
    A = (beta * (overlap if pair is None else overlap * pair)).tril(-1)
    U_W = torch.linalg.solve_triangular(A, beta * torch.cat([v, seen], -1), upper=False, unitriangular=True)
    U_0, W = U_W.split([v.shape[-1], k.shape[-1]], -1)
    kept = k if tail is None else k * tail
    added, forgotten = (kept.transpose(-1, -2) @ U_W).split([v.shape[-1], k.shape[-1]], -1)
    identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    moves = (identity if carry is None else carry * identity) - forgotten

    S = torch.zeros_like(added[:, :, 0]) if state_BKED is None else state_BKED
    states = []
    for move, new in zip(moves.flatten(0, 1).unbind(1), added.flatten(0, 1).unbind(1)):
        states.append(S)
        S = torch.baddbmm(new, move, S.flatten(0, 1)).view_as(S)
    before = torch.stack(states, 2)
    scores = causal_part(q @ k.transpose(-1, -2), pair, chunk)
    y = scores @ (U_0 - W @ before) + scaled(q, reach, chunk) @ before
    return ungrouped(y, chunk), S
