"""Wasserstein-2 attention (document 003): tokens as Gaussians, scores as distances between them.

Each query and key is a diagonal Gaussian: a mean μ (turned by RoPE to Rμ) and standard deviations
σ = softplus(σ_raw) + 1e-4, both linear in the token before that. The squared 2-Wasserstein distance of two such is the
Euclidean one of the points a = [Rμ, σ] (Dowson and Landau 1982), and

    S_ij = −(‖Rμq_i − Rμk_j‖² + ‖σq_i − σk_j‖²)/(τ + ε),    y_i = Σ_j softmax_j(S_ij) v_j,

so that a query looks at the keys near it. τ is learned, positive, one a layer or one a head.

**Fast form.** Softmax cancels ‖a_i‖², and (2 a_i·a_j − ‖a_j‖²)/(τ + ε) is plain scaled-dot-product attention with one
more dimension (`kernels/w2/fast.py`): exact, and in linear memory.

**τ at the start.** Let the projections' outputs have standard deviation s. Along one dimension of μ, −(q − k)² is
2qk − k² up to a term in the query alone, of variance 4s⁴ + 2s⁴ over the keys and queries. Around 0 softplus has slope
½, so a dimension of σ gives a sixteenth of that. q·k/√D has variance s⁴: the two agree where τ² = 6(D_μ + D_σ/16).
The parameter is log_tau = ln(τ/τ₀), so that 0 is that start.

**Precision.** The later code of document 003's project scores otherwise: with q̃ = Rμq/√σq and k̃ = Rμk/√σk,
−(‖q̃ − k̃‖² + Σ log σk)/(τ + ε), published with τ = 2. It is no Wasserstein distance. It starts from τ₀ = 2.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from headwise.attention.base import Attention, AttentionSpec, Context
from headwise.dims import Dims
from headwise.errors import Problem, SpecError, short
from headwise.kernels import naive_wanted
from headwise.kernels.attention import naive, sdpa
from headwise.kernels.w2 import fast
from headwise.kernels.w2 import naive as distances
from headwise.position import Encoding
from headwise.registry import register_attention

LEAST_SIGMA = 1e-4
EPSILON = 1e-6


def _sigma_dim(value: Any) -> Any:
    """A width or the word head_dim; a union's own complaint would come once for each of the two."""
    if value in (None, "head_dim") or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    if isinstance(value, str) and value.isdecimal() and int(value):
        return int(value)
    raise SpecError([Problem("", f"{short(value)} given; a whole number of at least 1 or head_dim is wanted")])


class W2Spec(AttentionSpec):
    """Attention to what is near: tokens are Gaussians, scores their squared Wasserstein-2 distances.

    `mu_dim` and `sigma_dim` are D_μ and D_σ of each head. One left out is what the other leaves of head_dim, or
    head_dim where it leaves nothing; both left out, half each: the queries and keys of softmax attention in size.
    `sigma_dim="head_dim"` makes both head_dim wide, as document 003 does. `tau`: one a layer, one a head, or fixed at
    its start.
    """

    takes_scale: ClassVar[bool] = False
    kind: Literal["w2"] = "w2"
    examples: ClassVar[tuple[str, ...]] = (
        "w2",
        "w2(sigma_dim=head_dim, tau=head, kv_heads=2)",
        "w2(score=precision)",
    )
    mu_dim: int | None = Field(None, gt=0)
    sigma_dim: Annotated[int | Literal["head_dim"] | None, BeforeValidator(_sigma_dim)] = None
    score: Literal["w2", "precision"] = "w2"
    tau: Literal["layer", "head", "fixed"] = "layer"

    def widths(self, dims: Dims) -> tuple[int, int]:
        """(D_μ, D_σ) in force."""
        D = self.heads(dims)[2]
        sigma = D if self.sigma_dim == "head_dim" else self.sigma_dim
        if self.mu_dim is None and sigma is None:
            mu = D // 2
            if mu % 2 and mu + 1 < D and self.score == "w2":
                mu += 1  # even, for RoPE turns pairs
            return mu, D - mu
        if sigma is None:
            assert self.mu_dim is not None
            return self.mu_dim, D - self.mu_dim if self.mu_dim < D else D
        return self.mu_dim or (D - sigma if sigma < D else D), sigma

    def key_dim(self, dims: Dims) -> int:
        return sum(self.widths(dims))

    def rotary_dim(self, dims: Dims) -> int:
        return self.widths(dims)[0]

    def check(self, dims: Dims) -> list[Problem]:
        problems = super().check(dims)
        if not problems:
            mu, sigma = self.widths(dims)
            if mu < 1:
                problems.append(Problem("mu_dim", f"head_dim={mu + sigma} leaves none; heads of 2 at least are wanted"))
            elif self.score == "precision" and mu != sigma:
                message = f"score=precision divides μ by σ, but mu_dim={mu} and sigma_dim={sigma} differ"
                problems.append(Problem("sigma_dim", f"{message}; give equal ones, or an even head_dim and neither"))
        return problems

    def first_tau(self, dims: Dims) -> float:
        """τ₀, from which training starts."""
        mu, sigma = self.widths(dims)
        return math.sqrt(6 * (mu + sigma / 16)) if self.score == "w2" else 2.0

    def param_count(self, dims: Dims) -> int:
        return super().param_count(dims) + {"layer": 1, "head": dims.n_heads, "fixed": 0}[self.tau]

    def flops_per_token(self, dims: Dims, context: int, *, causal: bool) -> float:
        flops = super().flops_per_token(dims, context, causal=causal)
        if self.score == "w2":
            return flops
        # The points are D_μ wide, not D_μ + D_σ.
        return flops - 2 * dims.n_heads * self.widths(dims)[1] * self.keys_seen(context, causal=causal)


