"""RoPE with real arithmetic: x·cos plus x with the members of each pair swapped, times ±sin."""

from __future__ import annotations

import torch
from torch import Tensor


def tables(angles: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Factors [..., T, 2N] of each dimension and of its partner in the pair, from the angles [..., T, N]."""
    cos, sin = angles.cos(), angles.sin()
    join = torch.stack if interleaved else torch.cat
    both = join([cos, cos], dim=-1), join([-sin, sin], dim=-1)
    return (both[0].flatten(-2), both[1].flatten(-2)) if interleaved else both


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """As `naive.rotate`, from the `tables` of the angles; dimensions from 2N on stay as they are."""
    n = cos.shape[-1]
    if n < x.shape[-1]:
        return torch.cat([rotate(x[..., :n], cos, sin, interleaved=interleaved), x[..., n:]], dim=-1)
    if interleaved:
        partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    elif x.shape[-2] == 1:  # compiled, one token's halves are read the other way round; joined, they would be stored
        partner = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    else:
        a, b = x.chunk(2, dim=-1)
        partner = torch.cat((b, a), dim=-1)
    return torch.addcmul(x * cos, partner, sin)
