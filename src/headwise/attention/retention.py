"""Retention (RetNet, Sun et al. 2023): linear attention that forgets at a fixed rate a head.

    S_t = γ_h S_{t−1} + k_t v_tᵀ   with γ_h = 1 − 2^(−5−h)
    y_t = q_t S_t / √E = Σ_{j ≤ t} γ_h^(t−j) (q_t·k_j) v_j / √E

Head 0 forgets within some 32 tokens, every next one in twice as many. There is no normaliser: a GroupNorm with a group
a head takes the size out, which also makes the paper's three divisions of the scores unnecessary, and a gate closes:
out = W_O(SiLU(W_G x) ⊙ GroupNorm(y)). With rotary positions queries and keys are turned as in the paper (its xPos
without the part that the decay already is).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headwise.attention.recurrence import Recurrence, RecurrenceSpec, wide
from headwise.dims import Dims
from headwise.kernels.linear_attention import linear_attention
from headwise.linear import Linear
from headwise.registry import register_attention


class RetentionSpec(RecurrenceSpec):
    """Linear attention with a fixed decay a head, a GroupNorm and a gate (RetNet)."""

    kind: Literal["retention"] = "retention"
    examples: ClassVar[tuple[str, ...]] = ("retention", "retention(kv_heads=2, head_dim=16, qk_norm=true)")

    def param_count(self, dims: Dims) -> int:
        H, _, D = self.heads(dims)
        return super().param_count(dims) + dims.d_model * H * D + 2 * H * D

    def gate_flops(self, dims: Dims) -> int:
        H, _, D = self.heads(dims)
        return 2 * dims.d_model * H * D


@register_attention(RetentionSpec)
class Retention(Recurrence):
    """`w_gate`: C → H·D; the norm has a weight and a bias for each of its H·D numbers."""

    def __init__(self, spec: RetentionSpec, dims: Dims) -> None:
        super().__init__(spec, dims)
        width = self.n_heads * self.head_dim
        self.w_gate = Linear(dims.d_model, width, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))
        # Plain numbers, no buffer: in a half-precision model a buffer would lose the slow heads' bits.
        self.log_decays = [math.log1p(-(2.0 ** (-5 - h))) for h in range(self.kv_heads)]

    def recur(
        self,
        q_BHTE: Tensor,
        k_BKTE: Tensor,
        v_BKTD: Tensor,
        gates: tuple[Tensor, ...],
        resets_BT: Tensor | None,
        state_BKED: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(v_BKTD.dtype, torch.float32)
        log_decay = torch.tensor(self.log_decays, dtype=dtype, device=v_BKTD.device)[None, :, None]
        q_BHTE = q_BHTE * self.scale
        return linear_attention(q_BHTE, k_BKTE, v_BKTD, log_decay=log_decay, resets_BT=resets_BT, state_BKED=state_BKED)

    def read_out(self, y_BHTD: Tensor, x_BTC: Tensor) -> Tensor:
        normed_BHTD = F.layer_norm(wide(y_BHTD), y_BHTD.shape[-1:]).to(y_BHTD.dtype)
        y_BTF = super().read_out(normed_BHTD, x_BTC) * self.norm_weight + self.norm_bias
        return y_BTF * F.silu(self.w_gate(x_BTC))