@register_attention(W2Spec)
class W2Attention(Attention):
    """Queries and keys [Rμ, σ], which are also what a cache keeps; `log_tau` [1] or [H] is ln(τ/τ₀)."""

    def __init__(self, spec: W2Spec, dims: Dims) -> None:
        super().__init__(spec, dims)
        self.score = spec.score
        self.mu_dim, self.sigma_dim = spec.widths(dims)
        self.first_tau = spec.first_tau(dims)
        self.log_tau = None
        if spec.tau != "fixed":
            self.log_tau = nn.Parameter(torch.zeros(1 if spec.tau == "layer" else self.n_heads))

    def temperature(self, like: Tensor) -> Tensor:
        """τ + ε, [1,1,1] or [H,1,1], on the device of `like` and in its dtype, float32 at least."""
        wide = torch.promote_types(like.dtype, torch.float32)
        log_tau = self.log_tau if self.log_tau is not None else like.new_zeros(1)
        return (self.first_tau * log_tau.to(wide).exp() + EPSILON)[:, None, None]

    def place(self, x_BHTE: Tensor, encoding: Encoding) -> Tensor:
        """Only the means know of positions."""
        mu, sigma_raw = x_BHTE.split([self.mu_dim, self.sigma_dim], dim=-1)
        return torch.cat([encoding.rotate(mu), sigma_raw], dim=-1)

    def _heads(self, x_BTC: Tensor, context: Context, memory_BSC: Tensor | None = None) -> tuple[Tensor, ...]:
        q_BHTE, k_BKSE, v_BKSD = super()._heads(x_BTC, context, memory_BSC)
        return self._deviations(q_BHTE), self._deviations(k_BKSE), v_BKSD

    def _deviations(self, x_BHTE: Tensor) -> Tensor:
        """[Rμ, σ_raw] → [Rμ, σ]."""
        mu, sigma_raw = x_BHTE.split([self.mu_dim, self.sigma_dim], dim=-1)
        return torch.cat([mu, F.softplus(sigma_raw).to(mu.dtype) + LEAST_SIGMA], dim=-1)

    def _points(self, x_BHTE: Tensor) -> tuple[Tensor, Tensor | None]:
        """[Rμ, σ] → the points whose squared distances are scored, and what a key adds to its distances."""
        if self.score == "w2":
            return x_BHTE, None
        mu, sigma = x_BHTE.to(torch.promote_types(x_BHTE.dtype, torch.float32)).chunk(2, dim=-1)
        return (mu * sigma.rsqrt()).to(x_BHTE.dtype), sigma.log().sum(-1)

    def attend(
        self,
        q_BHTE: Tensor,
        k_BKSE: Tensor,
        v_BKSD: Tensor,
        context: Context,
        attn_mask: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Softmax over negative distances, by inner products or, where the weights are wanted, as written."""
        (q_BHTE, _), (k_BKSE, key_term_BKS) = self._points(q_BHTE), self._points(k_BKSE)
        tau_H11 = self.temperature(q_BHTE)
        encoding, causal = context.encoding, context.causal
        if naive_wanted() or need_weights:
            scores_BHTS = distances.scores(q_BHTE, k_BKSE, key_term_BKS, tau_H11)
            bias_HTS = encoding.bias(q_BHTE, 0, q_BHTE.shape[2])
            scores_BHTS = scores_BHTS if bias_HTS is None else scores_BHTS + bias_HTS
            y, weights = naive.attention(
                q_BHTE, k_BKSE, v_BKSD, scale=0.0, causal=causal,  # the score is all bias
                bias_HTS=scores_BHTS.to(v_BKSD.dtype), segments=context.segments, attn_mask=attn_mask,
            )  # fmt: skip
            return y, weights if need_weights else None
        q_BHTE, k_BKSE = fast.products(
            q_BHTE, k_BKSE, key_term_BKS, tau_H11,
            bias_factors=encoding.bias_factors(q_BHTE) if causal else None,
        )  # fmt: skip
        y = sdpa.attention(
            q_BHTE, k_BKSE, v_BKSD, scale=1.0, causal=causal, bias_rows=None if causal else encoding.bias,
            segments=context.segments, attn_mask=attn_mask, dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return y, None
