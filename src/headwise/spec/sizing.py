"""The one rule that turns a number of parameters into depth and width, for lines that leave them open.

A layer of width C has about 12·C² weights (an encoder layer with its decoder layer 28·C²). Among widths that are
multiples of 64 (of 128 from 512 on) and depths from 1 up, the rule takes the pair whose weights come nearest the size
in ratio, with a pull (0.3 of the log-ratio) towards C = 32·L, the shape of small models that train well; a field
already given stays, and the others follow: where `n_heads` (or else `kv_heads`) is given and 64 does not divide into
that many even widths, the width is a multiple of 8 times that number instead. Heads are 32 wide below C = 512 and 64
wide from there, in a number that divides C and that `kv_heads` divides, in widths that the position code can turn. So
1m is 5 layers of 128, 10m is 8 of 320. The experts of a mixture count as one feed-forward: a line with them has the
shape of the same line without, and more parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from headwise.errors import Problem, SpecError


def fill_widths(
    d_model: int | None,
    n_layers: int | None,
    n_heads: int | None,
    kv_heads: int,
    n_params: int,
    *,
    per_layer: int = 12,
    fits: Callable[[int], bool] = lambda head_dim: True,
) -> dict[str, int]:
    """d_model, n_layers and n_heads for about `n_params` parameters in layers of `per_layer`·d_model².

    `fits` says which head widths are preferred.

    Raises:
        SpecError: no number of heads fits the width.
    """
    if d_model is None or n_layers is None:
        parts = n_heads or kv_heads
        step = 64 if 64 % (2 * parts) == 0 else 8 * parts
        largest = math.ceil(math.sqrt(n_params / per_layer)) + 2 * step
        widths = range(step, largest + 1, step) if d_model is None else [d_model]
        candidates: list[tuple[float, int, int]] = []
        for width in widths:
            if d_model is None and step == 64 and width >= 512 and width % 128:
                continue
            ideal = n_params / (per_layer * width**2)
            depths = [n_layers] if n_layers else sorted({max(1, math.floor(ideal)), max(1, math.ceil(ideal))})
            for depth in depths:
                miss = abs(math.log(per_layer * depth * width**2 / n_params))
                shape = abs(math.log(width / (32 * depth)))
                candidates.append((miss + 0.3 * shape, width, depth))
        _, d_model, n_layers = min(candidates)
    return {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads or _heads(d_model, kv_heads, fits)}


def _heads(d_model: int, kv_heads: int, fits: Callable[[int], bool]) -> int:
    """The number of heads whose width is nearest 32 (64 from d_model = 512): it divides d_model into even widths."""
    wanted = 32 if d_model < 512 else 64
    options = [n for n in range(kv_heads, d_model + 1, kv_heads) if d_model % n == 0 and (d_model // n) % 2 == 0]
    if not options:
        message = f"no number of heads divides d_model={d_model} and is a multiple of kv_heads={kv_heads}; give n_heads"
        raise SpecError([Problem("n_heads", message)])
    options = [n for n in options if fits(d_model // n)] or options
    return min(options, key=lambda n: (abs(math.log(d_model / n / wanted)), n))
