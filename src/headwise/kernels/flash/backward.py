# mypy: allow-untyped-defs
"""The backward kernels: one for dq, one for dk and dv, and before them one for Δ.

Every tile of scores is made anew from L (Dao et al. 2022, section 3.1, and FlashAttention-2, Dao 2023): with
P = e^{s−L} and Δ_i = Σ_d y_id·dy_id − dL_i,

    dV = Pᵀ dY      dS = P ∘ (dY Vᵀ − Δ)      dQ = scale·dS K      dK = scale·dSᵀ Q      dg_j = Σ_i dS_ij

and dS times 1 − tanh² where scores are capped.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headwise.kernels.flash.tiles import LOG2E, key_interval, load, query_interval, store, tanh, visible


@triton.jit
def delta_kernel(
    Y, DY, DL, Delta, stride_yb, stride_yh, stride_yt, stride_ob, stride_oh, stride_ot, H, T,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Δ_i = Σ_d y_id·dy_id − dL_i of one tile of rows."""
    tiles = tl.cdiv(T, ROWS)
    start, bh = tl.program_id(0) % tiles * ROWS, tl.program_id(0) // tiles
    b, h = tl.cast(bh // H, tl.int64), tl.cast(bh % H, tl.int64)
    y = load(Y + b * stride_yb + h * stride_yh, stride_yt, start, T, ROWS, D, PADDED_D, True)
    dy = load(DY + b * stride_ob + h * stride_oh, stride_ot, start, T, ROWS, D, PADDED_D, True)
    row = start + tl.arange(0, ROWS)
    at = bh.to(tl.int64) * T + row
    delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1) - tl.load(DL + at, mask=row < T, other=0.0)
    tl.store(Delta + at, delta, mask=row < T)


@triton.jit
def row_sums(at, row, T):
    """L of some rows, to base 2. A row that saw nothing has −∞ and is given +∞, so that its weights are 0, not NaN."""
    l = tl.load(at + row, mask=row < T, other=float("inf"))
    return tl.where(l == float("-inf"), float("inf"), l) * LOG2E


