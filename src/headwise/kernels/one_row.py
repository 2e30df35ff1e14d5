"""One row times a matrix in a compiled step, as loops that torch's compiler makes.

A token's step is such products and reads every weight once. torch's kernels are made for many rows: with one they read
at a third to two thirds of the memory's speed, the compiler's loops at all of it, and nothing is rounded on the way
(benchmarks/bench_generation.py).
"""

from __future__ import annotations

import torch
from torch import Tensor


def compiling(x: Tensor) -> bool:
    """Whether x is part of a program that is being compiled for a CPU, without gradients."""
    return (
        torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def serves(x: Tensor) -> bool:
    """Whether x [...,K] is one row in such a program."""
    return compiling(x) and x.numel() == x.shape[-1]


def stored(x: Tensor) -> Tensor:
    """x, which loops that read it often find in memory: the compiler would compute it anew at every reading."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def product(x: Tensor, matrix_NK: Tensor) -> Tensor:
    """x [...,K], one row, times the transposed matrix of floats or whole numbers: [...,N], in float32 at least."""
    exact = torch.promote_types(x.dtype, torch.float32)
    y_N = (matrix_NK * stored(x.flatten().to(exact))).sum(-1)
    return y_N.view(*x.shape[:-1], -1)
