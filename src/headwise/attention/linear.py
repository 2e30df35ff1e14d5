"""Linear attention: softmax's exponential replaced by features, so that all keys fit into one state (document 002).

    y_i = Σ_j (φ(q_i)·φ(k_j)) v_j / Σ_j φ(q_i)·φ(k_j) = φ(q_i) S_i / φ(q_i)·z_i
    S_i = Σ_j φ(k_j) v_jᵀ,   z_i = Σ_j φ(k_j)

over j ≤ i, or over the whole segment in an encoder (Katharopoulos et al. 2020). z is carried as one more column of S,
by v' = [v, 1]. Time is O(T·E·D) and memory O(T), not O(T²); decoding keeps E·(D+1) numbers a head, whatever the
length.

Features φ of a query or key x of width E, all such that the weights stay positive:

* `elu`: ELU(x) + 1, the paper's;
* `relu`: ReLU(x) + 10⁻³; the floor keeps the sum of the weights from being 0, where no feature is shared;
* `softmax`: the softmax over the features (Shen et al. 2021 for queries; Choromanski et al. 2021 for the idea);
* `taylor`: 1, x, and all products of two, so that φ(q)·φ(k) = 1 + s + s²/2 with s = q·k/√E, the second-order Taylor
  polynomial of softmax's e^s (Arora et al. 2024, Based). Products that occur twice are kept once: 1 + E + E(E+1)/2
  features, which is why queries and keys are 16 wide here unless told otherwise.

The position code turns queries and keys before φ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from headwise.attention.recurrence import Recurrence, RecurrenceSpec, resets, wide
from headwise.dims import Dims
from headwise.kernels.linear_attention import bidirectional, naive, normalised
from headwise.position import Encoding
from headwise.registry import register_attention


def elu_plus_one(x: Tensor) -> Tensor:
    """e^min(x, 0) + max(x, 0). torch's own ELU promises compilers another layout of its gradient than it makes."""
    return x.clamp(max=0).exp() + F.relu(x) if torch.compiler.is_compiling() else F.elu(x).add_(1)


def taylor(x: Tensor) -> Tensor:
    """[…,E] → […,1+E+E(E+1)/2] with taylor(q)·taylor(k) = 1 + s + s²/2, s = q·k/√E."""
    E = x.shape[-1]
    x = x * E**-0.25
    products = torch.cat([x[..., i : i + 1] * x[..., i:] for i in range(E)], -1)
    # s²/2 has every square once and half, every other product twice and half.
    sizes = [0.5**0.5 if i == j else 1.0 for i in range(E) for j in range(i, E)]
    return torch.cat(
        [torch.ones_like(x[..., :1]), x, products * torch.tensor(sizes, dtype=x.dtype, device=x.device)], -1
    )


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu_plus_one,
    "relu": lambda x: F.relu(x) + 1e-3,
    "softmax": lambda x: x.softmax(-1),
    "taylor": taylor,
}


class LinearSpec(RecurrenceSpec):
    """Linear attention: features in place of softmax's exponential (elu, relu, softmax or taylor)."""

    takes_scale: ClassVar[bool] = False
    kind: Literal["linear"] = "linear"
    positional: ClassVar[tuple[str, ...]] = ("feature_map",)
    examples: ClassVar[tuple[str, ...]] = (
        "linear",
        "linear(relu, kv_heads=2)",
        "linear(softmax, feature_dim=12)",
        "linear(taylor, kv_heads=1)",
    )
    feature_map: Literal["elu", "relu", "softmax", "taylor"] = "elu"
    feature_dim: int | None = Field(None, gt=0)

    def key_dim(self, dims: Dims) -> int:
        D = self.heads(dims)[2]
        return self.feature_dim or (min(16, D) if self.feature_map == "taylor" else D)

    def state_shape(self, dims: Dims) -> tuple[int, int]:
        E, D = self.key_dim(dims), self.heads(dims)[2]
        features = 1 + E + E * (E + 1) // 2 if self.feature_map == "taylor" else E
        return features, D + 1

    def flops_per_token(self, dims: Dims, context: int, *, causal: bool) -> float:
        return super().flops_per_token(dims, context, causal=True)  # an encoder sums once, not once a direction


@register_attention(LinearSpec)
class LinearAttention(Recurrence):
    """Attention whose weights are products of features."""

    spec: LinearSpec

    def place(self, x_BHTE: Tensor, encoding: Encoding) -> Tensor:
        """The features of queries or keys, their positions worked in before, in float32 at least."""
        x_BHTE = encoding.rotate(x_BHTE)
        return FEATURES[self.spec.feature_map](wide(x_BHTE))

    def recur(
        self,
        q_BHTE: Tensor,
        k_BKTE: Tensor,
        v_BKTD: Tensor,
        gates: tuple[Tensor, ...],
        resets_BT: Tensor | None,
        state_BKED: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return normalised(q_BHTE, k_BKTE, v_BKTD, resets_BT=resets_BT, state_BKED=state_BKED)

    def both_ways(
        self,
        q_BHTE: Tensor,
        k_BKTE: Tensor,
        v_BKTD: Tensor,
        gates: tuple[Tensor, ...],
        segments: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """The plain sum over the segment, every token counting once."""
        return bidirectional(q_BHTE, k_BKTE, v_BKTD, resets_BT=resets(segments))

    def weights(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTD: Tensor, resets_BT: Tensor | None, causal: bool) -> Tensor:
        """φ(q_i)·φ(k_j) / Σ_j φ(q_i)·φ(k_j), by the readable form."""
        wide_v = v_BKTD.to(q_BHTE.dtype)
        _, scores_BHTT = naive.parallel(q_BHTE, k_BKTE, wide_v, resets_BT=resets_BT, causal=causal)
        return (scores_BHTT / scores_BHTT.sum(-1, keepdim=True)).to(v_BKTD.dtype)
