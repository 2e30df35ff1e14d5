# mypy: allow-untyped-defs
"""Flash attention as Triton kernels: one forward, and for the backward pass one for dq, one for dk and dv.

The forward pass is `online`'s loop with one program a tile of query rows, and it keeps per row only the output and
L = log Σ_j e^{s_ij}. The backward pass makes every tile of scores anew from L (Dao et al. 2022, section 3.1, and
FlashAttention-2, Dao 2023): with P = e^{s−L} and Δ_i = Σ_d y_id·dy_id − dL_i,

    dV = Pᵀ dY      dS = P ∘ (dY Vᵀ − Δ)      dQ = scale·dS K      dK = scale·dSᵀ Q      dg_j = Σ_i dS_ij

and dS times 1 − tanh² where scores are capped. Exponentials are to base 2, so scores are held times log₂ e.

Which keys a tile of rows can reach is an interval; it falls into a part in which every key is visible, which needs no
mask, and what is left and right of it. Tiles outside of the interval are never loaded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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


@triton.jit
def _tanh(x):
    """tanh to a few units in the last place: a polynomial near 0 (Cephes), where 1 − 2/(e^{2x} + 1) would cancel."""
    z = x * x
    p = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    near = (p - 3.33332819422e-1) * z * x + x
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _tile(at, stride, start, bound, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHECK: tl.constexpr):
    """Rows start…start+ROWS-1 of a matrix of WIDTH columns, zeros beyond its `bound` rows and beyond its columns."""
    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    # 64 bits for where the tile begins, 32 for what lies inside of it.
    at = at + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :]
    if CHECK:
        inside = (start + row)[:, None] < bound
        if WIDTH != PADDED:
            inside = inside & (column[None, :] < WIDTH)
        return tl.load(at, mask=inside, other=0.0)
    if WIDTH != PADDED:
        return tl.load(at, mask=column[None, :] < WIDTH, other=0.0)
    return tl.load(at)


@triton.jit
def _keep(tile, at, stride, start, bound, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The counterpart of `_tile`: write it back in the dtype of where it goes."""
    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    at = at + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :]
    inside = ((start + row)[:, None] < bound) & (column[None, :] < WIDTH)
    tl.store(at, tile.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _visible(i, j, S, window, lead, q_seg, k_seg, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):
    """Which keys j each query i sees, i and j already laid out against each other; the first `lead` keys are seen from
    outside of the window too.
    """
    keep = (j < S) & (i >= 0)
    if CAUSAL:
        keep = keep & (j <= i)
    if WINDOW:
        keep = keep & ((j < lead) | ((i - j < window) & (j - i < window)))
    if SEGMENTS:
        keep = keep & (q_seg == k_seg)
    return keep


@triton.jit
def _key_interval(
    first, last, S, window, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """Keys that queries at positions first…last reach: [low, high), of which all see [full, full_end).

    low, full and full_end stand on tile borders.
    """
    low, full, high, full_end = 0, 0, S, S
    if CAUSAL:
        high, full_end = tl.minimum(high, last + 1), tl.minimum(full_end, first + 1)
    if WINDOW:
        low = tl.maximum(0, first - window + 1) // COLUMNS * COLUMNS
        full = tl.maximum(0, last - window + 1 + COLUMNS - 1) // COLUMNS * COLUMNS
        high, full_end = tl.minimum(high, last + window), tl.minimum(full_end, first + window)
    return low, full, full_end // COLUMNS * COLUMNS, high


@triton.jit
def _query_interval(
    first, last, T, offset, window, ROWS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """Query rows that see any of keys first…last: [low, high), of which [full, full_end) see all of them."""
    low, full, high, full_end = 0, 0, T, T
    if CAUSAL:
        low, full = tl.maximum(0, first - offset), tl.maximum(0, last - offset)
    elif WINDOW:
        low, full = tl.maximum(0, first - window + 1 - offset), tl.maximum(0, last - window + 1 - offset)
    if WINDOW:
        high = tl.minimum(high, last + window - offset)
        full_end = tl.minimum(full_end, tl.maximum(0, first + window - offset) // ROWS * ROWS)
    return low // ROWS * ROWS, (full + ROWS - 1) // ROWS * ROWS, full_end, high


@triton.jit
def _forward_span(
    y, l, m, q, k_at, v_at, bias_at, seg_at, low, high, i, q_seg, stride_ks, stride_vs, S, window, lead, score_scale,
    cap, E: tl.constexpr, D: tl.constexpr, PADDED_E: tl.constexpr, PADDED_D: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take keys low…high-1 into the running output y, sum l and maximum m of a tile of rows."""
    for start in tl.range(low, high, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        k = _tile(k_at, stride_ks, start, S, COLUMNS, E, PADDED_E, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            s = _tanh(s * score_scale) * cap
        if BIAS:
            bias = tl.load(bias_at + j, mask=j < S, other=0.0).to(tl.float32) * LOG2E
            s = (s if SOFTCAP else s * score_scale) + bias[None, :]
        if MASKED:
            k_seg = tl.load(seg_at + j, mask=j < S, other=0)[None, :] if SEGMENTS else 0
            keep = _visible(i[:, None], j[None, :], S, window, lead, q_seg, k_seg, CAUSAL, WINDOW, SEGMENTS)
            s = tl.where(keep, s, float("-inf"))
        if SOFTCAP or BIAS:
            m_new = tl.maximum(m, tl.max(s, 1))
        else:  # the scale, which is positive, joins the subtraction below in one instruction
            m_new = tl.maximum(m, tl.max(s, 1) * score_scale)
        shift = m_new
        if MASKED or BIAS:  # rows that have seen no key yet: −∞ − −∞ would be NaN
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2((s if SOFTCAP or BIAS else s * score_scale) - shift[:, None])
        kept = tl.exp2(m - shift)
        l = l * kept + tl.sum(p, 1)
        v = _tile(v_at, stride_vs, start, S, COLUMNS, D, PADDED_D, MASKED)
        y = tl.dot(p.to(v.dtype), v, y * kept[:, None], input_precision=PRECISION)
        m = m_new
    return y, l, m


@triton.jit
def _forward(
    Q, K, V, Bias, QSeg, KSeg, Y, L,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_bb, stride_bh, stride_yb, stride_yh, stride_yt,
    H, T, S, window, lead, score_scale, cap, GROUP, BIAS_GROUP,
    E: tl.constexpr, D: tl.constexpr, PADDED_E: tl.constexpr, PADDED_D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one head: its output and the logarithm of its rows' sums."""
    tiles = tl.cdiv(T, ROWS)
    # The last rows of a causal triangle have the most keys: they start first.
    start = (tiles - 1 - tl.program_id(0) % tiles) * ROWS
    bh = tl.program_id(0) // tiles
    b, h = tl.cast(bh // H, tl.int64), tl.cast(bh % H, tl.int64)
    k_at, v_at = K + b * stride_kb + h // GROUP * stride_kh, V + b * stride_vb + h // GROUP * stride_vh
    bias_at = Bias + b * stride_bb + h // BIAS_GROUP * stride_bh if BIAS else Bias
    seg_at = KSeg + b * S if SEGMENTS else KSeg
    row = start + tl.arange(0, ROWS)
    i = S - T + row
    q = _tile(Q + b * stride_qb + h * stride_qh, stride_qt, start, T, ROWS, E, PADDED_E, True)
    q_seg = tl.load(QSeg + b * T + row, mask=row < T, other=0)[:, None] if SEGMENTS else 0
    y = tl.zeros([ROWS, PADDED_D], tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    last = S - T + tl.minimum(start + ROWS, T) - 1
    low, full, full_end, high = _key_interval(S - T + start, last, S, window, COLUMNS, CAUSAL, WINDOW)
    if SEGMENTS:
        full = low
        full_end = low
    if WINDOW:
        y, l, m = _forward_span(
            y, l, m, q, k_at, v_at, bias_at, seg_at, 0, tl.minimum(lead, low), i, q_seg, stride_ks, stride_vs, S,
            window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, COLUMNS, CAUSAL, WINDOW, SOFTCAP, BIAS, SEGMENTS,
            PRECISION, True,
        )  # fmt: skip
        y, l, m = _forward_span(
            y, l, m, q, k_at, v_at, bias_at, seg_at, low, tl.minimum(full, high), i, q_seg, stride_ks, stride_vs, S,
            window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, COLUMNS, CAUSAL, WINDOW, SOFTCAP, BIAS, SEGMENTS,
            PRECISION, True,
        )  # fmt: skip
    if not SEGMENTS:
        y, l, m = _forward_span(
            y, l, m, q, k_at, v_at, bias_at, seg_at, full, full_end, i, q_seg, stride_ks, stride_vs, S, window, lead,
            score_scale, cap, E, D, PADDED_E, PADDED_D, COLUMNS, CAUSAL, WINDOW, SOFTCAP, BIAS, SEGMENTS, PRECISION,
            False,
        )  # fmt: skip
    y, l, m = _forward_span(
        y, l, m, q, k_at, v_at, bias_at, seg_at, tl.maximum(full, full_end), high, i, q_seg, stride_ks, stride_vs, S,
        window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, COLUMNS, CAUSAL, WINDOW, SOFTCAP, BIAS, SEGMENTS,
        PRECISION, True,
    )  # fmt: skip
    l = tl.where(l == 0.0, 1.0, l)  # a row that saw nothing: y stays 0 and m −∞
    tl.store(L + bh.to(tl.int64) * T + row, (m + tl.log2(l)) * LN2, mask=row < T)
    _keep(y / l[:, None], Y + b * stride_yb + h * stride_yh, stride_yt, start, T, ROWS, D, PADDED_D)


@triton.jit
def _delta(
    Y, DY, DL, Delta, stride_yb, stride_yh, stride_yt, stride_ob, stride_oh, stride_ot, H, T,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Δ_i = Σ_d y_id·dy_id − dL_i of one tile of rows."""
    tiles = tl.cdiv(T, ROWS)
    start, bh = tl.program_id(0) % tiles * ROWS, tl.program_id(0) // tiles
    b, h = tl.cast(bh // H, tl.int64), tl.cast(bh % H, tl.int64)
    y = _tile(Y + b * stride_yb + h * stride_yh, stride_yt, start, T, ROWS, D, PADDED_D, True)
    dy = _tile(DY + b * stride_ob + h * stride_oh, stride_ot, start, T, ROWS, D, PADDED_D, True)
    row = start + tl.arange(0, ROWS)
    at = bh.to(tl.int64) * T + row
    delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1) - tl.load(DL + at, mask=row < T, other=0.0)
    tl.store(Delta + at, delta, mask=row < T)


@triton.jit
def _row_sums(at, row, T):
    """L of some rows, to base 2. A row that saw nothing has −∞ and is given +∞, so that its weights are 0, not NaN."""
    l = tl.load(at + row, mask=row < T, other=float("inf"))
    return tl.where(l == float("-inf"), float("inf"), l) * LOG2E


@triton.jit
def _dq_span(
    dq, q, dy, lse, delta, k_at, v_at, bias_at, seg_at, low, high, i, q_seg, stride_ks, stride_vs, S, window, lead,
    score_scale, cap, E: tl.constexpr, D: tl.constexpr, PADDED_E: tl.constexpr, PADDED_D: tl.constexpr,
    COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to dq what keys low…high-1 say."""
    for start in tl.range(low, high, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        k = _tile(k_at, stride_ks, start, S, COLUMNS, E, PADDED_E, MASKED)
        v = _tile(v_at, stride_vs, start, S, COLUMNS, D, PADDED_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
        dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
        slope = 1.0
        if SOFTCAP:
            tanh = _tanh(s)
            s, slope = tanh * cap, 1.0 - tanh * tanh
        if BIAS:
            s += (tl.load(bias_at + j, mask=j < S, other=0.0).to(tl.float32) * LOG2E)[None, :]
        p = tl.exp2(s - lse[:, None])
        if MASKED:
            k_seg = tl.load(seg_at + j, mask=j < S, other=0)[None, :] if SEGMENTS else 0
            keep = _visible(i[:, None], j[None, :], S, window, lead, q_seg, k_seg, CAUSAL, WINDOW, SEGMENTS)
            p = tl.where(keep, p, 0.0)
        ds = p * (dp - delta[:, None]) * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _dq(
    Q, K, V, Bias, QSeg, KSeg, DY, L, Delta, DQ,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_bb, stride_bh, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt,
    H, T, S, window, lead, scale, score_scale, cap, GROUP, BIAS_GROUP,
    E: tl.constexpr, D: tl.constexpr, PADDED_E: tl.constexpr, PADDED_D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of rows of one head: the forward pass's loop again."""
    tiles = tl.cdiv(T, ROWS)
    start = (tiles - 1 - tl.program_id(0) % tiles) * ROWS
    bh = tl.program_id(0) // tiles
    b, h = tl.cast(bh // H, tl.int64), tl.cast(bh % H, tl.int64)
    k_at, v_at = K + b * stride_kb + h // GROUP * stride_kh, V + b * stride_vb + h // GROUP * stride_vh
    bias_at = Bias + b * stride_bb + h // BIAS_GROUP * stride_bh if BIAS else Bias
    seg_at = KSeg + b * S if SEGMENTS else KSeg
    row = start + tl.arange(0, ROWS)
    i = S - T + row
    q = _tile(Q + b * stride_qb + h * stride_qh, stride_qt, start, T, ROWS, E, PADDED_E, True)
    dy = _tile(DY + b * stride_ob + h * stride_oh, stride_ot, start, T, ROWS, D, PADDED_D, True)
    lse = _row_sums(L + bh.to(tl.int64) * T, row, T)
    delta = tl.load(Delta + bh.to(tl.int64) * T + row, mask=row < T, other=0.0)
    q_seg = tl.load(QSeg + b * T + row, mask=row < T, other=0)[:, None] if SEGMENTS else 0
    dq = tl.zeros([ROWS, PADDED_E], tl.float32)
    last = S - T + tl.minimum(start + ROWS, T) - 1
    low, full, full_end, high = _key_interval(S - T + start, last, S, window, COLUMNS, CAUSAL, WINDOW)
    if SEGMENTS:
        full = low
        full_end = low
    if WINDOW:
        dq = _dq_span(
            dq, q, dy, lse, delta, k_at, v_at, bias_at, seg_at, 0, tl.minimum(lead, low), i, q_seg, stride_ks,
            stride_vs, S, window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, COLUMNS, CAUSAL, WINDOW, SOFTCAP,
            BIAS, SEGMENTS, PRECISION, True,
        )  # fmt: skip
        dq = _dq_span(
            dq, q, dy, lse, delta, k_at, v_at, bias_at, seg_at, low, tl.minimum(full, high), i, q_seg, stride_ks,
            stride_vs, S, window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, COLUMNS, CAUSAL, WINDOW, SOFTCAP,
            BIAS, SEGMENTS, PRECISION, True,
        )  # fmt: skip
    if not SEGMENTS:
        dq = _dq_span(
            dq, q, dy, lse, delta, k_at, v_at, bias_at, seg_at, full, full_end, i, q_seg, stride_ks, stride_vs, S,
            window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, COLUMNS, CAUSAL, WINDOW, SOFTCAP, BIAS, SEGMENTS,
            PRECISION, False,
        )  # fmt: skip
    dq = _dq_span(
        dq, q, dy, lse, delta, k_at, v_at, bias_at, seg_at, tl.maximum(full, full_end), high, i, q_seg, stride_ks,
        stride_vs, S, window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, COLUMNS, CAUSAL, WINDOW, SOFTCAP, BIAS,
        SEGMENTS, PRECISION, True,
    )  # fmt: skip
    _keep(dq * scale, DQ + b * stride_gb + h * stride_gh, stride_gt, start, T, ROWS, E, PADDED_E)


@triton.jit
def _dkdv_span(
    dk, dv, dbias, k, v, bias, q_at, dy_at, l_at, delta_at, seg_at, low, high, j, k_seg, stride_qt, stride_ot, T, S,
    window, lead, score_scale, cap, E: tl.constexpr, D: tl.constexpr, PADDED_E: tl.constexpr, PADDED_D: tl.constexpr,
    ROWS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to dk, dv and dbias what query rows low…high-1 say. Tiles of scores stand on their side: [keys, queries]."""
    for start in tl.range(low, high, ROWS):
        row = start + tl.arange(0, ROWS)
        q = _tile(q_at, stride_qt, start, T, ROWS, E, PADDED_E, not EVEN)
        dy = _tile(dy_at, stride_ot, start, T, ROWS, D, PADDED_D, not EVEN)
        lse = _row_sums(l_at, row, T)
        delta = tl.load(delta_at + row, mask=row < T, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * score_scale
        dp = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
        slope = 1.0
        if SOFTCAP:
            tanh = _tanh(s)
            s, slope = tanh * cap, 1.0 - tanh * tanh
        if BIAS:
            s += bias[:, None]
        p = tl.exp2(s - lse[None, :])
        if MASKED:
            q_seg = tl.load(seg_at + row, mask=row < T, other=0)[None, :] if SEGMENTS else 0
            i = S - T + row
            keep = _visible(i[None, :], j[:, None], S, window, lead, q_seg, k_seg, CAUSAL, WINDOW, SEGMENTS)
            p = tl.where(keep, p, 0.0)
        dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if BIAS:
            dbias += tl.sum(ds, 1)
        dk = tl.dot((ds * slope).to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, dbias


@triton.jit
def _dkdv(
    Q, K, V, Bias, QSeg, KSeg, DY, L, Delta, DK, DV, DBias,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_bb, stride_bh, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gs,
    stride_wb, stride_wh, stride_ws,
    H, T, S, window, lead, scale, score_scale, cap, GROUP, BIAS_GROUP,
    E: tl.constexpr, D: tl.constexpr, PADDED_E: tl.constexpr, PADDED_D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one key/value head, over all the query heads that read it."""
    tiles = tl.cdiv(S, COLUMNS)
    # The first keys of a causal triangle have the most queries, and stand first as it is.
    start, bk = tl.program_id(0) % tiles * COLUMNS, tl.program_id(0) // tiles
    heads = H // GROUP
    b, kv = tl.cast(bk // heads, tl.int64), tl.cast(bk % heads, tl.int64)
    k = _tile(K + b * stride_kb + kv * stride_kh, stride_ks, start, S, COLUMNS, E, PADDED_E, True)
    v = _tile(V + b * stride_vb + kv * stride_vh, stride_vs, start, S, COLUMNS, D, PADDED_D, True)
    j = start + tl.arange(0, COLUMNS)
    k_seg = tl.load(KSeg + b * S + j, mask=j < S, other=0)[:, None] if SEGMENTS else 0
    seg_at = QSeg + b * T if SEGMENTS else QSeg
    dk = tl.zeros([COLUMNS, PADDED_E], tl.float32)
    dv = tl.zeros([COLUMNS, PADDED_D], tl.float32)
    last = tl.minimum(start + COLUMNS, S) - 1
    low, full, full_end, high = _query_interval(start, last, T, S - T, window, ROWS, CAUSAL, WINDOW)
    if WINDOW:
        led = start < lead  # some of these keys are seen from anywhere: every tile of rows gets a mask
        low = low if CAUSAL else tl.where(led, 0, low)
        full, full_end, high = tl.where(led, low, full), tl.where(led, low, full_end), tl.where(led, T, high)
    if SEGMENTS:
        full = low
        full_end = low
    for g in range(GROUP):
        h = kv * GROUP + g
        q_at, dy_at = Q + b * stride_qb + h * stride_qh, DY + b * stride_ob + h * stride_oh
        l_at, delta_at = L + (b * H + h) * T, Delta + (b * H + h) * T
        bias = 0.0
        if BIAS:
            at = Bias + b * stride_bb + h // BIAS_GROUP * stride_bh
            bias = tl.load(at + j, mask=j < S, other=0.0).to(tl.float32) * LOG2E
        dbias = tl.zeros([COLUMNS], tl.float32)
        if CAUSAL or WINDOW:
            dk, dv, dbias = _dkdv_span(
                dk, dv, dbias, k, v, bias, q_at, dy_at, l_at, delta_at, seg_at, low, tl.minimum(full, high), j, k_seg,
                stride_qt, stride_ot, T, S, window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, ROWS, CAUSAL,
                WINDOW, SOFTCAP, BIAS, SEGMENTS, PRECISION, EVEN, True,
            )  # fmt: skip
        if not SEGMENTS:
            dk, dv, dbias = _dkdv_span(
                dk, dv, dbias, k, v, bias, q_at, dy_at, l_at, delta_at, seg_at, full, full_end, j, k_seg, stride_qt,
                stride_ot, T, S, window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, ROWS, CAUSAL, WINDOW,
                SOFTCAP, BIAS, SEGMENTS, PRECISION, EVEN, False,
            )  # fmt: skip
        if WINDOW or SEGMENTS:
            dk, dv, dbias = _dkdv_span(
                dk, dv, dbias, k, v, bias, q_at, dy_at, l_at, delta_at, seg_at, tl.maximum(full, full_end), high, j,
                k_seg, stride_qt, stride_ot, T, S, window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, ROWS,
                CAUSAL, WINDOW, SOFTCAP, BIAS, SEGMENTS, PRECISION, EVEN, True,
            )  # fmt: skip
        if BIAS:
            tl.store(DBias + (b * H + h) * S + j, dbias, mask=j < S)
    _keep(dk * scale, DK + b * stride_gb + kv * stride_gh, stride_gs, start, S, COLUMNS, E, PADDED_E)
    _keep(dv, DV + b * stride_wb + kv * stride_wh, stride_ws, start, S, COLUMNS, D, PADDED_D)


# ---- operators: what torch sees ----


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
        _forward[(triton.cdiv(T, tiles.rows) * B * H,)](
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
        _delta[(triton.cdiv(T, 64) * B * H,)](
            y, dy, dlse.contiguous(), delta, *_strides(y), *_strides(dy), H, T,
            D=D, PADDED_D=flags["PADDED_D"], ROWS=64,
        )  # fmt: skip
        tiles = tiles_of("dkdv", E, D, q.dtype)
        _dkdv[(triton.cdiv(S, tiles.columns) * B * K,)](
            *first, dk, dv, dbias, *strides, *_strides(dk, dv), *numbers, EVEN=T % tiles.rows == 0,
            ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.warps, num_stages=tiles.stages, **flags,
        )  # fmt: skip
        tiles = tiles_of("dq", E, D, q.dtype)
        _dq[(triton.cdiv(T, tiles.rows) * B * H,)](
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
