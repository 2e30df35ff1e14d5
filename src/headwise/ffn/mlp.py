"""The plain feed-forward (Vaswani et al. 2017; document 001): y = W_out σ(W_in x), hidden width 4·d_model by
default.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from headwise.dims import Dims
from headwise.ffn.base import ACTIVATIONS, FFNSpec
from headwise.linear import Linear
from headwise.registry import FFN, register_ffn


class MLPSpec(FFNSpec):
    """Two linear maps around an activation: relu, gelu (exact), gelu_tanh, silu or relu2."""

    kind: Literal["mlp"] = "mlp"
    positional: ClassVar[tuple[str, ...]] = ("activation",)
    examples: ClassVar[tuple[str, ...]] = tuple(f"mlp({a})" for a in ("relu", "gelu", "gelu_tanh", "silu", "relu2"))
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "relu2"] = "gelu"

    def param_count(self, dims: Dims) -> int:
        width = self.width(dims)
        return 2 * dims.d_model * width + (width + dims.d_model if self.has_bias(dims) else 0)

    def flops_per_token(self, dims: Dims, context: int, *, causal: bool) -> float:
        return 2 * 2 * dims.d_model * self.width(dims)


@register_ffn(MLPSpec)
class MLP(nn.Module):
    """W_in: C → F, activation, W_out: F → C."""

    def __init__(self, spec: MLPSpec, dims: Dims) -> None:
        super().__init__()
        width, bias = spec.width(dims), spec.has_bias(dims)
        self.activation = ACTIVATIONS[spec.activation]
        self.w_in = Linear(dims.d_model, width, bias=bias)
        self.w_out = Linear(width, dims.d_model, bias=bias)
        self.dropout = dims.dropout

    def forward(self, x_BTC: Tensor) -> Tensor:
        y_BTC = self.w_out(self.activation(self.w_in(x_BTC)))
        return F.dropout(y_BTC, self.dropout, self.training) if self.dropout else y_BTC


FFN.alias("standard", "mlp")
