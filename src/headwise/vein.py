"""The vein: the low-rank subspace that vein-flow attention and feed-forwards share (document 000).

A projector is two maps without bias, V: C → r ("project") and U: r → C ("reconstruct"). What the subspace loses of a
vector is its reconstruction error

    ε_abs = ‖x − U V x‖        (the document's formula)
    ε     = ‖x − U V x‖ / ‖x‖  (relative, the default)

After a LayerNorm ‖x‖ is about √C (27.7 at C = 768), so an absolute ε never falls under a threshold such as 0.18; the
relative one lies in [0, 1] where UV is an orthogonal projection.

Drawn independently, V and U make VU ≈ 0, and UV is no projection at all. So by default the start is tied: V = Uᵀ, with
orthonormal columns in U where `init_method` is orthogonal. Training then moves the two apart.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headwise.errors import Problem, SpecError, short
from headwise.linear import Linear

Implementation = Literal["linear", "parameter"]
InitMethod = Literal["orthogonal", "normal", "xavier"]


class VeinMap(Linear):
    """One of the projector's two maps. Its values are the projector's business, not the model's scheme."""

    def initialise(self, generator: torch.Generator | None) -> None:
        """Nothing: the projector above fills both maps together."""


class VeinInnerMap(Linear):
    """A map between vectors that are in the vein already: a few numbers wide, so that a scheme made for wide matrices
    (std 0.02) would let almost nothing through. Starts at N(0, gain²/in), biases at 0.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *, gain: float = 0.5) -> None:
        self.gain = gain
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """As `initialise`, from torch's global generator."""
        if not self.weight.is_meta:
            self.initialise(None)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None) -> None:
        """Fill the map; None draws from torch's global generator."""
        std = self.gain / math.sqrt(self.in_features)
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * std)
        if self.bias is not None:
            self.bias.zero_()


