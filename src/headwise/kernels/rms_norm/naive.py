"""RMSNorm as it is written on paper (Zhang and Sennrich 2019; document 001)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / √(mean(x²) + ε) · weight."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return (h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight).to(x.dtype)
