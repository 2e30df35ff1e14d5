"""Mixture of experts (Shazeer et al. 2017, arXiv:1701.06538; Mixtral, arXiv:2401.04088; DeepSeekMoE,
arXiv:2401.06066): a router sends every token to k of E feed-forwards.

    p = softmax(W_r x)               float32, over the E experts
    S = the k experts of largest p   g_e = p_e, or p_e / Σ_{S} p with `norm_topk_prob`
    y = Σ_{e∈S} g_e · expert_e(x) + shared(x)

DeepSeek-V3 (arXiv:2412.19437) changes the choice. With `scoring="sigmoid"` p = σ(W_r x), each expert by itself. With
`correction_bias` b, S is taken by p + b, while g keeps p alone. With `n_groups` experts stand in groups side by side,
and S is taken from the `topk_groups` whose two largest p + b have the largest sum. `routed_scaling_factor` scales g.

While training, two terms are added to the loss (`aux_loss`). The load balance of Switch and Mixtral is

    aux_loss_coef · E · Σ_e f_e P_e,   f_e = choices of e a token, P_e = mean p_e

which is at least about k, reached where all experts are chosen equally often; of sigmoids, P_e is the mean of
p_e / Σ p. The correction bias is loaded and kept, never trained. The router's z-loss
(ST-MoE, arXiv:2202.08906), z_loss_coef · mean (log Σ_e exp (W_r x)_e)², keeps its scores small.

With `rank`, the experts live in a vein (document 000): z = V x once, experts r → d_ff → r, U back once. The router
reads x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from headwise.dims import Dims
from headwise.errors import Problem
from headwise.ffn.base import ACTIVATIONS, FFNSpec
from headwise.kernels import naive_wanted
from headwise.kernels.grouped import fast, naive
from headwise.kernels.together import products
from headwise.linear import Linear
from headwise.registry import register_ffn
from headwise.start import (
    Start,
    by_activity,
    fill,
    hidden,
    lift,
    neurons,
    outputs,
    reduced_rank,
    start_ffn,
    vein_basis,
)
from headwise.vein import VeinProjector, rank_problems


class MoESpec(FFNSpec):
    """Mixture of experts: `top_k` of `n_experts` feed-forwards a token, and shared ones that all tokens use.

    `d_ff` is the hidden width of one expert: by default a dense layer's (8·d_model/3 gated, 4·d_model not), 4·rank in a
    vein. That of a shared one is `shared_d_ff`, by default the same.
    """

    kind: Literal["moe"] = "moe"
    positional: ClassVar[tuple[str, ...]] = ("n_experts", "top_k")
    examples: ClassVar[tuple[str, ...]] = (
        "moe(4, 2, d_ff=24)",
        'moe(5, 2, n_shared_experts=2, d_ff=17, gated=False, activation="gelu", bias=True, norm_topk_prob=False)',
        "moe(6, 2, rank=8, n_shared_experts=1, shared_d_ff=20, scoring=sigmoid, correction_bias=true, n_groups=3, "
        "topk_groups=2, routed_scaling_factor=2.5)",
    )
    n_experts: int = Field(8, ge=1)
    top_k: int = Field(2, ge=1)
    n_shared_experts: int = Field(0, ge=0)
    gated: bool = True
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "relu2"] = "silu"
    shared_d_ff: int | None = Field(None, gt=0)
    norm_topk_prob: bool = True
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    correction_bias: bool = False
    n_groups: int = Field(1, ge=1)
    topk_groups: int = Field(1, ge=1)
    routed_scaling_factor: float = Field(1.0, gt=0)
    aux_loss_coef: float = Field(0.01, ge=0)
    z_loss_coef: float = Field(0.001, ge=0)
    rank: int | None = Field(None, ge=1)

    def default_width(self, dims: Dims) -> int:
        if self.rank is not None:
            return 4 * self.rank
        return -(-8 * dims.d_model // 24) * 8 if self.gated else 4 * dims.d_model

    def shared_width(self, dims: Dims) -> int:
        """The hidden width of all shared experts together."""
        return self.n_shared_experts * (self.shared_d_ff or self.width(dims))

    def check(self, dims: Dims) -> list[Problem]:
        problems = [] if self.rank is None else rank_problems(self.rank, dims.d_model)
        within, which = self.n_experts, f"n_experts={self.n_experts}"
        if self.n_experts % self.n_groups:
            problems.append(Problem("n_groups", f"{self.n_groups} given, but {which} do not divide by it"))
        elif self.topk_groups > self.n_groups:
            message = f"{self.topk_groups} given, but there are n_groups={self.n_groups}; choose at most that"
            problems.append(Problem("topk_groups", message))
        elif self.topk_groups < self.n_groups:
            within = self.topk_groups * self.n_experts // self.n_groups
            which = f"{within} experts in topk_groups={self.topk_groups}"
        if self.top_k > within:
            problems.append(Problem("top_k", f"{self.top_k} given, but there are {which}; choose at most that"))
        return problems

    def _expert(self, dims: Dims, d_ff: int) -> tuple[int, int]:
        """(weights, biases) of one expert of width d_ff."""
        C = self.rank or dims.d_model
        maps_in = 1 + self.gated
        return (maps_in + 1) * C * d_ff, (maps_in * d_ff + C if self.has_bias(dims) else 0)

    def _params(self, dims: Dims, n_experts: int) -> int:
        width = self.width(dims)
        around = dims.d_model * self.n_experts + 2 * dims.d_model * (self.rank or 0)
        shared = sum(self._expert(dims, self.shared_width(dims))) if self.n_shared_experts else 0
        return around + shared + n_experts * sum(self._expert(dims, width))

    def param_count(self, dims: Dims) -> int:
        return self._params(dims, self.n_experts)

    def active_param_count(self, dims: Dims) -> int:
        """Parameters that one token meets: the router, its `top_k` experts, the shared ones, the vein."""
        return self._params(dims, self.top_k)

    def flops_per_token(self, dims: Dims, context: int, *, causal: bool) -> float:
        weights, _ = self._expert(dims, self.top_k * self.width(dims) + self.shared_width(dims))
        return 2 * (weights + dims.d_model * self.n_experts + 2 * dims.d_model * (self.rank or 0))


class Expert(nn.Module):
    """One feed-forward: W_out(σ(W_gate x) ⊙ W_up x), or W_out σ(W_up x) without a gate."""

    side_by_side: ClassVar[tuple[str, ...]] = ("w_gate", "w_up")  # maps of one input

    def __init__(self, spec: MoESpec, d_model: int, d_ff: int, bias: bool) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.w_gate = Linear(d_model, d_ff, bias=bias) if spec.gated else None
        self.w_up = Linear(d_model, d_ff, bias=bias)
        self.w_out = Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.w_gate is None:
            return self.w_out(self.activation(self.w_up(x)))
        gate, up = products(x, self.w_gate, self.w_up)
        return self.w_out(self.activation(gate) * up)


@register_ffn(MoESpec)
class MoE(nn.Module):
    """`router`: C → E; `experts`; `shared`: the shared experts side by side, as one of their widths together.

    `correction_bias` [E], a buffer, starts at 0 and stays in float32 whatever the parameters are cast to.
    """

    correction_bias: Tensor | None

    read_as_matrices: ClassVar[tuple[str, ...]] = ("router",)  # not only applied, so never quantised

    def __init__(self, spec: MoESpec, dims: Dims) -> None:
        super().__init__()
        self.spec = spec
        C, width, bias = spec.rank or dims.d_model, spec.width(dims), spec.has_bias(dims)
        self.router = Linear(dims.d_model, spec.n_experts, bias=False)
        self.experts = nn.ModuleList(Expert(spec, C, width, bias) for _ in range(spec.n_experts))
        self.shared = Expert(spec, C, spec.shared_width(dims), bias) if spec.n_shared_experts else None
        self.register_buffer("correction_bias", torch.zeros(spec.n_experts) if spec.correction_bias else None)
        self.vein = None if spec.rank is None else VeinProjector(dims.d_model, spec.rank)
        self.dropout = dims.dropout
        self.aux_loss: Tensor | None = None
        self.metrics: dict[str, Tensor] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        exact = self.correction_bias
        super()._apply(fn, recurse)
        moved = self.correction_bias
        if exact is not None and moved is not None and moved.dtype != exact.dtype:
            self.correction_bias = exact.to(moved.device)  # rounded, it would choose other experts
        return self

    def forward(self, x_BTC: Tensor) -> Tensor:
        index_Nk, weights_Nk = self.route(x_BTC.flatten(0, -2))
        z_BTC = x_BTC if self.vein is None else self.vein.project(x_BTC)
        z_NC, experts = z_BTC.flatten(0, -2), list(self.experts)
        if naive_wanted():
            outputs_ENC = torch.stack([expert(z_NC) for expert in experts])
            y_NC = naive.mixture(outputs_ENC, index_Nk, weights_Nk.to(z_NC.dtype))
        else:
            y_NC = fast.mixture(z_NC, index_Nk, weights_Nk, experts, self._all_experts)
        y_BTC = y_NC.view_as(z_BTC)
        if self.shared is not None:
            y_BTC = y_BTC + self.shared(z_BTC)
        if self.vein is not None:
            y_BTC = self.vein.reconstruct(y_BTC)
        return F.dropout(y_BTC, self.dropout, self.training) if self.dropout else y_BTC

    def route(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of every token, int64 [N,k], and their weights [N,k], in float32 or wider.

        While training it also leaves `aux_loss`, and `metrics` that stand until the next training pass. `load_max` is
        the largest expert's share over the mean one (1: balanced), `router_entropy` the mean entropy of p in nats
        (log E: undecided).
        """
        # Half precision would turn near ties of the scores into ties.
        wide = torch.promote_types(x_NC.dtype, torch.float32)
        with torch.autocast(x_NC.device.type, enabled=False):
            scores_NE = F.linear(x_NC.to(wide), self.router.weight.to(wide))
        probs_NE = scores_NE.softmax(-1) if self.spec.scoring == "softmax" else scores_NE.sigmoid()
        index_Nk = self._choice(probs_NE.detach())
        weights_Nk = probs_NE.gather(-1, index_Nk)
        self.aux_loss = None
        if self.training:
            if self.spec.scoring == "sigmoid":
                probs_NE = probs_NE / (probs_NE.sum(-1, keepdim=True) + 1e-20)
            self.aux_loss = self._balance(probs_NE, index_Nk) + self._z_loss(scores_NE)
        if self.spec.norm_topk_prob:
            weights_Nk = weights_Nk / (weights_Nk.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be 0
        return index_Nk, weights_Nk * self.spec.routed_scaling_factor

    def _choice(self, probs_NE: Tensor) -> Tensor:
        """The experts of every token, int64 [N,k]: those of largest p + b within the best groups."""
        by_NE = probs_NE if self.correction_bias is None else probs_NE + self.correction_bias
        if self.spec.topk_groups < self.spec.n_groups:
            by_NGe = by_NE.unflatten(-1, (self.spec.n_groups, -1))
            best_NG2 = by_NGe.topk(min(2, by_NGe.shape[-1]), dim=-1).values
            chosen_Ng = best_NG2.sum(-1).topk(self.spec.topk_groups, dim=-1).indices
            left_out_NG = torch.ones_like(by_NGe[..., 0], dtype=torch.bool).scatter(-1, chosen_Ng, False)
            by_NE = by_NGe.masked_fill(left_out_NG[..., None], -torch.inf).flatten(-2)
        return by_NE.topk(self.spec.top_k, dim=-1).indices

    def _balance(self, probs_NE: Tensor, index_Nk: Tensor) -> Tensor:
        N, E = probs_NE.shape
        chosen_E = (index_Nk.flatten()[:, None] == torch.arange(E, device=index_Nk.device)).sum(0)
        share_E = chosen_E.to(probs_NE.dtype) / N
        with torch.no_grad():
            entropy = -torch.special.xlogy(probs_NE, probs_NE).sum(-1).mean()
            self.metrics = {"load_max": share_E.max() * E / self.spec.top_k, "router_entropy": entropy}
        return self.spec.aux_loss_coef * E * (share_E * probs_NE.mean(0)).sum()

    def _z_loss(self, scores_NE: Tensor) -> Tensor:
        return self.spec.z_loss_coef * scores_NE.logsumexp(-1).square().mean()

    def start_from(self, old: nn.Module, start: Start) -> str | None:
        """Sparse upcycling (Komatsuzaki et al. 2022): every expert begins as a copy of the dense feed-forward, shared
        ones as what is silent. With `norm_topk_prob` the layer then computes what the old one did; without, its size is
        put right on average.
        """
        if isinstance(old, MoE) or not neurons(old):
            return None
        first, x_NC = self.experts[0], start.inputs_NC
        assert isinstance(first, Expert)
        if self.vein is None:
            how = start_ffn(first, old, start)
        else:
            how = self._start_in_the_vein(first, old, start)
        if not self.spec.norm_topk_prob or self.spec.routed_scaling_factor != 1:
            size = self.route(x_NC)[1].sum(-1).mean()
            for tensor in first.w_out.parameters():
                tensor.div_(size.to(tensor))
        for expert in self.experts:
            expert.load_state_dict(first.state_dict())
        if self.shared is not None:
            fill(self.shared.w_out, torch.zeros_like(self.shared.w_out.weight))
        return f"in every expert {how}"

    def _start_in_the_vein(self, first: Expert, old: nn.Module, start: Start) -> str:
        assert self.vein is not None
        assert self.spec.rank is not None
        x_NC = start.inputs_NC
        v_rC, order = vein_basis(old, start, self.spec.rank), by_activity(old, x_NC)
        maps = neurons(old)
        for new, wide in zip([m for m in (first.w_gate, first.w_up) if m is not None], [maps[0], maps[-1]]):
            chosen = order[: new.out_features]
            new.weight[: len(chosen)] = lift(wide.weight[chosen], v_rC, start).to(new.weight)
        self.vein.v_rC.copy_(v_rC)
        wanted_NC, h_NF = outputs(old, x_NC), hidden(first, self.vein.project(x_NC))
        u_Cr, inner, bias = reduced_rank(h_NF, wanted_NC, self.spec.rank, first.w_out.bias is not None)
        self.vein.u_Cr.copy_(u_Cr)
        fill(first.w_out, inner, bias)
        return "its neurons in the vein, output map fitted"

    def _all_experts(self, rows_MC: Tensor, expert_M: Tensor, counts_E: Tensor) -> Tensor:
        """The experts as products of sorted rows with stacked matrices, for a traced graph."""

        def linear(x: Tensor, name: str) -> Tensor:
            maps = [getattr(expert, name) for expert in self.experts]
            y = fast.grouped_linear(x, [w.weight for w in maps], counts_E)
            if maps[0].bias is None:
                return y
            return y + torch.stack([w.bias for w in maps]).index_select(0, expert_M).to(y.dtype)

        up = linear(rows_MC, "w_up")
        activation = ACTIVATIONS[self.spec.activation]
        return linear(activation(linear(rows_MC, "w_gate")) * up if self.spec.gated else activation(up), "w_out")
