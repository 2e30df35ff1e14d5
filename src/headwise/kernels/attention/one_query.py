"""Attention of one query in a compiled step, as loops that torch's compiler makes: sums over keys and over values.

torch's fused kernel is made for many queries: with one it reads keys and values slower than memory gives them, above
all in bfloat16. A bias, a soft-cap or a sink changes scores, which are few, in place of the keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.kernels import one_row


def serves(q_BHTE: Tensor) -> bool:
    """Whether the queries are those of one token in a program that is being compiled for a CPU, without gradients."""
    return one_row.compiling(q_BHTE) and q_BHTE.shape[2] == 1


def attention(
    q_BH1E: Tensor,
    k_BKSE: Tensor,
    v_BKSD: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    bias_factors: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention to every key, as `sdpa.attention` defines it: [B,H,1,D]."""
    exact = torch.promote_types(q_BH1E.dtype, torch.float32)
    heads = (k_BKSE.shape[1], q_BH1E.shape[1] // k_BKSE.shape[1])  # [K,G]: the queries of one key head are neighbours
    q_BKG1E = one_row.stored((q_BH1E.to(exact) * scale).unflatten(1, heads))
    s_BKGS = (q_BKG1E * k_BKSE[:, :, None]).sum(-1)
    if softcap is not None:
        s_BKGS = softcap * torch.tanh(s_BKGS / softcap)
    if bias_factors is not None:
        a_HTn, b_Sn = (each.to(exact) for each in bias_factors)
        bias = (a_HTn * b_Sn[..., None, :, :]).sum(-1)
        s_BKGS = s_BKGS + bias.unflatten(-2, heads)
    if sink_H is not None:
        sink_BKG1 = sink_H.to(exact).view(*heads, 1).expand(len(s_BKGS), *heads, 1)
        w_BKGS = torch.cat([sink_BKG1, s_BKGS], -1).softmax(-1)[..., 1:]
    else:
        w_BKGS = s_BKGS.softmax(-1)
    y_BKGD = (one_row.stored(w_BKGS)[..., None] * v_BKSD[:, :, None]).sum(-2)
    return y_BKGD.flatten(1, 2)[:, :, None].to(q_BH1E.dtype)
