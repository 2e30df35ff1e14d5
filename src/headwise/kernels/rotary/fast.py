"""RoPE with real arithmetic: two products and a swap of halves."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """As `naive.rotate`, from the cosines and sines [..., T, N] of the angles."""
    n = cos.shape[-1]
    turned, rest = x[..., : 2 * n], x[..., 2 * n :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        y = torch.stack(_turn(a, b, cos, sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :n], turned[..., n:]
        y = torch.cat(_turn(a, b, cos, sin), dim=-1)
    return torch.cat([y, rest], dim=-1) if rest.shape[-1] else y


def _turn(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(a·cos − b·sin, b·cos + a·sin), each in two passes over memory."""
    return torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
