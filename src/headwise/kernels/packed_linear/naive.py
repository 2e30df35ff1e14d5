"""Weights of 8 or 4 bits as they are written on paper: codes, scales, and the matrix they stand for.

**int8, a scale a row** (symmetric): w_nk ≈ s_n·c_nk with s_n = max_k|w_nk| / 127 and c in −127…127.

**int4, a scale and a zero a group** of G neighbours in a row: w ≈ s·(c − 8) + z with c in 0…15, s = (max − min) / 15
and z = min + 8s: the ends of the group's range are met. Two codes share a byte, the even column in its low half.

Scales and zeros are kept in bfloat16, and codes are chosen for the rounded ones. The conventions are those of torch's
packed kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def quantise_int8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [N,K] and scales bfloat16 [N] of a float matrix."""
    weight_NK = weight_NK.float()
    scale_N = (weight_NK.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
    return (weight_NK / scale_N.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale_N


def quantise_int4(weight_NK: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N,K/2], two a byte, and scales with zeros bfloat16 [K/G,N,2] of a float matrix.

    Where G does not divide K the matrix is widened by zero columns.
    """
    weight_NK = F.pad(weight_NK.float(), (0, -weight_NK.shape[1] % group_size))
    groups_NGg = weight_NK.unflatten(1, (-1, group_size))
    low_NG, high_NG = groups_NGg.amin(-1), groups_NGg.amax(-1)
    scale_NG = ((high_NG - low_NG) / 15).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
    zero_NG = (low_NG + 8 * scale_NG.float()).bfloat16()
    codes = (groups_NGg - zero_NG.float()[..., None]).div_(scale_NG.float()[..., None]).add_(8).round_().clamp_(0, 15)
    scales_GN2 = torch.stack([scale_NG, zero_NG], -1).transpose(0, 1).contiguous()
    return join_codes(codes.flatten(1).to(torch.uint8)), scales_GN2


def join_codes(codes_NK: Tensor) -> Tensor:
    """Two codes of 4 bits a byte: uint8 [N,K] → [N,K/2]."""
    return codes_NK[:, 0::2] | codes_NK[:, 1::2] << 4


def split_codes(codes_NB: Tensor) -> Tensor:
    """One code a byte: uint8 [N,K/2] → [N,K]."""
    return torch.stack([codes_NB & 15, codes_NB >> 4], -1).flatten(1)


def dequantise(codes: Tensor, scales: Tensor, in_features: int) -> Tensor:
    """The matrix [N,K] in float32 that codes (int8 or, two a byte, uint8) and scales stand for."""
    if codes.dtype == torch.int8:
        return codes.float() * scales.float()[:, None]
    scale_NG1, zero_NG1 = scales.float().transpose(0, 1).unflatten(-1, (2, 1)).unbind(2)
    groups_NGg = split_codes(codes).unflatten(1, (scale_NG1.shape[1], -1)).float()
    return ((groups_NGg - 8) * scale_NG1 + zero_NG1).flatten(1)[:, :in_features]


def linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x [...,K] times the transposed matrix, [...,N], in x's dtype."""
    return F.linear(x, dequantise(codes, scales, x.shape[-1]).to(x.dtype))
