"""Rotary position embedding (Su et al. 2021; documents 001 and 002).

Pair n of a head's D dimensions is turned by the angle p·θ_n, θ_n = base^(−2n/D), so that q_i·k_j depends on i − j
alone.
`pairing="half"` joins n with n + D/2 (GPT-NeoX, Llama as Hugging Face stores it); `"interleaved"` joins 2n with 2n+1
(GPT-J, Meta's Llama). `partial_rotary_factor` turns only that share of the dimensions, the first ones.

Scalings stretch a trained range, with Hugging Face's parameter names:

* `linear(factor)`: positions divided by the factor (Chen et al. 2023);
* `ntk(factor)`: base · factor^(D/(D−2)), which leaves fast pairs alone (the "NTK-aware" rule, fixed);
* `dynamic(factor)`: the NTK rule by the current length, once past `original_max_position_embeddings`. The base then
  depends on the length of the whole input, so past that length a model is no longer causal to the bit and cached keys
  keep the base they were stored with, in Hugging Face's code as here;
* `yarn(factor, …)`: slow pairs interpolated, fast ones not, a ramp between, and scores sharpened (Peng et al. 2023);
* `llama3(factor, …)`: as Llama 3.1, the ramp set by wavelength;
* `longrope(factor, …)`: each pair's angle divided by a number of its own, from one list up to the trained length and
  from another past it, and scores sharpened (Ding et al. 2024; Phi-3). As with `dynamic`, the whole input decides.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

from headwise.dims import Dims
from headwise.errors import Problem, SpecError, one_of
from headwise.kernels import naive_wanted
from headwise.kernels.rotary import fast, naive
from headwise.position.base import Encoding, Position, PositionSpec
from headwise.registry import ARGS, register_position, validated


class Scaling(BaseModel):
    """Base of the scalings: how the frequencies θ and the size of the rotation change; here, not at all."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    least_dims: ClassVar[int] = 2
    factor: float = Field(gt=0)

    def frequencies(self, theta_N: Tensor, base: float, rotary_dim: int, seq_len: int) -> Tensor:
        """The changed frequencies, from those of the plain rule."""
        return theta_N

    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0

    def check_pairs(self, n_pairs: int) -> list[Problem]:
        """What is wrong with this scaling where so many pairs turn."""
        return []


class LinearScaling(Scaling):
    """Positions divided by `factor`."""

    kind: Literal["linear"] = "linear"

    def frequencies(self, theta_N: Tensor, base: float, rotary_dim: int, seq_len: int) -> Tensor:
        return theta_N / self.factor


class NTKScaling(Scaling):
    """A larger base, fixed."""

    least_dims: ClassVar[int] = 4  # the rule divides by D − 2
    kind: Literal["ntk"] = "ntk"

    def frequencies(self, theta_N: Tensor, base: float, rotary_dim: int, seq_len: int) -> Tensor:
        return _theta(base * self.factor ** (rotary_dim / (rotary_dim - 2)), rotary_dim, theta_N)


class DynamicScaling(Scaling):
    """A larger base once the input is longer than the trained length."""

    least_dims: ClassVar[int] = 4
    kind: Literal["dynamic"] = "dynamic"
    original_max_position_embeddings: int = Field(gt=0)

    def frequencies(self, theta_N: Tensor, base: float, rotary_dim: int, seq_len: int) -> Tensor:
        # A tensor, for a compiled program would hold only for the length that a number comes from.
        length = theta_N.new_full((), max(seq_len, self.original_max_position_embeddings))
        stretch = self.factor * length / self.original_max_position_embeddings - (self.factor - 1)
        return _theta(base * stretch ** (rotary_dim / (rotary_dim - 2)), rotary_dim, theta_N)


class YarnScaling(Scaling):
    """Pairs that turn fewer than `beta_slow` times in the trained length are interpolated, over `beta_fast` times
    not.
    """

    kind: Literal["yarn"] = "yarn"
    original_max_position_embeddings: int = Field(gt=0)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    attention_factor: float | None = Field(None, gt=0)
    mscale: float | None = Field(None, ge=0)
    mscale_all_dim: float | None = Field(None, ge=0)
    truncate: bool = True

    def frequencies(self, theta_N: Tensor, base: float, rotary_dim: int, seq_len: int) -> Tensor:
        def pair_turning(turns: float) -> float:
            length = self.original_max_position_embeddings
            return rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair_turning(self.beta_fast), pair_turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        n = torch.arange(len(theta_N), device=theta_N.device, dtype=theta_N.dtype)
        ramp = ((n - low) / max(high - low, 0.001)).clamp(0, 1)
        return theta_N / self.factor * ramp + theta_N * (1 - ramp)

    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor

        def sharpen(mscale: float) -> float:
            return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.mscale and self.mscale_all_dim:
            return sharpen(self.mscale) / sharpen(self.mscale_all_dim)
        return sharpen(1.0)


