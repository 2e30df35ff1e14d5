"""The plain cache: one growing block of keys and one of values a layer (document 002)."""

from __future__ import annotations

import torch
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

    @property
    def n_bytes(self) -> int:
        """Bytes held, spare capacity included."""
        return sum(b.numel() * b.element_size() for b in self._buffers)


class ContiguousCache:
    """A cache for a whole model: one `LayerCache` a layer, and what the model must remember of the tokens.

    Args:
        n_layers: layers of the model (decoder layers for an encoder–decoder).
    """

    def __init__(self, n_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(n_layers)]
        self.segments_BS: Tensor | None = None
        self.memory: tuple[Tensor, Tensor | None] | None = None

    @property
    def length(self) -> int:
        """Positions held."""
        return self.layers[0].length

    @property
    def n_bytes(self) -> int:
        """Bytes of all layers' buffers."""
        return sum(layer.n_bytes for layer in self.layers)

    def append_segments(self, segments_BT: Tensor | None, n_new: int) -> Tensor | None:
        """Remember the segments of `n_new` new tokens; return those of all positions [B,S], None while none were given.

        Call it before the layers append. Tokens without segments continue their row's last one.
        """
        held = self.segments_BS
        if segments_BT is None and held is None:
            return None
        if segments_BT is None:
            assert held is not None
            segments_BT = held[:, -1:].expand(-1, n_new)
        if held is None:
            held = segments_BT[:, :1].expand(-1, self.length)
        self.segments_BS = torch.cat([held, segments_BT], dim=1)
        return self.segments_BS

    def crop(self, length: int) -> None:
        """Forget every position from `length` on."""
        for layer in self.layers:
            layer.crop(length)
        if self.segments_BS is not None:
            self.segments_BS = self.segments_BS[:, :length]
