"""A mixture of experts as it is written on paper: every expert sees every token, most with weight 0."""

from __future__ import annotations

import torch
from torch import Tensor


def mixture(outputs_ENC: Tensor, index_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
    """y_n = Σ_e g_ne · expert_e(x_n); g_ne is the weight that token n gives expert e, 0 where it did not choose it
    (Shazeer et al. 2017, arXiv:1701.06538).

    Args:
        outputs_ENC: what every expert makes of every token.
        index_Nk: int64, the experts of each token, all different.
        weights_Nk: their weights.
    """
    gates = [torch.where(index_Nk == e, weights_Nk, 0).sum(-1) for e in range(len(outputs_ENC))]
    return (torch.stack(gates)[..., None] * outputs_ENC).sum(0)
