"""Paged attention as it is written on paper: look every token up in the block table, then attend."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.kernels.attention import naive


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
    block_size, outputs = key_cache.shape[1], []
    for b, length in enumerate(context_lens.tolist()):
        j = torch.arange(length, device=query.device)
        blocks = block_tables[b].long()[j // block_size]
        k_KSE, v_KSD = (cache[blocks, j % block_size].transpose(0, 1) for cache in (key_cache, value_cache))
        bias_HTS = None
        if key_bias is not None:
            row = key_bias[b if len(key_bias) > 1 else 0, :, :length]
            bias_HTS = row.repeat_interleave(query.shape[1] // len(row), 0)[:, None]
        y, _ = naive.attention(
            query[b : b + 1], k_KSE[None], v_KSD[None], scale=scale, window=window, softcap=softcap, sink_H=sink_H,
            bias_HTS=bias_HTS,
        )  # fmt: skip
        outputs.append(y)
    return torch.cat(outputs)
