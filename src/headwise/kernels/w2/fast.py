"""The same scores as inner products, for torch's fused kernel: time and memory of softmax attention.

‖q_i − k_j‖² = ‖q_i‖² − 2 q_i·k_j + ‖k_j‖², and softmax over j cancels what depends on i alone. What is left,
(2 q_i·k_j − ‖k_j‖² − h_j)/τ, is the inner product of q' = [1/τ, 2 q/τ] and k' = [−‖k‖² − h, k]: one more dimension,
placed first (see `kernels/attention/sdpa.py`).

A half-precision ‖k‖² or 1/τ would shift all of a key's scores together. Both are therefore computed in float32 from the
rounded k, and split into two halves that are exact there: three more dimensions in place of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Dimensions are filled up to a multiple of this: the fused kernels are quickest there (65 against 72 on a CPU, forward
# and backward: 1.21 and 1.15 times the 64 of plain attention), and those of CUDA take nothing else.
MULTIPLE = 8


def products(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    key_term_BKS: Tensor | None,
    tau_H11: Tensor,
    *,
    bias_factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """q' [B,H,T,·] and k' [B,K,S,·] whose plain inner products are `naive.scores` up to a constant in each row.

    Args:
        q_BHTE, k_BKSE: the points; q' and k' have their dtype.
        key_term_BKS, tau_H11: as for `naive.scores`.
        bias_factors: a further bias a_i·b_j on the scores, [H,T,n] and [S,n], or with a batch in front.
    """
    dtype = q_BHTE.dtype
    wide = torch.promote_types(dtype, torch.float32)
    inverse_H11 = tau_H11.to(wide).reciprocal()
    term_BKS1 = k_BKSE.to(wide).square().sum(-1, keepdim=True)
    if key_term_BKS is not None:
        term_BKS1 = term_BKS1 + key_term_BKS[..., None]
    if dtype == wide:
        a, b = inverse_H11, -term_BKS1
    else:
        (high, low), (term_high, term_low) = _split(inverse_H11, dtype), _split(-term_BKS1, dtype)
        a, b = torch.cat([high, high, low], -1), torch.cat([term_high, term_low, term_high], -1)
    B, H, T = q_BHTE.shape[:3]
    K, S = k_BKSE.shape[1:3]
    q = [a.expand(B, H, T, -1), (2 * inverse_H11 * q_BHTE).to(dtype)]
    k = [b, k_BKSE]
    if bias_factors is not None:
        a_HTn, b_Sn = (f.to(dtype) for f in bias_factors)
        q.insert(0, a_HTn.expand(B, H, T, -1))
        k.insert(0, b_Sn[..., None, :, :].expand(B, K, S, -1))
    spare = -sum(t.shape[-1] for t in q) % MULTIPLE
    if spare:
        q.append(q_BHTE.new_zeros(()).expand(B, H, T, spare))
        k.append(k_BKSE.new_zeros(()).expand(B, K, S, spare))
    return torch.cat(q, -1), torch.cat(k, -1)


def _split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors of a narrow dtype whose sum is x to twice its bits."""
    high = x.to(dtype)
    return high, (x - high).to(dtype)
