"""Root-mean-square normalisation over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.kernels import naive_wanted
from headwise.kernels.rms_norm import fast, naive


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """x / √(mean(x²) + ε) · weight over the last dimension, computed in float32 at least, returned in x's dtype.

    With `unit_offset` the factor is 1 + weight.
    """
    if unit_offset:
        weight = 1 + weight.to(torch.promote_types(weight.dtype, torch.float32))
    return (naive if naive_wanted() else fast).rms_norm(x, weight, eps)
