"""RMSNorm (Zhang and Sennrich 2019; document 001): y = x / √(mean(x²) + ε) · weight, computed in float32 at least.

`unit_offset` stores the factor as its distance from 1, y = x / √(…) · (1 + weight), as Gemma does.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from headwise.dims import Dims
from headwise.kernels.rms_norm import rms_norm
from headwise.norm.base import NormSpec
from headwise.registry import register_norm


class RMSNormSpec(NormSpec):
    """Only the root mean square normalised, scale but no shift (Llama)."""

    kind: Literal["rmsnorm"] = "rmsnorm"
    eps: float = Field(1e-6, gt=0)
    unit_offset: bool = False

    def param_count(self, dims: Dims) -> int:
        return dims.d_model


@register_norm(RMSNormSpec)
class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight, or · (1 + weight)."""

    def __init__(self, spec: RMSNormSpec, dims: Dims) -> None:
        super().__init__()
        self.eps = spec.eps
        self.unit_offset = spec.unit_offset
        self.weight = nn.Parameter(torch.full((dims.d_model,), 1.0 - spec.unit_offset))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)
