"""Several linear maps of one input."""

from __future__ import annotations

from torch import Tensor, nn


def products(x: Tensor, *maps: nn.Module) -> tuple[Tensor, ...]:
    """What each of the maps makes of x; by one product where their weights were laid together.

    The first map's `joint`, where it has one, says with which maps that is (its `maps`) and computes all of them.
    """
    joint = maps[0].__dict__.get("joint")
    if joint is not None and joint.maps == maps:
        results: tuple[Tensor, ...] = joint(x)
        return results
    return tuple(each(x) for each in maps)
