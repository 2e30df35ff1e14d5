"""LayerNorm (Ba et al. 2016; document 001): y = (x − mean) / √(var + ε) · weight + bias, over the last dimension."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from headwise.dims import Dims
from headwise.kernels import naive_wanted
from headwise.norm.base import NormSpec
from headwise.registry import register_norm


class LayerNormSpec(NormSpec):
    """Mean and variance normalised, with scale and (by default) shift (GPT-2)."""

    kind: Literal["layernorm"] = "layernorm"
    eps: float = Field(1e-5, gt=0)
    bias: bool = True

    def param_count(self, dims: Dims) -> int:
        return dims.d_model * (2 if self.bias else 1)


@register_norm(LayerNormSpec)
class LayerNorm(nn.LayerNorm):
    """torch's fused LayerNorm; its naive form is the formula above."""

    def __init__(self, spec: LayerNormSpec, dims: Dims) -> None:
        super().__init__(dims.d_model, eps=spec.eps, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not naive_wanted():
            return super().forward(x)
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        y = (x - mean) * (variance + self.eps).rsqrt() * self.weight
        return y if self.bias is None else y + self.bias
