"""Sinusoidal positions (Vaswani et al. 2017; document 001): fixed waves of geometrically growing length.

Dimension 2i of position p holds sin(p / base^(2i/C)), dimension 2i+1 the cosine of the same angle.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from headwise.position.base import Position, PositionSpec
from headwise.registry import register_position


class SinusoidalSpec(PositionSpec):
    """Fixed sines and cosines added to the token embeddings (2017 Transformer); no length limit."""

    kind: Literal["sinusoidal"] = "sinusoidal"
    embeds: ClassVar[bool] = True
    base: float = Field(10000.0, gt=1)


@register_position(SinusoidalSpec)
class SinusoidalPosition(Position):
    """x_p + waves(p), computed on the fly for any position."""

    def embed(self, x_BTC: Tensor, positions: Tensor) -> Tensor:
        return x_BTC + sinusoids(positions, x_BTC.shape[-1], self.spec.base).to(x_BTC.dtype)  # type: ignore[attr-defined]


def sinusoids(positions: Tensor, width: int, base: float) -> Tensor:
    """The waves at `positions` (any shape, int64): float32 [..., width]."""
    even = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * base ** (-even / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :width]
