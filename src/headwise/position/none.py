"""No position code (NoPE): a causal model can tell order from the mask alone (Kazemnejad et al. 2023)."""

from __future__ import annotations

from typing import Literal

from headwise.position.base import Position, PositionSpec
from headwise.registry import register_position


class NoPositionSpec(PositionSpec):
    """No position code at all (NoPE)."""

    kind: Literal["none"] = "none"


@register_position(NoPositionSpec)
class NoPosition(Position):
    """Adds nothing anywhere."""
