"""Document 002's caches under the document's names, each made of the package's own parts.

    cache = KVCache(batch_size=2, max_seq_len=64, n_heads=4, head_dim=16)
    cache.update(batch_idx=0, start_pos=0, k=k, v=v)      # [H,T,D] each
    k, v = cache.get(batch_idx=0, end_pos=5)

    paged = PagedAttention()
    y = paged(query, key_cache, value_cache, block_tables, context_lens, block_size=16, max_context_len=40)

What is computed stands in `kernels/paged_attention`; a model's own caches, which `model.new_cache(kind)` makes, in
`cache/`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.kernels import paged_attention

__all__ = ["KVCache", "PagedAttention"]


class KVCache:
    """Keys and values of a batch, with room for `max_seq_len` tokens a row from the first on.

    Args:
        batch_size, max_seq_len, n_heads, head_dim: the room, [B,H,S,D].
        dtype, device: of the tensors.
    """

    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        n_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (batch_size, n_heads, max_seq_len, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * batch_size

    def update(self, batch_idx: int, start_pos: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values [H,T,D] of row `batch_idx` from position `start_pos` on; forget what stood behind.

        Returns:
            all keys and values of the row, [H,S,D].

        Raises:
            HeadwiseError: no such row, a gap before `start_pos`, no room, or other heads or widths.
        """
        stop = start_pos + k.shape[-2]
        rows, heads, room, width = self.k.shape
        if not 0 <= batch_idx < rows:
            raise HeadwiseError(f"batch_idx: given {batch_idx}, should lie in 0…{rows - 1}")
        if k.shape != v.shape or k.dim() != 3 or (k.shape[0], k.shape[2]) != (heads, width):
            given = f"{tuple(k.shape)} and {tuple(v.shape)}"
            raise HeadwiseError(f"k and v: given {given}, should both be [{heads},T,{width}]")
        if not 0 <= start_pos <= self.lengths[batch_idx] or stop > room:
            held = f"row {batch_idx} holds {self.lengths[batch_idx]} tokens and has room for {room}"
            raise HeadwiseError(f"start_pos: {start_pos} with {k.shape[-2]} new tokens given, but {held}")
        self.k[batch_idx, :, start_pos:stop], self.v[batch_idx, :, start_pos:stop] = k, v
        self.lengths[batch_idx] = stop
        return self.get(batch_idx)

    def get(self, batch_idx: int, end_pos: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [H,S,D] of a row, as far as they go, or before `end_pos`."""
        stop = min(self.lengths[batch_idx], end_pos if end_pos is not None else self.lengths[batch_idx])
        return self.k[batch_idx, :, :stop], self.v[batch_idx, :, :stop]

    def clear(self, batch_idx: int | None = None) -> None:
        """Forget a row, or all rows."""
        for row in range(len(self.lengths)) if batch_idx is None else [batch_idx]:
            self.lengths[row] = 0


class PagedAttention(nn.Module):
    """Attention to keys and values in the blocks of a pool.

    Args:
        scale: of the inner products; 1/√D by default.
    """

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        block_size: int,
        max_context_len: int,
    ) -> Tensor:
        """As `query` [B,H,D], one token a row, or [B,H,T,D], each row's last T tokens, which see each other causally.

        Args:
            query: float.
            key_cache, value_cache: float [N,block_size,K,D].
            block_tables: int32 [B,max_blocks].
            context_lens: int32 [B], the query's tokens included.
            block_size: of the caches.
            max_context_len: of the rows; what block tables list beyond is not looked at.

        Raises:
            HeadwiseError: shapes that do not fit together, or a row longer than `max_context_len`.
        """
        if block_size != key_cache.shape[1]:
            raise HeadwiseError(f"block_size: given {block_size}, but the cache's blocks hold {key_cache.shape[1]}")
        tables = block_tables[:, : -(-max_context_len // block_size)]
        return paged_attention.attention(query, key_cache, value_cache, tables, context_lens, scale=self.scale)
