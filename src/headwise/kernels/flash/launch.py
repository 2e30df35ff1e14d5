# mypy: allow-untyped-defs
"""Flash attention as torch sees it: two operators that launch the Triton kernels, with their gradients and sizes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from headwise.kernels.flash.backward import delta_kernel, dkdv_kernel, dq_kernel
from headwise.kernels.flash.forward import forward_kernel
from headwise.kernels.flash.tiles import LOG2E


class Tiles(NamedTuple):
    """How a kernel is cut up: rows and columns of its tiles of scores, warps a program, stages of loads in flight."""

    rows: int
    columns: int
    warps: int
    stages: int


# By kernel, padded width (the larger of keys' and values') and whether numbers have 16 bits; for Hopper, whose shared
# memory holds 227 KiB a program. Narrower heads take the row of 64. Products of 32 bits are unrolled into single
# multiplications: larger tiles of those compile for many seconds and do not fit the registers.
TILES: dict[tuple[str, int, bool], Tiles] = {
    ("forward", 64, True): Tiles(128, 64, 4, 3),
    ("forward", 128, True): Tiles(128, 64, 8, 3),
    ("forward", 256, True): Tiles(128, 32, 8, 2),
    ("forward", 64, False): Tiles(32, 32, 8, 2),
    ("forward", 128, False): Tiles(32, 32, 8, 2),
    ("forward", 256, False): Tiles(32, 16, 8, 2),
    ("dq", 64, True): Tiles(128, 64, 8, 3),
    ("dq", 128, True): Tiles(128, 64, 8, 2),
    ("dq", 256, True): Tiles(64, 32, 8, 2),
    ("dq", 64, False): Tiles(32, 32, 8, 1),
    ("dq", 128, False): Tiles(32, 32, 8, 1),
    ("dq", 256, False): Tiles(32, 16, 8, 1),
    ("dkdv", 64, True): Tiles(64, 128, 8, 2),
    ("dkdv", 128, True): Tiles(64, 128, 8, 2),
    ("dkdv", 256, True): Tiles(32, 64, 8, 1),
    ("dkdv", 64, False): Tiles(32, 32, 8, 1),
    ("dkdv", 128, False): Tiles(32, 32, 8, 1),
    ("dkdv", 256, False): Tiles(16, 32, 8, 1),
}


def tiles_of(kernel: str, E: int, D: int, dtype: torch.dtype) -> Tiles:
    """The table's entry for heads of these widths."""
    width = max(64, triton.next_power_of_2(max(E, D)))
    return TILES[kernel, width, dtype.itemsize == 2]


