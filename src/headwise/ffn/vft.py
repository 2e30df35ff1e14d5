"""The vein-flow feed-forward and its normal compensation (document 000).

    y = U (W2 σ(W1 V x + b1) + b2) + stabilizer(x)

The vein is r numbers wide, so the first part costs next to nothing and holds little. What keeps the layer useful is the
stabilizer, a direct path beside the vein, and it is counted with it:

* `full`, as published: LayerNorm, then a C×C map. 591,360 of the 597,652 numbers of a layer at C = 768, r = 4.
* `diagonal`: a LayerNorm without numbers of its own, times one learned number a dimension (from 0): C numbers.
* `none`.

**Normal compensation.** With s > 0 the stream x after the layer is corrected along s learned directions, for the tokens
whose input h the vein holds badly, ε = ‖h − UVh‖/‖h‖ > τ (`error="absolute"` leaves the division out, as document 000
does; after a norm that ε is about √C·ε and always over τ):

    x + g(ε) Σ_s α_s (v_s·x) u_s,   α = alpha_scale · sigmoid(gate(LN x))

`gate="hard"`: g = 1[ε > τ], as published; no gradient flows through ε. `"soft"`: g = sigmoid((ε − τ)/temperature), and
the vein learns from it. Where few tokens are over τ, only they are computed.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from headwise.dims import Dims
from headwise.errors import Problem, SpecError, short
from headwise.ffn.base import ACTIVATIONS
from headwise.kernels import naive_wanted
from headwise.linear import Linear
from headwise.registry import ComponentSpec, register_ffn
from headwise.start import (
    Start,
    by_activity,
    fill,
    least_squares,
    lift,
    neurons,
    outputs,
    reduced_rank,
    vein_basis,
)
from headwise.vein import VeinInnerMap, VeinProjector, rank_problems

FEW = 0.25  # up to this share of the tokens, picking them out costs less than correcting all

Gate = Literal["hard", "soft"]


class VFTSpec(ComponentSpec):
    """A feed-forward inside a low-rank vein of `rank` numbers, with a stabilizer beside it (document 000).

    `r_hidden` is the hidden width in the vein (None: 4·rank), `s_normals` the directions of the normal compensation,
    of which `tau`, `alpha_scale`, `gate`, `temperature` and `error` speak. `implementation`, `init_method` and
    `tied_start` are the projector's.
    """

    kind: Literal["vft"] = "vft"
    positional: ClassVar[tuple[str, ...]] = ("rank",)
    examples: ClassVar[tuple[str, ...]] = (
        "vft(rank=4)",
        "vft(rank=6, stabilizer=diagonal, s_normals=2, tau=0.9, bias=false)",
        "vft(rank=12, stabilizer=none, s_normals=1, gate=soft, tau=0.8, activation=gelu)",
    )
    rank: int = Field(16, gt=0)
    r_hidden: int | None = Field(None, gt=0)
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "relu2"] = "silu"
    bias: bool = True
    stabilizer: Literal["full", "diagonal", "none"] = "full"
    s_normals: int = Field(0, ge=0)
    tau: float = Field(0.18, ge=0)
    alpha_scale: float = 0.5
    gate: Gate = "hard"
    temperature: float = Field(0.05, gt=0)
    error: Literal["relative", "absolute"] = "relative"
    implementation: Literal["linear", "parameter"] = "linear"
    init_method: Literal["orthogonal", "normal", "xavier"] = "orthogonal"
    tied_start: bool = True

    def hidden(self) -> int:
        """The hidden width in the vein."""
        return self.r_hidden or 4 * self.rank

    def check(self, dims: Dims) -> list[Problem]:
        return rank_problems(self.rank, dims.d_model)

    def param_count(self, dims: Dims) -> int:
        C, r, hidden = dims.d_model, self.rank, self.hidden()
        inner = 2 * r * hidden + (hidden + r if self.bias else 0)
        stabilizer = {"full": C * C + 2 * C, "diagonal": C, "none": 0}[self.stabilizer]
        return 2 * C * r + inner + stabilizer + self.s_normals * (3 * C + 1)

    def flops_per_token(self, dims: Dims, context: int, *, causal: bool) -> float:
        """With a compensation, of every token: how many are over τ is not known beforehand."""
        C, r, s = dims.d_model, self.rank, self.s_normals
        stabilizer = C * C if self.stabilizer == "full" else 0
        compensation = 2 * C * r + 3 * C * s if s else 0
        return 2 * (2 * C * r + 2 * r * self.hidden() + stabilizer + compensation)


class FullStabilizer(nn.Module):
    """LayerNorm, then a C×C map without bias (document 000)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.w_out = Linear(d_model, d_model, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.w_out(self.norm(x_BTC))


class DiagonalStabilizer(nn.Module):
    """A LayerNorm without numbers of its own, times a learned number a dimension, which starts at 0."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model))

    def forward(self, x_BTC: Tensor) -> Tensor:
        return F.layer_norm(x_BTC, self.weight.shape) * self.weight


class NormalCompensator(nn.Module):
    """x + g(ε) Σ_s α_s (v_s·x) u_s for the tokens off the vein (document 000); s·(3·C + 1) numbers.

    Args:
        d_model: C.
        s: directions; 0 is the identity.
        tau: the threshold τ of ε. It may be changed at any time.
        alpha_scale: the largest α.
        gate: `hard` or `soft`, see the module's page.
        temperature: width of the soft gate.

    Raises:
        SpecError: a negative s, τ or temperature, or an unknown gate.
    """

    def __init__(
        self,
        d_model: int,
        s: int = 1,
        tau: float = 0.18,
        alpha_scale: float = 0.5,
        gate: Gate = "hard",
        temperature: float = 0.05,
    ) -> None:
        super().__init__()
        problems = [
            Problem(name, f"{short(value)} given; {wanted}")
            for name, value, fits, wanted in (
                ("s", s, s >= 0, "0 or more directions are wanted"),
                ("tau", tau, tau >= 0, "an error is never below 0"),
                ("temperature", temperature, temperature > 0, "more than 0 is wanted"),
                ("gate", gate, gate in get_args(Gate), f"allowed: {', '.join(get_args(Gate))}"),
            )
            if not fits
        ]
        if problems:
            raise SpecError(problems, where="normal compensator")
        self.s, self.tau, self.alpha_scale, self.soft, self.temperature = (
            s,
            tau,
            alpha_scale,
            gate == "soft",
            temperature,
        )
        if s:
            self.u_sC, self.v_sC = nn.Parameter(torch.empty(s, d_model)), nn.Parameter(torch.empty(s, d_model))
            self.gate = Linear(d_model, s)
            if not self.u_sC.is_meta:
                self.initialise(None)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None) -> None:
        """Directions of length about 1; None draws from torch's global generator."""
        for directions in (self.u_sC, self.v_sC) if self.s else ():
            directions.copy_(torch.randn(directions.shape, generator=generator) / directions.shape[1] ** 0.5)

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        """x [..., C] corrected where ε [...] asks for it."""
        if not self.s:
            return x
        if self.soft:
            weight = torch.sigmoid((eps - self.tau) / self.temperature)
            return x + (weight[..., None] * self.correction(x)).to(x.dtype)
        over = eps > self.tau
        # How many are over τ is known only by looking: a compiled graph cannot, and a GPU would have to be waited for.
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not naive_wanted():
            index = over.flatten().nonzero().squeeze(-1)
            if len(index) <= FEW * over.numel():
                flat = x.flatten(0, -2)
                return flat.index_add(0, index, self.correction(flat[index]).to(x.dtype)).view_as(x)
        return torch.where(over[..., None], x + self.correction(x).to(x.dtype), x)

    def correction(self, x: Tensor) -> Tensor:
        """Σ_s α_s (v_s·x) u_s of every vector of x, [..., C]."""
        alpha = self.alpha_scale * torch.sigmoid(self.gate(F.layer_norm(x, x.shape[-1:])))
        return F.linear(alpha * F.linear(x, self.v_sC), self.u_sC.T)


def eps_metrics(eps: Tensor, tau: float) -> dict[str, Tensor]:
    """What is worth knowing of a batch's ε: mean, largest, and the share over τ, each a 0-d tensor without gradient."""
    eps = eps.detach()
    return {"eps_mean": eps.mean(), "eps_max": eps.max(), "eps_frac_over_tau": (eps > tau).float().mean()}


@register_ffn(VFTSpec)
class VFT(nn.Module):
    """Vein, two maps inside it, stabilizer, compensator.

    Attributes:
        metrics: in training, `eps_mean`, `eps_max` and `eps_frac_over_tau` of the last pass, 0-d tensors.
    """

    def __init__(self, spec: VFTSpec, dims: Dims) -> None:
        super().__init__()
        self.spec = spec
        self.activation = ACTIVATIONS[spec.activation]
        self.vein = VeinProjector(dims.d_model, spec.rank, spec.implementation, spec.init_method, spec.tied_start)
        self.w_in = VeinInnerMap(spec.rank, spec.hidden(), spec.bias, gain=1.0)
        self.w_out = VeinInnerMap(spec.hidden(), spec.rank, spec.bias)
        self.stabilizer: nn.Module | None = None
        if spec.stabilizer != "none":
            kinds = {"full": FullStabilizer, "diagonal": DiagonalStabilizer}
            self.stabilizer = kinds[spec.stabilizer](dims.d_model)
        self.compensator = NormalCompensator(
            dims.d_model, spec.s_normals, spec.tau, spec.alpha_scale, spec.gate, spec.temperature
        )
        self.dropout = dims.dropout
        self.metrics: dict[str, Tensor] = {}

    def forward(self, x_BTC: Tensor) -> Tensor:
        z_BTr = self.w_out(self.activation(self.w_in(self.vein.project(x_BTC))))
        y_BTC = self.vein.reconstruct(z_BTr)
        if self.stabilizer is not None:
            y_BTC = y_BTC + self.stabilizer(x_BTC)
        return F.dropout(y_BTC, self.dropout, self.training) if self.dropout else y_BTC

    def eps(self, h_BTC: Tensor) -> Tensor:
        """ε of every token of the layer's input, [B,T]; with a gradient only where the gate is soft."""
        if self.spec.s_normals and self.spec.gate == "soft":
            return self.vein.compute_reconstruction_error(h_BTC, self.spec.error == "relative")
        with torch.no_grad():
            return self.vein.compute_reconstruction_error(h_BTC, self.spec.error == "relative")

    def finish(self, x_BTC: Tensor, h_BTC: Tensor) -> Tensor:
        """The stream x after this layer, h its input: measured in training, compensated where there is an s."""
        if not self.training and not self.spec.s_normals:
            return x_BTC
        eps_BT = self.eps(h_BTC)
        if self.training:
            self.metrics = eps_metrics(eps_BT, self.compensator.tau)
        return self.compensator(x_BTC, eps_BT)

    def start_from(self, old: nn.Module, start: Start) -> str:
        """V: the directions of the input that matter most to the old outputs. Inside, the old neurons that are most
        active, as far as the vein shows them. Then, by least squares on the inputs at hand, in turns: the stabilizer,
        and U with the second map, of the best rank r. The compensation begins as nothing.

        U and V come from outputs and inputs, so UV is no projection at this start.
        """
        x_NC, rank = start.inputs_NC, self.spec.rank
        wanted_NC = outputs(old, x_NC).double()
        v_rC, maps = vein_basis(old, start, rank), neurons(old)
        self.vein.v_rC.copy_(v_rC)
        if maps:
            share = self.w_in.out_features // len(maps)
            for n, wide in enumerate(maps):
                chosen = by_activity(old, x_NC)[:share]
                rows = slice(n * share, n * share + len(chosen))
                self.w_in.weight[rows] = lift(wide.weight[chosen], v_rC, start).to(self.w_in.weight)
                if self.w_in.bias is not None and wide.bias is not None:
                    self.w_in.bias[rows] = wide.bias[chosen]
        h_NF = self.activation(self.w_in(self.vein.project(x_NC)))
        beside_NC = torch.zeros_like(wanted_NC)
        for _ in range(4 if self.stabilizer is not None else 1):
            u_Cr, inner, bias = reduced_rank(h_NF, wanted_NC - beside_NC, rank, self.w_out.bias is not None)
            self.vein.u_Cr.copy_(u_Cr)
            fill(self.w_out, inner, bias)
            left_NC = wanted_NC - self.vein.reconstruct(self.w_out(h_NF)).double()
            if isinstance(self.stabilizer, FullStabilizer):
                fill(self.stabilizer.w_out, least_squares(self.stabilizer.norm(x_NC), left_NC, False)[0])
            elif isinstance(self.stabilizer, DiagonalStabilizer):
                normed_NC = F.layer_norm(x_NC, x_NC.shape[-1:]).double()
                self.stabilizer.weight.copy_((normed_NC * left_NC).sum(0) / normed_NC.square().sum(0).clamp_min(1e-12))
            if self.stabilizer is not None:
                beside_NC = self.stabilizer(x_NC).double()
        if self.compensator.s:
            self.compensator.u_sC.zero_()
        return "its active subspace, output maps fitted"