class Llama3Scaling(Scaling):
    """Long wavelengths divided by `factor`, short ones kept, a ramp between (Llama 3.1)."""

    kind: Literal["llama3"] = "llama3"
    original_max_position_embeddings: int = Field(gt=0)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            message = f"must be above low_freq_factor={self.low_freq_factor}, not {self.high_freq_factor}"
            raise SpecError([Problem("high_freq_factor", message)])
        return self

    def frequencies(self, theta_N: Tensor, base: float, rotary_dim: int, seq_len: int) -> Tensor:
        turns = self.original_max_position_embeddings * theta_N / (2 * math.pi)
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return theta_N / self.factor * (1 - keep) + theta_N * keep


class LongRopeScaling(Scaling):
    """Each pair's angle divided by its own number: `short_factor` up to the trained length, `long_factor` past it."""

    kind: Literal["longrope"] = "longrope"
    original_max_position_embeddings: int = Field(gt=1)
    short_factor: tuple[Annotated[float, Field(gt=0)], ...]
    long_factor: tuple[Annotated[float, Field(gt=0)], ...]
    attention_factor: float | None = Field(None, gt=0)

    def check_pairs(self, n_pairs: int) -> list[Problem]:
        given = {"short_factor": len(self.short_factor), "long_factor": len(self.long_factor)}
        wrong = [f"{name} has {n}" for name, n in given.items() if n != n_pairs]
        message = f"longrope wants a number for each of the {n_pairs} pairs that turn, but {' and '.join(wrong)}"
        return [Problem("position", message)] if wrong else []

    def frequencies(self, theta_N: Tensor, base: float, rotary_dim: int, seq_len: int) -> Tensor:
        factors = self.long_factor if seq_len > self.original_max_position_embeddings else self.short_factor
        return theta_N / theta_N.new_tensor(factors)

    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + max(0.0, math.log(self.factor)) / math.log(self.original_max_position_embeddings))


AnyScaling = LinearScaling | NTKScaling | DynamicScaling | YarnScaling | Llama3Scaling | LongRopeScaling
SCALINGS: dict[str, type[Scaling]] = {
    "linear": LinearScaling,
    "ntk": NTKScaling,
    "dynamic": DynamicScaling,
    "yarn": YarnScaling,
    "llama3": Llama3Scaling,
    "longrope": LongRopeScaling,
}


def _scaling(value: Any) -> Any:
    """A scaling from its name, a mapping with `kind`, or a call `linear(2)` as the line grammar hands it over."""
    if isinstance(value, str):
        value = {"kind": value}
    if value is None or isinstance(value, Scaling):
        return value
    if not isinstance(value, dict):
        raise SpecError(one_of(value, SCALINGS, "scaling"))
    fields = dict(value)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise SpecError(one_of(kind, SCALINGS, "scaling"))
    args = fields.pop(ARGS, [])
    if len(args) > 1 or (args and "factor" in fields):
        raise SpecError(f"{kind}() takes one value without a name, the factor; write the others as name=value")
    return validated(SCALINGS[kind], {**dict(zip(("factor",), args)), **fields})