@torch.library.custom_op("headwise::flash_attention", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, q_seg: Tensor | None, k_seg: Tensor | None,
    scale: float, causal: bool, window: int | None, lead: int, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernel: y [B,H,T,D] and L [B,H,T]."""
    q, k, v = _rows_in_one_piece(q, k, v)
    (B, H, T, E), D = q.shape, v.shape[-1]
    tiles = tiles_of("forward", E, D, q.dtype)
    y, lse = _like_output(q, v)
    shared, flags = _arguments(q, k, v, key_bias, q_seg, k_seg, scale, causal, window, lead, softcap)
    with torch.cuda.device_of(q):
        forward_kernel[(triton.cdiv(T, tiles.rows) * B * H,)](
            q, k, v, shared.bias, shared.q_seg, shared.k_seg, y, lse,
            *_strides(q, k, v), *shared.bias_strides, *_strides(y),
            H, T, k.shape[2], shared.window, shared.lead, shared.score_scale, shared.cap, shared.group,
            shared.bias_group,
            ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.warps, num_stages=tiles.stages, **flags,
        )  # fmt: skip
    return y, lse


@torch.library.custom_op("headwise::flash_attention_backward", mutates_args=())
def backward(
    dy: Tensor, dlse: Tensor, y: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, q_seg: Tensor | None, k_seg: Tensor | None,
    scale: float, causal: bool, window: int | None, lead: int, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernels: dq, dk, dv and the key bias's gradient of each query head, [B,H,S] (or [0])."""
    q, k, v, dy = _rows_in_one_piece(q, k, v, dy)
    (B, H, T, E), (_, K, S, _), D = q.shape, k.shape, v.shape[-1]
    dq, dk, dv, dbias = _like_gradients(q, k, v, key_bias)
    delta = torch.empty_like(lse)
    shared, flags = _arguments(q, k, v, key_bias, q_seg, k_seg, scale, causal, window, lead, softcap)
    first = (q, k, v, shared.bias, shared.q_seg, shared.k_seg, dy, lse, delta)
    strides = (*_strides(q, k, v), *shared.bias_strides, *_strides(dy))
    numbers = (
        H, T, S, shared.window, shared.lead, scale, shared.score_scale, shared.cap, shared.group, shared.bias_group,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        delta_kernel[(triton.cdiv(T, 64) * B * H,)](
            y, dy, dlse.contiguous(), delta, *_strides(y), *_strides(dy), H, T,
            D=D, PADDED_D=flags["PADDED_D"], ROWS=64,
        )  # fmt: skip
        tiles = tiles_of("dkdv", E, D, q.dtype)
        dkdv_kernel[(triton.cdiv(S, tiles.columns) * B * K,)](
            *first, dk, dv, dbias, *strides, *_strides(dk, dv), *numbers, EVEN=T % tiles.rows == 0,
            ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.warps, num_stages=tiles.stages, **flags,
        )  # fmt: skip
        tiles = tiles_of("dq", E, D, q.dtype)
        dq_kernel[(triton.cdiv(T, tiles.rows) * B * H,)](
            *first, dq, *strides, *_strides(dq), *numbers,
            ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.warps, num_stages=tiles.stages, **flags,
        )  # fmt: skip
    return dq, dk, dv, dbias


@forward.register_fake
def _(q, k, v, key_bias, q_seg, k_seg, scale, causal, window, lead, softcap):
    return _like_output(q, v)


@backward.register_fake
def _(dy, dlse, y, lse, q, k, v, key_bias, q_seg, k_seg, scale, causal, window, lead, softcap):
    return _like_gradients(q, k, v, key_bias)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.causal, ctx.window, ctx.lead, ctx.softcap = inputs
    ctx.save_for_backward(*output, *tensors)


def _gradients(ctx, dy, dlse):
    y, lse, q, k, v, key_bias, q_seg, k_seg = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    fields = (ctx.scale, ctx.causal, ctx.window, ctx.lead, ctx.softcap)
    dq, dk, dv, dbias = backward(dy, dlse, y, lse, q, k, v, key_bias, q_seg, k_seg, *fields)
    if key_bias is None:
        dbias = None
    else:  # sum over the query heads that share a bias, and over the batch where it is shared
        dbias = dbias.unflatten(1, (key_bias.shape[1], -1)).sum(2)
        dbias = dbias.sum_to_size(key_bias.shape).to(key_bias.dtype)
    return dq, dk, dv, dbias, None, None, None, None, None, None, None


forward.register_autograd(_gradients, setup_context=_setup_context)


class _Arguments(NamedTuple):
    """What all kernels are told, in their terms; a tensor that is not there is stood in for by one that is."""

    bias: Tensor
    q_seg: Tensor
    k_seg: Tensor
    bias_strides: tuple[int, int]
    window: int
    lead: int
    score_scale: float
    cap: float
    group: int
    bias_group: int


def _arguments(q, k, v, key_bias, q_seg, k_seg, scale, causal, window, lead, softcap):
    H, K, E, D = q.shape[1], k.shape[1], q.shape[-1], v.shape[-1]
    bias = q if key_bias is None else key_bias.contiguous()
    bias_strides = (0, 0) if key_bias is None else (bias.stride(0) if bias.shape[0] > 1 else 0, bias.stride(1))
    arguments = _Arguments(
        bias=bias,
        q_seg=q if q_seg is None else q_seg.contiguous(),
        k_seg=q if k_seg is None else k_seg.contiguous(),
        bias_strides=bias_strides,
        window=0 if window is None else window,
        lead=lead,
        score_scale=scale * LOG2E.value if softcap is None else scale / softcap,
        cap=0.0 if softcap is None else softcap * LOG2E.value,
        group=H // K,
        bias_group=1 if key_bias is None else H // key_bias.shape[1],
    )
    flags = {
        "E": E, "D": D, "PADDED_E": max(16, triton.next_power_of_2(E)), "PADDED_D": max(16, triton.next_power_of_2(D)),
        "CAUSAL": causal, "WINDOW": window is not None, "SOFTCAP": softcap is not None, "BIAS": key_bias is not None,
        "SEGMENTS": q_seg is not None,
        # TF32 only for those who have asked torch for it; bfloat16 and float16 products are exact either way.
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    }  # fmt: skip
    return arguments, flags


def _rows_in_one_piece(*tensors):
    """The kernels step through heads and positions by strides; a row itself must lie in one piece."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _strides(*tensors):
    return [stride for x in tensors for stride in x.stride()[:3]]


def _like_output(q, v):
    """y and L, unset; y lies in memory as [B,T,H,D], so that putting the heads side by side costs nothing."""
    B, H, T, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]).transpose(1, 2), q.new_empty(B, H, T, dtype=torch.float32)


def _like_gradients(q, k, v, key_bias):
    shape = (q.shape[0], q.shape[1], k.shape[2]) if key_bias is not None else (0,)
    return (*(torch.empty_like(x) for x in (q, k, v)), q.new_empty(shape, dtype=torch.float32))
