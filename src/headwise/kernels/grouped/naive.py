"""A mixture of experts as it is written on paper: every expert sees every token, most with weight 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def mixture(
    x_NC: Tensor, index_Nk: Tensor, weights_Nk: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """y_n = Σ_e g_ne · expert_e(x_n); g_ne is the weight that token n gives expert e, 0 where it did not choose it
    (Shazeer et al. 2017, arXiv:1701.06538).

    Args:
        x_NC: tokens.
        index_Nk: int64, the experts of each token, all different.
        weights_Nk: their weights.
        experts: functions [N,C] → [N,C'].
    """
    parts = []
    for e, expert in enumerate(experts):
        gate_N = torch.where(index_Nk == e, weights_Nk, 0).sum(-1)
        parts.append(gate_N[:, None] * expert(x_NC))
    return torch.stack(parts).sum(0)
