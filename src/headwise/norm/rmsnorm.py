"""RMSNorm (Zhang and Sennrich 2019; document 001): y = x / √(mean(x²) + ε) · weight, computed in float32 at least."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from headwise.dims import Dims
from headwise.kernels import naive_wanted
from headwise.norm.base import NormSpec
from headwise.registry import register_norm


class RMSNormSpec(NormSpec):
    """Only the root mean square normalised, scale but no shift (Llama)."""

    kind: Literal["rmsnorm"] = "rmsnorm"
    eps: float = Field(1e-6, gt=0)

    def param_count(self, dims: Dims) -> int:
        return dims.d_model


@register_norm(RMSNormSpec)
class RMSNorm(nn.Module):
    """torch's RMSNorm, in float32 at least; its naive form is the formula above."""

    def __init__(self, spec: RMSNormSpec, dims: Dims) -> None:
        super().__init__()
        self.eps = spec.eps
        self.weight = nn.Parameter(torch.ones(dims.d_model))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        if naive_wanted():
            h = x.to(wide)
            y = h / (h.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
            return (y * self.weight).to(x.dtype)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)
