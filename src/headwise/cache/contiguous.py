"""The plain caches: one block of keys and one of values a layer, growing or of a fixed size (document 002)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from headwise.cache.base import TokenCache
from headwise.errors import HeadwiseError


class LayerCache(TokenCache):
    """Keys [B,K,S,D] and values [B,K,S,D] of one layer, in buffers that double when full."""

    kind = "contiguous"

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []

    def append(self, *new: Tensor, segments_BS: Tensor | None = None) -> tuple[Tensor, ...]:
        """Store tensors [B,K,T,·] after those held and return everything held, each [B,K,S,·]."""
        stop = self.length + new[0].shape[2]
        if not self._buffers or stop > self._buffers[0].shape[2]:
            self._grow(stop, new)
        for buffer, t in zip(self._buffers, new):
            buffer[:, :, self.length : stop] = t
        self.length = stop
        return tuple(buffer[:, :, :stop] for buffer in self._buffers)

    def reserve(self, n_tokens: int) -> None:
        stop = self.length + n_tokens
        if self._buffers and stop > self._buffers[0].shape[2]:
            self._grow(stop, self._buffers)

    def _grow(self, stop: int, like: Sequence[Tensor]) -> None:
        """New buffers for `stop` tokens at least, of tensors like these, with what is held."""
        capacity = self._capacity(stop)
        grown = [t.new_empty(*t.shape[:2], capacity, t.shape[3]) for t in like]
        for buffer, old in zip(grown, self._buffers):
            buffer[:, :, : self.length] = old[:, :, : self.length]
        self._buffers = grown

    def held(self) -> tuple[Tensor, ...]:
        """Everything held, each [B,K,S,·]; empty before the first token."""
        return tuple(buffer[:, :, : self.length] for buffer in self._buffers)

    def _capacity(self, stop: int) -> int:
        """Tokens the next buffers have room for, `stop` at least."""
        return max(stop, 2 * self.length, 16)

    def crop(self, length: int) -> None:
        self.length = min(self.length, length)

    def tensors(self) -> list[Tensor]:
        return self._buffers

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        self._buffers = [change(t) for t in self._buffers]

    @property
    def used_bytes(self) -> int:
        return self.n_bytes * self.length // self._buffers[0].shape[2] if self._buffers else 0


class LatentCache(LayerCache):
    """The same for what low-rank attention keeps: MLA's latents and shared rotated keys [B,1,S,r+D_R], or keys and
    values inside a vein (TVA), r numbers a head each.
    """

    kind = "latent"


class StaticCache(LayerCache):
    """Room for `max_len` tokens from the first on: nothing moves, and memory does not depend on the text.

    Raises:
        HeadwiseError: a token has no room.
    """

    kind = "static"

    def __init__(self, max_len: int) -> None:
        super().__init__()
        self.max_len = max_len

    def _capacity(self, stop: int) -> int:
        if stop > self.max_len:
            raise HeadwiseError(
                f"a static cache with room for max_len={self.max_len} tokens cannot hold {stop}; "
                "make it larger, or take the kind contiguous, which grows"
            )
        return self.max_len
