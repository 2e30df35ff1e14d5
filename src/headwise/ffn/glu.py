"""Gated feed-forwards (Shazeer 2020; document 001): y = W_out(σ(W_gate x) ⊙ W_up x).

The kind names σ: `glu` the sigmoid, `bilinear` none, `reglu` ReLU, `geglu` exact GELU (`geglu_tanh` its tanh formula),
`swiglu` SiLU. With three matrices in place of two, the default hidden width 8·d_model/3, rounded up to a multiple of 8,
keeps the parameters of a 4·d_model MLP.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from headwise.dims import Dims
from headwise.ffn.base import ACTIVATIONS, FFNSpec
from headwise.kernels.together import products
from headwise.linear import Linear
from headwise.registry import register_ffn

GATES = {
    "glu": "sigmoid",
    "bilinear": "identity",
    "reglu": "relu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "swiglu": "silu",
}


class GLUSpec(FFNSpec):
    """A linear map gated by another; the kind names the gate's activation (Llama: swiglu)."""

    kind: Literal["glu", "bilinear", "reglu", "geglu", "geglu_tanh", "swiglu"] = "swiglu"

    def default_width(self, dims: Dims) -> int:
        return -(-8 * dims.d_model // 24) * 8

    def param_count(self, dims: Dims) -> int:
        width = self.width(dims)
        return 3 * dims.d_model * width + (2 * width + dims.d_model if self.has_bias(dims) else 0)

    def flops_per_token(self, dims: Dims, context: int, *, causal: bool) -> float:
        return 2 * 3 * dims.d_model * self.width(dims)


@register_ffn(GLUSpec)
class GLU(nn.Module):
    """W_gate and W_up: C → F, W_out: F → C."""

    side_by_side: ClassVar[tuple[str, ...]] = ("w_gate", "w_up")  # maps of one input

    def __init__(self, spec: GLUSpec, dims: Dims) -> None:
        super().__init__()
        width, bias = spec.width(dims), spec.has_bias(dims)
        self.activation = ACTIVATIONS[GATES[spec.kind]]
        self.w_gate = Linear(dims.d_model, width, bias=bias)
        self.w_up = Linear(dims.d_model, width, bias=bias)
        self.w_out = Linear(width, dims.d_model, bias=bias)
        self.dropout = dims.dropout

    def forward(self, x_BTC: Tensor) -> Tensor:
        gate_BTF, up_BTF = products(x_BTC, self.w_gate, self.w_up)
        y_BTC = self.w_out(self.activation(gate_BTF) * up_BTF)
        return F.dropout(y_BTC, self.dropout, self.training) if self.dropout else y_BTC