class VeinProjector(nn.Module):
    """V: C → r and U: r → C without bias, 2·C·r numbers (document 000).

    Args:
        d_model: the width C that is projected: a model's, or one head's.
        rank: r, 1 ≤ r < d_model.
        implementation: `linear` keeps the maps as nn.Linear (names `V.weight`, `U.weight`), `parameter` as bare
            parameters (`V`, `U`). The numbers and the arithmetic are the same.
        init_method: `orthogonal` (orthonormal rows of V and columns of U), `normal` (N(0, 1/C), nearly so where r ≪ C)
            or `xavier` (uniform in ±√(6/(C+r))).
        tied_start: start from V = Uᵀ, so that UV is (with `orthogonal`, exactly) an orthogonal projection. False draws
            the two independently, as document 000 does.

    Raises:
        SpecError: a rank that is not below the width, or an unknown name.
    """

    def __init__(
        self,
        d_model: int,
        rank: int,
        implementation: Implementation = "linear",
        init_method: InitMethod = "orthogonal",
        tied_start: bool = True,
    ) -> None:
        super().__init__()
        problems = rank_problems(rank, d_model)
        for name, value, allowed in (
            ("implementation", implementation, get_args(Implementation)),
            ("init_method", init_method, get_args(InitMethod)),
        ):
            if value not in allowed:
                problems.append(Problem(name, f"{short(value)} given; allowed: {', '.join(allowed)}"))
        if problems:
            raise SpecError(problems, where="vein projector")
        self.d_model, self.rank = d_model, rank
        self.implementation, self.init_method, self.tied_start = implementation, init_method, tied_start
        self.V: nn.Linear | nn.Parameter
        self.U: nn.Linear | nn.Parameter
        if implementation == "linear":
            self.V, self.U = VeinMap(d_model, rank, bias=False), VeinMap(rank, d_model, bias=False)
        else:
            self.V, self.U = nn.Parameter(torch.empty(rank, d_model)), nn.Parameter(torch.empty(d_model, rank))
        if not self.v_rC.is_meta:
            self.initialise(None)

    @property
    def v_rC(self) -> Tensor:
        """The matrix of V, [r,C]."""
        return self.V.weight if isinstance(self.V, nn.Linear) else self.V

    @property
    def u_Cr(self) -> Tensor:
        """The matrix of U, [C,r]."""
        return self.U.weight if isinstance(self.U, nn.Linear) else self.U

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None) -> None:
        """Fill both maps by `init_method`; None draws from torch's global generator."""
        u_Cr = self._draw(generator)
        self.u_Cr.copy_(u_Cr)
        self.v_rC.copy_((u_Cr if self.tied_start else self._draw(generator)).T)

    def _draw(self, generator: torch.Generator | None) -> Tensor:
        """A float32 [C,r] on the CPU, so that the values do not depend on the device."""
        shape = (self.d_model, self.rank)
        if self.init_method == "xavier":
            bound = math.sqrt(6 / sum(shape))
            return torch.rand(shape, generator=generator) * 2 * bound - bound
        normal_Cr = torch.randn(shape, generator=generator)
        if self.init_method == "normal":
            return normal_Cr / math.sqrt(self.d_model)
        q_Cr, upper_rr = torch.linalg.qr(normal_Cr)
        return q_Cr * upper_rr.diagonal().sign()  # QR leaves the signs open: fixed so, the draw is uniform (Haar)

    def project(self, x: Tensor) -> Tensor:
        """Into the vein: [..., C] → [..., r]."""
        return F.linear(x, self.v_rC)

    def reconstruct(self, z: Tensor) -> Tensor:
        """Back to the full width: [..., r] → [..., C]."""
        return F.linear(z, self.u_Cr)

    def forward(self, x: Tensor) -> Tensor:
        """What the vein keeps of x: U V x, [..., C]."""
        return self.reconstruct(self.project(x))

    def compute_reconstruction_error(self, x: Tensor, relative: bool = True) -> Tensor:
        """ε of every token: [..., C] → [...], float32 or wider.

        Args:
            x: vectors in any floating dtype.
            relative: ‖x − UVx‖/‖x‖ (0 where x = 0), what a threshold τ is meant for; False gives ‖x − UVx‖.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        x, lost = x.to(wide), (x - self(x)).to(wide)
        error = torch.linalg.vector_norm(lost, dim=-1)
        if not relative:
            return error
        return error / torch.linalg.vector_norm(x, dim=-1).clamp_min(torch.finfo(wide).tiny)

    def get_compression_ratio(self) -> float:
        """How many times fewer numbers V and U hold than a C×C map: C/(2r), 96 at 768/4 (document 000 prints ~147)."""
        return self.d_model / (2 * self.rank)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, rank={self.rank}, init_method={self.init_method}, tied_start={self.tied_start}"


VeinSubspaceShared = VeinProjector


def rank_problems(rank: int, width: int, field: str = "rank", what: str = "d_model") -> list[Problem]:
    """What is wrong with a vein of `rank` in vectors of `width`; empty where nothing is."""
    if isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank < width:
        return []
    return [
        Problem(field, f"{short(rank)} given, but a vein is narrower than {what}={width}; allowed: 1 to {width - 1}")
    ]


def recommend_rank(d_model: int) -> int:
    """Document 000's rule of thumb ⌊√d_model/4⌋, between 2 and 32: 6 at 768 (its comment prints 4), 11 at 2048.

    Raises:
        SpecError: a width below 3, which has no room for a vein of rank 2.
    """
    if not isinstance(d_model, int) or d_model < 3:
        raise SpecError([Problem("d_model", f"a width of at least 3 is wanted, not {short(d_model)}")])
    return max(2, min(32, math.isqrt(d_model) // 4))


def vein_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of every projector inside `model`, by name, each once; a folded model has none."""
    inside = {id(p) for module in model.modules() if isinstance(module, VeinProjector) for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in inside}
