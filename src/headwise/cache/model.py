"""A whole model's cache: one cache a layer, and what the model itself must remember of the tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from headwise.cache.contiguous import LayerCache
from headwise.cache.recurrent import RecurrentCache

AnyLayerCache = LayerCache | RecurrentCache


class ModelCache:
    """Made by `model.new_cache()`; handed to every call, it grows with the tokens.

    Args:
        layers: the layers' caches, in order (decoder layers for an encoder–decoder).
    """

    def __init__(self, layers: Iterable[AnyLayerCache]) -> None:
        self.layers = list(layers)
        self.segments_BS: Tensor | None = None
        self.memory: tuple[Tensor, Tensor | None] | None = None

    @property
    def length(self) -> int:
        """Positions held."""
        return self.layers[0].length

    @property
    def n_bytes(self) -> int:
        """Bytes of all layers' caches."""
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
        for layer in sorted(self.layers, key=lambda layer: isinstance(layer, LayerCache)):
            layer.crop(length)  # those that may refuse come first, so that all are cropped or none
        if self.segments_BS is not None:
            self.segments_BS = self.segments_BS[:, :length]

    def reorder(self, rows: Tensor) -> None:
        """Keep the rows int64 [B'] of the batch, in this order; a row may come several times or never."""
        for layer in self.layers:
            layer.reorder(rows)
        if self.segments_BS is not None:
            self.segments_BS = self.segments_BS[rows.to(self.segments_BS.device)]
        if self.memory is not None:
            memory_BSC, segments_BS = self.memory
            rows = rows.to(memory_BSC.device)
            self.memory = (memory_BSC[rows], None if segments_BS is None else segments_BS[rows])
