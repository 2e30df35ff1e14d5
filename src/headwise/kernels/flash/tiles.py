# mypy: allow-untyped-defs
"""What the kernels of both directions are made of: tiles read and written, and which keys and queries meet.

Which keys a tile of rows can reach is an interval; it falls into a part in which every key is visible, which needs no
mask, and what is left and right of it. Tiles outside of the interval are never loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh to a few units in the last place: a polynomial near 0 (Cephes), where 1 − 2/(e^{2x} + 1) would cancel."""
    z = x * x
    p = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    near = (p - 3.33332819422e-1) * z * x + x
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def load(at, stride, start, bound, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHECK: tl.constexpr):
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
def store(tile, at, stride, start, bound, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The counterpart of `load`: write a tile back in the dtype of where it goes."""
    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    at = at + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :]
    inside = ((start + row)[:, None] < bound) & (column[None, :] < WIDTH)
    tl.store(at, tile.to(at.dtype.element_ty), mask=inside)


@triton.jit
def visible(i, j, S, window, lead, q_seg, k_seg, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):
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
def key_interval(
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
def query_interval(
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
