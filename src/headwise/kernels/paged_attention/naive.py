"""Paged attention as it is written on paper: look every token up in the block table, then attend."""

from __future__ import annotations

import torch
from torch import Tensor


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
) -> Tensor:
    """Row b's token j lies in block `block_tables[b, j // block_size]` at offset j mod block_size, for j < its length.

    The queries [B,H,T,E] are the last T of each row's tokens and see those before them and themselves. Arguments are
    those of `kernels.paged_attention.attention`.

    Returns:
        [B,H,T,D].
    """
    (_, H, T, _), (_, block_size, K, _) = query.shape, key_cache.shape
    outputs = []
    for b, length in enumerate(context_lens.tolist()):
        j = torch.arange(length, device=query.device)
        i = j[length - T :, None]
        blocks = block_tables[b].long()[j // block_size]
        k_HSE, v_HSD = (
            cache[blocks, j % block_size].transpose(0, 1).repeat_interleave(H // K, 0)
            for cache in (key_cache, value_cache)
        )
        scores_HTS = scale * (query[b] @ k_HSE.transpose(-1, -2))
        if softcap is not None:
            scores_HTS = softcap * torch.tanh(scores_HTS / softcap)
        if key_bias is not None:
            bias_NS = key_bias[b if len(key_bias) > 1 else 0, :, :length]
            scores_HTS = scores_HTS + bias_NS.repeat_interleave(H // len(bias_NS), 0)[:, None]
        seen = (j <= i) if window is None else (j <= i) & (i - j < window)
        scores_HTS = scores_HTS.masked_fill(~seen, -torch.inf)
        if sink_H is not None:
            scores_HTS = torch.cat([scores_HTS, sink_H.to(scores_HTS.dtype)[:, None, None].expand(H, T, 1)], -1)
        weights_HTS = scores_HTS.softmax(-1)[..., :length]
        outputs.append(weights_HTS.to(v_HSD.dtype) @ v_HSD)
    return torch.stack(outputs)
