"""The delta rule (DeltaNet; Schlag et al. 2021, Yang et al. 2024), and with a decay (Gated DeltaNet, Yang et al. 2025).

Linear attention adds to its state and never takes back; once there are more keys than dimensions they overlap. The
delta rule first reads what the state holds under the new key, and writes only the difference to the new value:

    S_t = S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀ k_t)ᵀ = (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ,   y_t = q_t S_t

with unit queries and keys, q = SiLU(W_Q x)/‖·‖, and β_t = σ(w_β x_t) a head: 1 overwrites, 0 leaves alone. It is one
step of size β down the gradient of ½‖Sᵀk − v‖². An RMSNorm a head closes.

`gated_deltanet` also forgets: S_{t−1} is first multiplied by α_t = exp(−A_h softplus(w_a x_t + d_h)), as in Mamba 2
(Dao and Gu 2024), which clears the whole state where the delta rule goes key by key. A_h starts spread over 1 … 16 and
softplus(d_h) at 0.01, so that heads start by forgetting in some 100 to 6 tokens. The output gets a gate, SiLU(W_G x).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headwise.attention.recurrence import OutNorm, Recurrence, RecurrenceSpec, softplus, wide
from headwise.dims import Dims
from headwise.kernels.delta_rule import delta_rule
from headwise.linear import Linear
from headwise.position import Encoding
from headwise.registry import register_attention

START = 0.01  # softplus(d_h) at the start


class DeltaNetSpec(RecurrenceSpec):
    """A linear attention that overwrites what it holds under a key (the delta rule)."""

    takes_scale: ClassVar[bool] = False
    kind: Literal["deltanet"] = "deltanet"
    examples: ClassVar[tuple[str, ...]] = ("deltanet", "deltanet(kv_heads=2, head_dim=16, qk_norm=true)")

    def param_count(self, dims: Dims) -> int:
        _, K, D = self.heads(dims)
        return super().param_count(dims) + dims.d_model * K + D

    def gate_flops(self, dims: Dims) -> int:
        return 2 * dims.d_model * self.heads(dims)[1]

    def recurrence_flops(self, dims: Dims) -> int:
        (H, K, _), (rows, columns) = self.heads(dims), self.state_shape(dims)
        return 2 * (H + 2 * K) * rows * columns  # the state is also read at the key


@register_attention(DeltaNetSpec)
class DeltaNet(Recurrence):
    """`w_beta`: C → K."""

    def __init__(self, spec: DeltaNetSpec, dims: Dims) -> None:
        super().__init__(spec, dims)
        self.w_beta = Linear(dims.d_model, self.kv_heads, bias=False)
        self.out_norm = OutNorm(self.head_dim)

    def place(self, x_BHTE: Tensor, encoding: Encoding) -> Tensor:
        """Queries or keys through SiLU, brought to length 1, and turned, which keeps the length."""
        x = F.silu(wide(x_BHTE))
        unit = x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        return encoding.rotate(unit.to(x_BHTE.dtype))

    def gates(self, x_BTC: Tensor) -> tuple[Tensor, ...]:
        return (wide(self.w_beta(x_BTC)).sigmoid().transpose(1, 2),)

    def recur(
        self,
        q_BHTE: Tensor,
        k_BKTE: Tensor,
        v_BKTD: Tensor,
        gates: tuple[Tensor, ...],
        resets_BT: Tensor | None,
        state_BKED: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        beta, log_decay = gates[0], gates[1] if len(gates) > 1 else None
        return delta_rule(q_BHTE, k_BKTE, v_BKTD, beta, log_decay=log_decay, resets_BT=resets_BT, state_BKED=state_BKED)

    def read_out(self, y_BHTD: Tensor, x_BTC: Tensor) -> Tensor:
        return super().read_out(self.out_norm(y_BHTD), x_BTC)


class GatedDeltaNetSpec(DeltaNetSpec):
    """The delta rule with a decay that the token sets for each head, and a gate."""

    kind: Literal["gated_deltanet"] = "gated_deltanet"  # type: ignore[assignment]
    examples: ClassVar[tuple[str, ...]] = ("gated_deltanet", "gated_deltanet(kv_heads=2)")

    def param_count(self, dims: Dims) -> int:
        H, K, D = self.heads(dims)
        return super().param_count(dims) + dims.d_model * (K + H * D) + 2 * K

    def gate_flops(self, dims: Dims) -> int:
        H, K, D = self.heads(dims)
        return super().gate_flops(dims) + 2 * dims.d_model * (K + H * D)


@register_attention(GatedDeltaNetSpec)
class GatedDeltaNet(DeltaNet):
    """`w_alpha`: C → K, `w_gate`: C → H·D, `A_log` and `dt_bias`: a number a key/value head, as in Mamba 2."""

    def __init__(self, spec: GatedDeltaNetSpec, dims: Dims) -> None:
        super().__init__(spec, dims)
        self.w_alpha = Linear(dims.d_model, self.kv_heads, bias=False)
        self.w_gate = Linear(dims.d_model, self.n_heads * self.head_dim, bias=False)
        self.A_log = nn.Parameter(torch.linspace(1, 16, self.kv_heads).log())
        self.dt_bias = nn.Parameter(torch.full((self.kv_heads,), math.log(math.expm1(START))))

    def gates(self, x_BTC: Tensor) -> tuple[Tensor, ...]:
        step_BTK = softplus(wide(self.w_alpha(x_BTC)) + wide(self.dt_bias))
        log_decay_BTK = -wide(self.A_log).exp() * step_BTK
        return (*super().gates(x_BTC), log_decay_BTK.transpose(1, 2))

    def read_out(self, y_BHTD: Tensor, x_BTC: Tensor) -> Tensor:
        return super().read_out(y_BHTD, x_BTC) * F.silu(self.w_gate(x_BTC))
