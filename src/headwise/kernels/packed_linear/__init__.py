"""Linear maps whose weights are kept in 8 or 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.kernels import naive_wanted
from headwise.kernels.packed_linear import naive, packed


def linear(x: Tensor, codes: Tensor, scales: Tensor, *, in_order: bool) -> Tensor:
    """x [...,K] times the transpose of the matrix [N,K] that codes and scales stand for: [...,N], in x's dtype.

    Args:
        x: float, of any dtype; rounded to bfloat16 where the packed kernels run (see `packed`).
        codes, scales: as `naive` describes them.
        in_order: whether the codes are in the order of the packed kernels (`packed.pack`).
    """
    if in_order and not naive_wanted() and not (x.requires_grad and torch.is_grad_enabled()):
        return packed.linear(x, codes, scales)
    return naive.linear(x, packed.unpack(codes) if in_order else codes, scales)
