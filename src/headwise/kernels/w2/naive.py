"""Scores that are squared distances, as they are written on paper."""

from __future__ import annotations

import torch
from torch import Tensor


def scores(q_BHTE: Tensor, k_BKSE: Tensor, key_term_BKS: Tensor | None, tau_H11: Tensor) -> Tensor:
    """S_ij = −(‖q_i − k_j‖² + h_j)/τ, float [B,H,T,S] in float32 at least (document 003).

    Query head h reads key head ⌊h·K/H⌋. Each distance comes from the coordinates' differences: no inner product, no
    cancellation.

    Args:
        q_BHTE, k_BKSE: the points.
        key_term_BKS: h, what a key adds to its distance from every query; None: nothing.
        tau_H11: τ > 0, [H,1,1] or [1,1,1].
    """
    group = q_BHTE.shape[1] // k_BKSE.shape[1]
    wide = torch.promote_types(q_BHTE.dtype, torch.float32)
    k_BHSE = k_BKSE.to(wide).repeat_interleave(group, dim=1)
    distance_BHTS = torch.cdist(q_BHTE.to(wide), k_BHSE, compute_mode="donot_use_mm_for_euclid_dist").square()
    if key_term_BKS is not None:
        distance_BHTS = distance_BHTS + key_term_BKS.repeat_interleave(group, dim=1)[:, :, None]
    return -distance_BHTS / tau_H11