@triton.jit
def dq_span(
    dq, q, dy, lse, delta, k_at, v_at, bias_at, seg_at, low, high, i, q_seg, stride_ks, stride_vs, S, window, lead,
    score_scale, cap, E: tl.constexpr, D: tl.constexpr, PADDED_E: tl.constexpr, PADDED_D: tl.constexpr,
    COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to dq what keys low…high-1 say."""
    for start in tl.range(low, high, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        k = load(k_at, stride_ks, start, S, COLUMNS, E, PADDED_E, MASKED)
        v = load(v_at, stride_vs, start, S, COLUMNS, D, PADDED_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
        dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
        slope = 1.0
        if SOFTCAP:
            bent = tanh(s)
            s, slope = bent * cap, 1.0 - bent * bent
        if BIAS:
            s += (tl.load(bias_at + j, mask=j < S, other=0.0).to(tl.float32) * LOG2E)[None, :]
        p = tl.exp2(s - lse[:, None])
        if MASKED:
            k_seg = tl.load(seg_at + j, mask=j < S, other=0)[None, :] if SEGMENTS else 0
            keep = visible(i[:, None], j[None, :], S, window, lead, q_seg, k_seg, CAUSAL, WINDOW, SEGMENTS)
            p = tl.where(keep, p, 0.0)
        ds = p * (dp - delta[:, None]) * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(
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
    q = load(Q + b * stride_qb + h * stride_qh, stride_qt, start, T, ROWS, E, PADDED_E, True)
    dy = load(DY + b * stride_ob + h * stride_oh, stride_ot, start, T, ROWS, D, PADDED_D, True)
    lse = row_sums(L + bh.to(tl.int64) * T, row, T)
    delta = tl.load(Delta + bh.to(tl.int64) * T + row, mask=row < T, other=0.0)
    q_seg = tl.load(QSeg + b * T + row, mask=row < T, other=0)[:, None] if SEGMENTS else 0
    dq = tl.zeros([ROWS, PADDED_E], tl.float32)
    last = S - T + tl.minimum(start + ROWS, T) - 1
    low, full, full_end, high = key_interval(S - T + start, last, S, window, COLUMNS, CAUSAL, WINDOW)
    if SEGMENTS:
        full = low
        full_end = low
    if WINDOW:
        dq = dq_span(
            dq, q, dy, lse, delta, k_at, v_at, bias_at, seg_at, 0, tl.minimum(lead, low), i, q_seg, stride_ks,
            stride_vs, S, window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, COLUMNS, CAUSAL, WINDOW, SOFTCAP,
            BIAS, SEGMENTS, PRECISION, True,
        )  # fmt: skip
        dq = dq_span(
            dq, q, dy, lse, delta, k_at, v_at, bias_at, seg_at, low, tl.minimum(full, high), i, q_seg, stride_ks,
            stride_vs, S, window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, COLUMNS, CAUSAL, WINDOW, SOFTCAP,
            BIAS, SEGMENTS, PRECISION, True,
        )  # fmt: skip
    if not SEGMENTS:
        dq = dq_span(
            dq, q, dy, lse, delta, k_at, v_at, bias_at, seg_at, full, full_end, i, q_seg, stride_ks, stride_vs, S,
            window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, COLUMNS, CAUSAL, WINDOW, SOFTCAP, BIAS, SEGMENTS,
            PRECISION, False,
        )  # fmt: skip
    dq = dq_span(
        dq, q, dy, lse, delta, k_at, v_at, bias_at, seg_at, tl.maximum(full, full_end), high, i, q_seg, stride_ks,
        stride_vs, S, window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, COLUMNS, CAUSAL, WINDOW, SOFTCAP, BIAS,
        SEGMENTS, PRECISION, True,
    )  # fmt: skip
    store(dq * scale, DQ + b * stride_gb + h * stride_gh, stride_gt, start, T, ROWS, E, PADDED_E)


@triton.jit
def dkdv_span(
    dk, dv, dbias, k, v, bias, q_at, dy_at, l_at, delta_at, seg_at, low, high, j, k_seg, stride_qt, stride_ot, T, S,
    window, lead, score_scale, cap, E: tl.constexpr, D: tl.constexpr, PADDED_E: tl.constexpr, PADDED_D: tl.constexpr,
    ROWS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to dk, dv and dbias what query rows low…high-1 say. Tiles of scores stand on their side: [keys, queries]."""
    for start in tl.range(low, high, ROWS):
        row = start + tl.arange(0, ROWS)
        q = load(q_at, stride_qt, start, T, ROWS, E, PADDED_E, not EVEN)
        dy = load(dy_at, stride_ot, start, T, ROWS, D, PADDED_D, not EVEN)
        lse = row_sums(l_at, row, T)
        delta = tl.load(delta_at + row, mask=row < T, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * score_scale
        dp = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
        slope = 1.0
        if SOFTCAP:
            bent = tanh(s)
            s, slope = bent * cap, 1.0 - bent * bent
        if BIAS:
            s += bias[:, None]
        p = tl.exp2(s - lse[None, :])
        if MASKED:
            q_seg = tl.load(seg_at + row, mask=row < T, other=0)[None, :] if SEGMENTS else 0
            i = S - T + row
            keep = visible(i[None, :], j[:, None], S, window, lead, q_seg, k_seg, CAUSAL, WINDOW, SEGMENTS)
            p = tl.where(keep, p, 0.0)
        dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if BIAS:
            dbias += tl.sum(ds, 1)
        dk = tl.dot((ds * slope).to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, dbias


@triton.jit
def dkdv_kernel(
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
    k = load(K + b * stride_kb + kv * stride_kh, stride_ks, start, S, COLUMNS, E, PADDED_E, True)
    v = load(V + b * stride_vb + kv * stride_vh, stride_vs, start, S, COLUMNS, D, PADDED_D, True)
    j = start + tl.arange(0, COLUMNS)
    k_seg = tl.load(KSeg + b * S + j, mask=j < S, other=0)[:, None] if SEGMENTS else 0
    seg_at = QSeg + b * T if SEGMENTS else QSeg
    dk = tl.zeros([COLUMNS, PADDED_E], tl.float32)
    dv = tl.zeros([COLUMNS, PADDED_D], tl.float32)
    last = tl.minimum(start + COLUMNS, S) - 1
    low, full, full_end, high = query_interval(start, last, T, S - T, window, ROWS, CAUSAL, WINDOW)
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
            dk, dv, dbias = dkdv_span(
                dk, dv, dbias, k, v, bias, q_at, dy_at, l_at, delta_at, seg_at, low, tl.minimum(full, high), j, k_seg,
                stride_qt, stride_ot, T, S, window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, ROWS, CAUSAL,
                WINDOW, SOFTCAP, BIAS, SEGMENTS, PRECISION, EVEN, True,
            )  # fmt: skip
        if not SEGMENTS:
            dk, dv, dbias = dkdv_span(
                dk, dv, dbias, k, v, bias, q_at, dy_at, l_at, delta_at, seg_at, full, full_end, j, k_seg, stride_qt,
                stride_ot, T, S, window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, ROWS, CAUSAL, WINDOW,
                SOFTCAP, BIAS, SEGMENTS, PRECISION, EVEN, False,
            )  # fmt: skip
        if WINDOW or SEGMENTS:
            dk, dv, dbias = dkdv_span(
                dk, dv, dbias, k, v, bias, q_at, dy_at, l_at, delta_at, seg_at, tl.maximum(full, full_end), high, j,
                k_seg, stride_qt, stride_ot, T, S, window, lead, score_scale, cap, E, D, PADDED_E, PADDED_D, ROWS,
                CAUSAL, WINDOW, SOFTCAP, BIAS, SEGMENTS, PRECISION, EVEN, True,
            )  # fmt: skip
        if BIAS:
            tl.store(DBias + (b * H + h) * S + j, dbias, mask=j < S)
    store(dk * scale, DK + b * stride_gb + kv * stride_gh, stride_gs, start, S, COLUMNS, E, PADDED_E)
    store(dv, DV + b * stride_wb + kv * stride_wh, stride_ws, start, S, COLUMNS, D, PADDED_D)
