"""The plain cache: one growing block of keys and one of values a layer (document 002)."""

from __future__ import annotations

from torch import Tensor


class LayerCache:
    """Keys [B,K,S,D] and values [B,K,S,D] of one layer, in buffers that double when full."""

    def __init__(self) -> None:
        self.length = 0
        self._buffers: list[Tensor] = []

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Store tensors [B,K,T,·] after those held and return everything held, each [B,K,S,·]."""
        stop = self.length + new[0].shape[2]
        if not self._buffers or stop > self._buffers[0].shape[2]:
            capacity = max(stop, 2 * self.length, 16)
            grown = [t.new_empty(*t.shape[:2], capacity, t.shape[3]) for t in new]
            for buffer, old in zip(grown, self._buffers):
                buffer[:, :, : self.length] = old[:, :, : self.length]
            self._buffers = grown
        for buffer, t in zip(self._buffers, new):
            buffer[:, :, self.length : stop] = t
        self.length = stop
        return tuple(buffer[:, :, :stop] for buffer in self._buffers)

    def crop(self, length: int) -> None:
        """Forget every position from `length` on."""
        self.length = min(self.length, length)

    def reorder(self, rows: Tensor) -> None:
        """Keep the rows int64 [B'] of the batch, in this order; a row may come several times or never."""
        self._buffers = [buffer[rows.to(buffer.device)] for buffer in self._buffers]

    @property
    def n_bytes(self) -> int:
        """Bytes held, spare capacity included."""
        return sum(b.numel() * b.element_size() for b in self._buffers)
