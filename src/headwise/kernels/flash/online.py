"""Flash attention in plain torch: one tile of scores at a time, a running maximum and a running sum (document 001).

A row's softmax needs its maximum and its sum over all keys, but both can grow with the keys seen so far. For a new
block of scores s with maximum m_blk, what is held is put on the new scale and the block is added (Milakov and
Gimelshein 2018; Dao et al. 2022):

    m' = max(m, m_blk)      l' = l·e^{m−m'} + Σ e^{s−m'}      y' = y·e^{m−m'} + e^{s−m'} V

At the end y/l is the row's output and m + log l the logarithm of its sum. Adding up the softmaxes of the blocks, as
document 001's class does, leaves out both the rescaling and the shared sum: its rows weigh as much as there are blocks.

This form is for reading and for tests. It is differentiable by autograd, which keeps every tile for the backward pass;
the Triton kernels make the tiles anew instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.kernels.flash import naive


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
    rows: int = 64,
    columns: int = 64,
) -> tuple[Tensor, Tensor]:
    """As `naive.attention`, in tiles of `rows` queries by `columns` keys; no larger score tensor is made."""
    (_, H, T, _), (_, K, S, _) = q_BHTE.shape, k_BKSE.shape
    k_BHSE, v_BHSD = (x.repeat_interleave(H // K, dim=1) for x in (k_BKSE, v_BKSD))
    bias_BHS = None if key_bias is None else key_bias.repeat_interleave(H // key_bias.shape[1], dim=1)
    visible = naive.visible(T, S, causal, window, lead, segments, q_BHTE.device)
    outputs, sums = [], []
    for top in range(0, T, rows):
        q = q_BHTE[:, :, top : top + rows]
        m = torch.full_like(q[..., :1], -torch.inf)
        l = torch.zeros_like(m)
        y = torch.zeros_like(q[..., :1]).expand(*q.shape[:-1], v_BHSD.shape[-1])
        for left in range(0, S, columns):
            block = slice(left, left + columns)
            keep = visible[..., top : top + rows, block]
            if not keep.any():  # nothing to add; and e^{−∞−(−∞)} would be NaN in a row that has seen no key yet
                continue
            s = scale * (q @ k_BHSE[:, :, block].transpose(-1, -2))
            if softcap is not None:
                s = softcap * (s / softcap).tanh()
            if bias_BHS is not None:
                s = s + bias_BHS[:, :, None, block]
            s = s.masked_fill(~keep, -torch.inf)
            # A constant to autograd: the result does not depend on m.
            m_new = torch.maximum(m, s.detach().amax(-1, keepdim=True))
            shift = m_new.masked_fill(m_new == -torch.inf, 0.0)  # the same NaN, of one row within the block
            p, kept = (s - shift).exp(), (m - shift).exp()
            l = l * kept + p.sum(-1, keepdim=True)
            y = y * kept + p @ v_BHSD[:, :, block]
            m = m_new
        l = l.masked_fill(l == 0, 1.0)  # a row that saw nothing: y stays 0, m stays −∞
        outputs.append(y / l)
        sums.append((m + l.log()).squeeze(-1))
    return torch.cat(outputs, 2), torch.cat(sums, 2)
