"""RoPE as it is written on paper: pair n of a head's dimensions is a complex number, turned by its angle."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, angles: Tensor, *, interleaved: bool) -> Tensor:
    """Turn the first 2·N of the last dimension of `x [..., T, D]` by `angles [..., T, N]`; the rest passes unturned.

    `interleaved` pairs neighbours (2n, 2n+1); otherwise n is paired with n + N (documents 001 and 002; Su et al. 2021).
    """
    y = x.clone()
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # complex numbers have no bfloat16
    n_pairs = angles.shape[-1]
    for n in range(n_pairs):
        a, b = (2 * n, 2 * n + 1) if interleaved else (n, n + n_pairs)
        turned = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones_like(angles[..., n]), angles[..., n])
        y[..., a], y[..., b] = turned.real, turned.imag
    return y
