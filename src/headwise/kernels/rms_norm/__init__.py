"""Root-mean-square normalisation over the last dimension."""

from __future__ import annotations

from torch import Tensor

from headwise.kernels import naive_wanted
from headwise.kernels.rms_norm import fast, naive


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + ε) · weight over the last dimension, computed in float32 at least, returned in x's dtype."""
    return (naive if naive_wanted() else fast).rms_norm(x, weight, eps)
