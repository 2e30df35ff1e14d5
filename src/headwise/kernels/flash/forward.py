# mypy: allow-untyped-defs
"""The forward kernel: `online`'s loop with one program a tile of query rows, as FlashAttention-2 has it (Dao 2023).

It keeps per row only the output and L = log Σ_j e^{s_ij}. Exponentials are to base 2, so scores are held times log₂ e.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headwise.kernels.flash.tiles import LN2, LOG2E, key_interval, load, store, tanh, visible


@triton.jit
def forward_span(
    y, l, m, q, k_at, v_at, bias_at, seg_at, low, high, i, q_seg, stride_ks, stride_vs, S, window, lead, score_scale,
    cap, E: tl.constexpr, D: tl.constexpr, PADDED_E: tl.constexpr, PADDED_D: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take keys low…high-1 into the running output y, sum l and maximum m of a tile of rows."""
    for start in tl.range(low, high, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        k = load(k_at, stride_ks, start, S, COLUMNS, E, PADDED_E, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            s = tanh(s * score_scale) * cap
        if BIAS:
            bias = tl.load(bias_at + j, mask=j < S, other=0.0).to(tl.float32) * LOG2E
            s = (s if SOFTCAP else s * score_scale) + bias[None, :]
        if MASKED:
            k_seg = tl.load(seg_at + j, mask=j < S, other=0)[None, :] if SEGMENTS else 0
            keep = visible(i[:, None], j[None, :], S, window, lead, q_seg, k_seg, CAUSAL, WINDOW, SEGMENTS)
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
        v = load(v_at, stride_vs, start, S, COLUMNS, D, PADDED_D, MASKED)
        y = tl.dot(p.to(v.dtype), v, y * kept[:, None], input_precision=PRECISION)
        m = m_new
    return y, l, m


@triton.jit
def forward_kernel(
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
    q = load(Q + b * stride_qb + h * stride_qh, stride_qt, start, T, ROWS, E, PADDED_E, True)
    q_seg = tl.load(QSeg + b * T + row, mask=row < T, other=0)[:, None] if SEGMENTS else 0
    y = tl.zeros([ROWS, PADDED_D], tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    last = S - T + tl.minimum(start + ROWS, T) - 1
    low, full, full_end, high = key_interval(S - T + start, last, S, window, COLUMNS, CAUSAL, WINDOW)
    if SEGMENTS:
        full = low
        full_end = low
    if WINDOW:
        y, l, m = forward_span(
            y, l, m, q, k_at, v_at, bias_at, seg_at, 0, tl.minimum(lead, low), i, q_seg, stride_ks, stride_vs, S,
            window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, COLUMNS, CAUSAL, WINDOW, SOFTCAP, BIAS, SEGMENTS,
            PRECISION, True,
        )  # fmt: skip
        y, l, m = forward_span(
            y, l, m, q, k_at, v_at, bias_at, seg_at, low, tl.minimum(full, high), i, q_seg, stride_ks, stride_vs, S,
            window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, COLUMNS, CAUSAL, WINDOW, SOFTCAP, BIAS, SEGMENTS,
            PRECISION, True,
        )  # fmt: skip
    if not SEGMENTS:
        y, l, m = forward_span(
            y, l, m, q, k_at, v_at, bias_at, seg_at, full, full_end, i, q_seg, stride_ks, stride_vs, S, window, lead,
            score_scale, cap, E, D, PADDED_E, PADDED_D, COLUMNS, CAUSAL, WINDOW, SOFTCAP, BIAS, SEGMENTS, PRECISION,
            False,
        )  # fmt: skip
    y, l, m = forward_span(
        y, l, m, q, k_at, v_at, bias_at, seg_at, tl.maximum(full, full_end), high, i, q_seg, stride_ks, stride_vs, S,
        window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, COLUMNS, CAUSAL, WINDOW, SOFTCAP, BIAS, SEGMENTS,
        PRECISION, True,
    )  # fmt: skip
    l = tl.where(l == 0.0, 1.0, l)  # a row that saw nothing: y stays 0 and m −∞
    tl.store(L + bh.to(tl.int64) * T + row, (m + tl.log2(l)) * LN2, mask=row < T)
    store(y / l[:, None], Y + b * stride_yb + h * stride_yh, stride_yt, start, T, ROWS, D, PADDED_D)
