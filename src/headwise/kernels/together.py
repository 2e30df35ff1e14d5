"""Several linear maps of one input."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def products(x: Tensor, *maps: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """What each of the maps makes of x; by one product where their weights were laid together.

    The first map's own attribute `joint`, where it has one, says with which maps that is (its `maps`) and computes all.
    """
    joint = vars(maps[0]).get("joint")
    if joint is not None and joint.maps == maps:
        results: tuple[Tensor, ...] = joint(x)
        return results
    return tuple(each(x) for each in maps)
