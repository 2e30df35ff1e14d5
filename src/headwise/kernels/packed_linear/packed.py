"""Products with quantised weights by torch's kernels for CPUs, which read a weight once, as its few bits.

They are quick with bfloat16 inputs only, so inputs are rounded to that. The kernels serve few rows (decoding): for many
the weights are spread out to bfloat16 once and multiplied as usual. An int8 matrix and one row in a compiled step are
left to the compiler (`one_row`), which rounds nothing.

The int4 kernel wants the codes in an order of its own: of each `block` rows the first half in the low, the second half
in the high bits, column by column. How large a block is depends on the vector instructions of the machine, so it is
found out by packing a pattern. Where none fits, or there is no such kernel, codes stay in plain order and the readable
form runs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from headwise.kernels import one_row
from headwise.kernels.packed_linear.naive import join_codes, split_codes

GROUP_SIZES = (32, 64, 128, 256)  # of the int4 kernel
FEW = {torch.int8: 16, torch.uint8: 72}  # rows: with more of them spreading the weights out is the quicker way
SPREAD = 1 << 20  # numbers that are spread out at once: they should still be in the processor's cache when multiplied


@cache
def _block() -> int | None:
    """Rows that the int4 kernel keeps together on this machine."""
    if not hasattr(torch, "_convert_weight_to_int4pack_for_cpu"):
        return None
    codes_NK = torch.arange(128 * 32, dtype=torch.int32).view(128, 32).mul(7).remainder(16)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes_NK, 1)
    return next((n for n in (64, 32) if torch.equal(_pack(codes_NK.to(torch.uint8), n), packed)), None)


def _pack(codes_NK: Tensor, block: int) -> Tensor:
    low, high = codes_NK.unflatten(0, (-1, 2, block // 2)).unbind(1)
    return (low | high << 4).transpose(1, 2).contiguous().view(len(codes_NK), -1)


def _halves(packed: Tensor, block: int) -> Tensor:
    """Unpacked codes, uint8 [blocks,K,2,block/2]."""
    packed = packed.reshape(len(packed) // block, -1, block // 2)
    return torch.stack([packed & 15, packed >> 4], 2)


def fits(codes: Tensor, scales: Tensor, in_features: int) -> bool:
    """Whether the kernels take a matrix of these shapes on this device.

    The int8 kernel reads beyond the end of rows that are no multiple of its vectors.
    """
    if codes.device.type != "cpu":
        return False
    if codes.dtype == torch.int8:
        return in_features % 32 == 0 and hasattr(torch, "_weight_int8pack_mm")
    block, width = _block(), 2 * codes.shape[1]
    return (
        block is not None and len(codes) % block == 0 and width == in_features and width // len(scales) in GROUP_SIZES
    )


def pack(codes: Tensor) -> Tensor:
    """Plain codes in the order of the kernel, same shape and dtype."""
    block = _block()
    assert block is not None
    return codes if codes.dtype == torch.int8 else _pack(split_codes(codes), block)


def unpack(codes: Tensor) -> Tensor:
    """What `pack` was given."""
    block = _block()
    assert block is not None
    if codes.dtype == torch.int8:
        return codes
    return join_codes(_halves(codes, block).flatten(2).transpose(1, 2).flatten(0, 1))


def linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x [...,K] times the transposed matrix, [...,N], in x's dtype."""
    *shape, K = x.shape
    if codes.dtype == torch.int8 and one_row.serves(x):
        return (one_row.product(x, codes) * scales).to(x.dtype)
    rows = x.to(torch.bfloat16).reshape(-1, K)
    if rows.shape[0] > FEW[codes.dtype]:
        n = max(64, SPREAD // K // 64 * 64)  # whole blocks of the int4 kernel
        parts = zip(codes.split(n), scales.split(n, 0 if codes.dtype == torch.int8 else 1))
        y = torch.cat([rows @ _spread(*part) for part in parts], -1)
    elif codes.dtype == torch.int8:
        y = torch._weight_int8pack_mm(rows, codes, scales)
    else:
        y = torch._weight_int4pack_mm_for_cpu(rows, codes, K // scales.shape[0], scales.contiguous())
    return y.to(x.dtype).view(*shape, -1)


def _spread(codes: Tensor, scales: Tensor) -> Tensor:
    """The transposed matrix, bfloat16 [K,N]."""
    if codes.dtype == torch.int8:
        return (codes * scales[:, None]).t()
    block = _block()
    assert block is not None
    codes_KN = _halves(codes, block).transpose(0, 1).reshape(2 * codes.shape[1], -1)
    scale_G1N, zero_G1N = (each.contiguous()[:, None] for each in scales.unbind(-1))
    groups_GgN = codes_KN.unflatten(0, (len(scales), -1)).to(torch.bfloat16).sub_(8)
    return torch.addcmul(zero_G1N, groups_GgN, scale_G1N).flatten(0, 1)
