"""Gated linear attention (Yang et al. 2024): the state forgets at a rate that every token sets for every key dimension.

    S_t = diag(α_t) S_{t−1} + k_t v_tᵀ,   y_t = q_t S_t / √E,   α_t = σ(W₂ W₁ x_t + b)^(1/16)

W₁ and W₂ are of low rank. The sixteenth root keeps α near 1 at the start (0.957 at b = 0). log α is floored at −5 a
token, by definition: such a token leaves 0.7 % of the state, and what 16 of them leave is still a float32 number, which
the chunked form needs. An RMSNorm a head and a gate close: out = W_O(SiLU(W_G x) ⊙ RMSNorm(y)).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from headwise.attention.base import split_heads
from headwise.attention.recurrence import OutNorm, Recurrence, RecurrenceSpec, softplus, wide
from headwise.dims import Dims
from headwise.kernels.linear_attention import FLOOR, linear_attention
from headwise.linear import Linear
from headwise.registry import register_attention


class GLASpec(RecurrenceSpec):
    """Linear attention whose every key dimension decays as the token says (gated linear attention)."""

    kind: Literal["gla"] = "gla"
    examples: ClassVar[tuple[str, ...]] = ("gla", "gla(gate_rank=4, kv_heads=2, scale=0.5)")
    gate_rank: int = Field(16, gt=0)

    def param_count(self, dims: Dims) -> int:
        (H, K, D), E = self.heads(dims), self.key_dim(dims)
        decay = self.gate_rank * (dims.d_model + K * E) + K * E
        return super().param_count(dims) + decay + dims.d_model * H * D + D

    def gate_flops(self, dims: Dims) -> int:
        (H, K, D), E = self.heads(dims), self.key_dim(dims)
        return 2 * self.gate_rank * (dims.d_model + K * E) + 2 * dims.d_model * H * D


@register_attention(GLASpec)
class GatedLinearAttention(Recurrence):
    """`w_decay_in`: C → gate_rank, `w_decay_out`: gate_rank → K·E with a bias, `w_gate`: C → H·D."""

    def __init__(self, spec: GLASpec, dims: Dims) -> None:
        super().__init__(spec, dims)
        self.w_decay_in = Linear(dims.d_model, spec.gate_rank, bias=False)
        self.w_decay_out = Linear(spec.gate_rank, self.kv_heads * spec.key_dim(dims))
        self.w_gate = Linear(dims.d_model, self.n_heads * self.head_dim, bias=False)
        self.out_norm = OutNorm(self.head_dim)

    def gates(self, x_BTC: Tensor) -> tuple[Tensor, ...]:
        gate = split_heads(self.w_decay_out(self.w_decay_in(x_BTC)), self.kv_heads)
        return ((-softplus(-wide(gate)) / 16).clamp_min(FLOOR),)

    def recur(
        self,
        q_BHTE: Tensor,
        k_BKTE: Tensor,
        v_BKTD: Tensor,
        gates: tuple[Tensor, ...],
        resets_BT: Tensor | None,
        state_BKED: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        q_BHTE = q_BHTE * self.scale
        return linear_attention(q_BHTE, k_BKTE, v_BKTD, log_decay=gates[0], resets_BT=resets_BT, state_BKED=state_BKED)

    def read_out(self, y_BHTD: Tensor, x_BTC: Tensor) -> Tensor:
        return super().read_out(self.out_norm(y_BHTD), x_BTC) * F.silu(self.w_gate(x_BTC))
