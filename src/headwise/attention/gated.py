"""Gated softmax attention (Qiu et al. 2025; Qwen3-Next): the heads' outputs pass a sigmoid gate before `wo`.

With y the softmax attention of x, z = y ⊙ σ(x·W_g), and the layer gives z·Wo. `gate="elementwise"` has a number for
each of the H·D outputs, `"headwise"` one for each head. The gate stands between the values' map and `wo`, two linear
maps in a row otherwise, and depends on the query's own token. Heads can close, so no token must serve as a sink for
weight that has to go somewhere.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from headwise.attention.base import Attention, ScoreSpec
from headwise.dims import Dims
from headwise.linear import Linear
from headwise.registry import register_attention
from headwise.start import Start, fill, start_attention


class GatedSpec(ScoreSpec):
    """Softmax attention with a sigmoid gate on each output or each head, before the output projection (Qwen3-Next)."""

    kind: Literal["gated"] = "gated"
    examples: ClassVar[tuple[str, ...]] = ("gated", "gated(gate=headwise, kv_heads=2)")
    gate: Literal["elementwise", "headwise"] = "elementwise"

    def gates(self, dims: Dims) -> int:
        """Numbers that the gate has for a token."""
        H, _, D = self.heads(dims)
        return H * D if self.gate == "elementwise" else H

    def param_count(self, dims: Dims) -> int:
        return super().param_count(dims) + (dims.d_model + self.has_bias(dims)) * self.gates(dims)

    def flops_per_token(self, dims: Dims, context: int, *, causal: bool) -> float:
        return super().flops_per_token(dims, context, causal=causal) + 2 * dims.d_model * self.gates(dims)


@register_attention(GatedSpec)
class GatedAttention(Attention):
    """Softmax attention whose heads can close; `wg`: C → H·D, or C → H."""

    def __init__(self, spec: GatedSpec, dims: Dims) -> None:
        super().__init__(spec, dims)
        self.wg = Linear(dims.d_model, spec.gates(dims), bias=spec.has_bias(dims))

    def start_from(self, old: nn.Module, start: Start) -> str:
        """The projections, with every gate half open and the output twice as large: the same results."""
        how = start_attention(self, old)
        if not isinstance(old, GatedAttention):
            fill(self.wg, torch.zeros_like(self.wg.weight))
            self.wo.weight.mul_(2)
        return how.removesuffix("; anew: wg")

    def gate(self, y_BTF: Tensor, x_BTC: Tensor) -> Tensor:
        """Each output times the sigmoid of its gate, which is made of the query's token, in cross-attention too."""
        open_BTG = torch.sigmoid(self.wg(x_BTC))
        return y_BTF * open_BTG.repeat_interleave(y_BTF.shape[-1] // open_BTG.shape[-1], -1)
