# mypy: allow-untyped-defs
"""Paged attention as a Triton kernel: a program looks up where its keys lie and reads them there.

The query heads of one key head and the tokens of a row are the rows of one matrix, token by token, so that a key is
read once for all of its heads; with few rows, as in decoding, the matrix is filled up to 16. To keep a GPU busy with
few rows, keys are split among programs as well (flash decoding, Dao et al. 2023): each leaves its output and the
logarithm of its sum, by which they are weighed together. Exponentials are to base 2, so scores are held times log₂ e.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.kernels.flash.tiles import LN2, LOG2E, tanh

COLUMNS = 64  # keys a step
PROGRAMS = 512  # as many as a large GPU works on at once
LEAST_SPAN = 256  # keys that are worth a program


@triton.jit
def paged_kernel(
    Q, K, V, Tables, Lens, Bias, Y, L,
    stride_qb, stride_qh, stride_qt, stride_kn, stride_ks, stride_kh, stride_vn, stride_vs, stride_vh,
    stride_tb, stride_bb, stride_bh,
    H, T, KV_HEADS, BLOCK, window, span, score_scale, cap, GROUP, BIAS_GROUP,
    E: tl.constexpr, D: tl.constexpr, PADDED_E: tl.constexpr, PADDED_D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some rows of one sequence and key head against `span` of the keys."""
    b, kv = tl.cast(tl.program_id(1) // KV_HEADS, tl.int64), tl.program_id(1) % KV_HEADS
    length = tl.load(Lens + b)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e, d = tl.arange(0, PADDED_E), tl.arange(0, PADDED_D)
    t, h = row // GROUP, kv * GROUP + row % GROUP
    inside = t < T
    i = length - T + t
    q_at = Q + b * stride_qb + h[:, None] * stride_qh + t[:, None] * stride_qt + e[None, :]
    q = tl.load(q_at, mask=inside[:, None] & (e[None, :] < E), other=0.0)
    first = length - T + tl.program_id(0) * ROWS // GROUP
    last = length - T + tl.minimum((tl.program_id(0) * ROWS + ROWS - 1) // GROUP, T - 1)
    low = tl.program_id(2) * span
    high = tl.minimum(low + span, last + 1)
    if WINDOW:
        low = tl.maximum(low, first - window + 1)
    y = tl.zeros([ROWS, PADDED_D], tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    for start in tl.range(low, high, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        held = j < high
        block = tl.load(Tables + b * stride_tb + j // BLOCK, mask=held, other=0).to(tl.int64)
        k_at = K + block * stride_kn + j % BLOCK * stride_ks + kv * stride_kh
        k = tl.load(k_at[:, None] + e[None, :], mask=held[:, None] & (e[None, :] < E), other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
        if SOFTCAP:
            s = tanh(s) * cap
        if BIAS:
            bias_at = Bias + b * stride_bb + h[:, None] // BIAS_GROUP * stride_bh + j[None, :]
            s += tl.load(bias_at, mask=inside[:, None] & held[None, :], other=0.0).to(tl.float32) * LOG2E
        seen = held[None, :] & (j[None, :] <= i[:, None])
        if WINDOW:
            seen = seen & (i[:, None] - j[None, :] < window)
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # rows that have seen no key yet: −∞ − −∞ would be NaN
        p, kept = tl.exp2(s - shift[:, None]), tl.exp2(m - shift)
        v_at = V + block * stride_vn + j % BLOCK * stride_vs + kv * stride_vh
        v = tl.load(v_at[:, None] + d[None, :], mask=held[:, None] & (d[None, :] < D), other=0.0)
        y = tl.dot(p.to(v.dtype), v, y * kept[:, None], input_precision=PRECISION)
        l = l * kept + tl.sum(p, 1)
        m = m_new
    l = tl.where(l == 0.0, 1.0, l)  # a row that saw nothing: y stays 0 and m −∞
    at = ((tl.program_id(2) * tl.num_programs(1) // KV_HEADS + b) * H + h) * T + t
    tl.store(L + at, (m + tl.log2(l)) * LN2, mask=inside)
    tl.store(Y + at[:, None] * D + d[None, :], y / l[:, None], mask=inside[:, None] & (d[None, :] < D))


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    key_bias: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """As `kernels.paged_attention.attention` for queries [B,H,T,E]; sums are float32. `splits` parts of the keys go to
    programs of their own; None chooses.
    """
    (B, H, T, E), D = query.shape, value_cache.shape[-1]
    block_size, K = key_cache.shape[1:3]
    dtype, group = query.dtype, H // K
    if query.device.type == "cpu" and dtype == torch.bfloat16:  # the interpreter multiplies bfloat16's bits as integers
        query, key_cache, value_cache = query.float(), key_cache.float(), value_cache.float()
    query, key_cache, value_cache = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (query, key_cache, value_cache)
    )
    longest = block_tables.shape[1] * block_size
    rows = 16 if T * group <= 16 else 64
    tiles = triton.cdiv(T * group, rows)
    if splits is None:
        splits = max(1, min(PROGRAMS // (tiles * B * K), longest // LEAST_SPAN))
    span = triton.cdiv(triton.cdiv(longest, splits), COLUMNS) * COLUMNS
    y = query.new_empty(splits, B, H, T, D, dtype=torch.float32)
    lse = query.new_empty(splits, B, H, T, dtype=torch.float32)
    bias = query if key_bias is None else key_bias
    bias_strides = (0, 0) if key_bias is None else (key_bias.stride(0) if len(key_bias) > 1 else 0, key_bias.stride(1))
    with torch.cuda.device_of(query):
        paged_kernel[(tiles, B * K, splits)](
            query, key_cache, value_cache, block_tables, context_lens, bias, y, lse,
            *query.stride()[:3], *key_cache.stride()[:3], *value_cache.stride()[:3],
            block_tables.stride(0), *bias_strides,
            H, T, K, block_size, window or 0, span,
            scale / softcap if softcap else scale * LOG2E.value, softcap * LOG2E.value if softcap else 0.0,
            group, 1 if key_bias is None else H // key_bias.shape[1],
            E, D, max(16, triton.next_power_of_2(E)), max(16, triton.next_power_of_2(D)), rows, COLUMNS,
            WINDOW=window is not None, SOFTCAP=softcap is not None, BIAS=key_bias is not None,
            PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        )  # fmt: skip
    total_BHT = lse.logsumexp(0)
    if sink_H is not None:
        total_BHT = torch.logaddexp(total_BHT, sink_H.float()[:, None].expand_as(total_BHT))
    return (y * (lse - total_BHT).exp()[..., None]).sum(0).to(dtype)
