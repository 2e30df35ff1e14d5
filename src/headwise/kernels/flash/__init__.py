"""Flash attention: `naive` on paper, `online` in tiles of plain torch, `forward` and `backward` as Triton kernels.

`launch` makes operators of the kernels; `tiles` has the device functions that both directions use.

Triton is imported when a kernel is first asked for, never by importing headwise.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from headwise.errors import HeadwiseError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Rows that fill a tile: with fewer queries the kernels compute mostly padding.
MIN_QUERIES = 16
MAX_WIDTH = 256

_INSTALLED = find_spec("triton") is not None


def available(q_BHTE: Tensor, v_BKSD: Tensor | None = None) -> bool:
    """Whether the Triton kernels serve such queries (and values): on CUDA, with enough rows, in a dtype they have."""
    width = max(q_BHTE.shape[-1], 0 if v_BKSD is None else v_BKSD.shape[-1])
    fits = q_BHTE.shape[2] >= MIN_QUERIES and width <= MAX_WIDTH
    return _INSTALLED and q_BHTE.is_cuda and q_BHTE.dtype in DTYPES and fits


def attention(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSD: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    lead: int = 0,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`naive.attention` by the Triton kernels: memory linear in the length, time by what is visible.

    Inputs are float16, bfloat16 or float32, all of one dtype; sums are float32. `key_bias` may be float32 whatever the
    rest is. Differentiable once in q, k, v and `key_bias`, also through the second result. Under autocast q, k and v
    are cast to its dtype. Runs on CUDA, and on a CPU in Triton's interpreter (`TRITON_INTERPRET=1`).

    Returns:
        y [B,H,T,D] in the inputs' dtype and log Σ_j e^{s_ij} [B,H,T] in float32, −∞ for a query that sees no key.

    Raises:
        HeadwiseError: where shapes or dtypes do not fit together, or a number is out of its range.
    """
    from headwise.kernels.flash import launch

    device = q_BHTE.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q_BHTE, k_BKSE, v_BKSD = q_BHTE.to(dtype), k_BKSE.to(dtype), v_BKSD.to(dtype)
    _check(q_BHTE, k_BKSE, v_BKSD, scale, window, softcap, key_bias, segments)
    if window is not None and window >= k_BKSE.shape[2]:
        window = None
    q_seg, k_seg = segments if segments is not None else (None, None)
    dtype = q_BHTE.dtype
    if device == "cpu" and dtype == torch.bfloat16:  # Triton's interpreter multiplies bfloat16's bits as integers
        q_BHTE, k_BKSE, v_BKSD = q_BHTE.float(), k_BKSE.float(), v_BKSD.float()
    y_BHTD, lse_BHT = launch.forward(
        q_BHTE, k_BKSE, v_BKSD, key_bias, q_seg, k_seg, scale, causal, window, lead, softcap
    )
    return y_BHTD.to(dtype), lse_BHT


def fused(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSD: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    lead: int = 0,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """The output alone, where the kernels are available and torch's own cannot do the same in one kernel; else None.

    `sink_H` adds e^{s_h} to the sum of each row of head h: what is left of y is its former share of the new sum.
    """
    T, S = q_BHTE.shape[2], k_BKSE.shape[2]
    stock = window is None and softcap is None and sink_H is None and segments is None and (not causal or T == S)
    if stock or not available(q_BHTE, v_BKSD):
        return None
    y_BHTD, lse_BHT = attention(
        q_BHTE, k_BKSE, v_BKSD, scale=scale, causal=causal, window=window, lead=lead, softcap=softcap, segments=segments
    )  # fmt: skip
    if sink_H is None:
        return y_BHTD
    return (y_BHTD * torch.sigmoid(lse_BHT - sink_H[:, None])[..., None]).to(y_BHTD.dtype)


def _check(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSD: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    key_bias: Tensor | None,
    segments: tuple[Tensor, Tensor] | None,
) -> None:
    """The first thing that does not fit, said in one line."""
    (B, H, T, E), (_, K, S, _), D = q_BHTE.shape, k_BKSE.shape, v_BKSD.shape[-1]
    if k_BKSE.shape != (B, K, S, E) or v_BKSD.shape != (B, K, S, D) or H % K or T > S:
        given = ", ".join(str(tuple(x.shape)) for x in (q_BHTE, k_BKSE, v_BKSD))
        raise HeadwiseError(f"q, k, v are {given}; wanted [B,H,T,E], [B,K,S,E], [B,K,S,D] with K dividing H and T ≤ S")
    if q_BHTE.dtype not in DTYPES or not q_BHTE.dtype == k_BKSE.dtype == v_BKSD.dtype:
        given = ", ".join(str(x.dtype) for x in (q_BHTE, k_BKSE, v_BKSD))
        raise HeadwiseError(f"q, k, v are {given}; the kernels want one of float16, bfloat16, float32 for all three")
    if max(E, D) > MAX_WIDTH:
        raise HeadwiseError(f"heads of width {max(E, D)}; the kernels go up to {MAX_WIDTH}")
    if scale <= 0 or (softcap is not None and softcap <= 0) or (window is not None and window <= 0):
        raise HeadwiseError(f"scale={scale}, softcap={softcap}, window={window}: those that are given must be positive")
    if key_bias is not None and not (
        key_bias.ndim == 3 and key_bias.shape[0] in (1, B) and key_bias.shape[1] in (1, K, H) and key_bias.shape[2] == S
    ):
        raise HeadwiseError(f"key_bias is {tuple(key_bias.shape)}; wanted [{B} or 1, 1, {K} or {H}, {S}]")
    if segments is not None and (segments[0].shape != (B, T) or segments[1].shape != (B, S)):
        given = " and ".join(str(tuple(x.shape)) for x in segments)
        raise HeadwiseError(f"segments are {given}; wanted [{B},{T}] of the queries and [{B},{S}] of the keys")