class RoPESpec(PositionSpec):
    """Rotary embedding: queries and keys turned by their position (Llama, GPT-NeoX, GPT-J); no length limit."""

    kind: Literal["rope"] = "rope"
    examples: ClassVar[tuple[str, ...]] = (
        "rope",
        "rope(pairing=interleaved, partial_rotary_factor=0.5)",
        "rope(scaling=linear(4))",
        "rope(scaling=ntk(4))",
        "rope(scaling=dynamic(4, original_max_position_embeddings=2048))",
        "rope(scaling=yarn(4, original_max_position_embeddings=64))",
        "rope(scaling=llama3(8, original_max_position_embeddings=64))",
        "rope(scaling=longrope(4, original_max_position_embeddings=2048, short_factor=[1.0, 1.1, 1.3, 1.5], "
        "long_factor=[1.0, 2.0, 3.5, 4.0]))",
    )
    base: float = Field(10000.0, gt=1)
    pairing: Literal["half", "interleaved"] = "half"
    partial_rotary_factor: float = Field(1.0, gt=0, le=1)
    scaling: Annotated[AnyScaling | None, BeforeValidator(_scaling)] = None

    def rotary_dim(self, head_dim: int) -> int:
        """How many of a head's dimensions turn."""
        return int(head_dim * self.partial_rotary_factor)

    def check_head(self, head_dim: int) -> list[Problem]:
        """RoPE turns pairs, so an even number of dimensions must turn."""
        turned = self.rotary_dim(head_dim)
        least = self.scaling.least_dims if self.scaling else 2
        if turned >= least and turned % 2 == 0:
            return self.scaling.check_pairs(turned // 2) if self.scaling else []
        given = f"head_dim={head_dim} with partial_rotary_factor={self.partial_rotary_factor}"
        advice = f"change d_model, n_heads or head_dim to make it even and at least {least}"
        return [Problem("position", f"rope turns pairs of dimensions, but {given} leaves {turned}; {advice}")]


def _theta(base: float | Tensor, rotary_dim: int, like: Tensor) -> Tensor:
    n = torch.arange(0, rotary_dim, 2, device=like.device, dtype=like.dtype)
    # Written as an exponential because the compiler keeps what it makes of one; powers and cosines it computes anew for
    # every head of every layer.
    log_base = base.log() if isinstance(base, Tensor) else math.log(base)
    return torch.exp(n * (-log_base / rotary_dim))


class RoPEEncoding(Encoding):
    """Angles of the pass's new tokens, their cosines and sines: [T,N], or [B,1,T,N] where rows differ."""

    def __init__(self, angles: Tensor, amplitude: float, interleaved: bool) -> None:
        self.angles, self.amplitude, self.interleaved = angles, amplitude, interleaved
        self._tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def rotate(self, x_BHTD: Tensor) -> Tensor:
        if naive_wanted():
            turned = 2 * self.angles.shape[-1]
            scaled = torch.cat([x_BHTD[..., :turned] * self.amplitude, x_BHTD[..., turned:]], -1)
            angles = self.angles.to(torch.promote_types(x_BHTD.dtype, torch.float32))
            return naive.rotate(scaled, angles, interleaved=self.interleaved)
        # In half precision the cosines would blur far positions: turn in float32, round once.
        dtype = torch.promote_types(x_BHTD.dtype, torch.float32)
        cos, sin = self._table(dtype)
        return fast.rotate(x_BHTD.to(dtype), cos, sin, interleaved=self.interleaved).to(x_BHTD.dtype)

    def unrotate(self, x_BHTD: Tensor) -> Tensor:
        """Turned back by the same angles, with the amplitude that scores were sharpened by taken out."""
        return RoPEEncoding(-self.angles, 1 / self.amplitude, self.interleaved).rotate(x_BHTD)

    def _table(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if dtype not in self._tables:
            cos, sin = fast.tables(self.angles, interleaved=self.interleaved)
            self._tables[dtype] = (cos * self.amplitude).to(dtype), (sin * self.amplitude).to(dtype)
        return self._tables[dtype]


@register_position(RoPESpec)
class RoPEPosition(Position):
    """Turns queries and keys. Angles are computed anew for each pass, in float64, so there is no table to outgrow."""

    spec: RoPESpec

    def __init__(self, spec: RoPESpec, dims: Dims) -> None:
        super().__init__(spec, dims)

    def by_length(self, seq_len: int) -> bool:
        scaling = self.spec.scaling
        if isinstance(scaling, DynamicScaling | LongRopeScaling):
            return seq_len > scaling.original_max_position_embeddings
        return False

    def encode(self, positions: Tensor, seq_len: int, head_dim: int) -> RoPEEncoding:
        spec, rotary_dim = self.spec, self.spec.rotary_dim(head_dim)
        exact = torch.float32 if positions.device.type == "mps" else torch.float64
        theta_N = _theta(spec.base, rotary_dim, torch.empty(0, device=positions.device, dtype=exact))
        amplitude = 1.0
        if spec.scaling is not None:
            theta_N = spec.scaling.frequencies(theta_N, spec.base, rotary_dim, seq_len)
            amplitude = spec.scaling.amplitude()
        angles = positions[..., None].to(exact) * theta_N
        if angles.dim() == 3:
            angles = angles[:, None]
        return RoPEEncoding(angles, amplitude, spec.pairing == "interleaved")
