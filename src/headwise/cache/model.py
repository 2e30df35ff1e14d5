"""A whole model's cache: one cache a layer, and what the model itself must remember of the tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from headwise.cache.base import AnyLayerCache, CacheReport, bytes_of
from headwise.kernels.segments import segment_positions


class Placed(NamedTuple):
    """Where a pass's new tokens stand.

    Attributes:
        positions: int64 [T], or [B,T] where rows differ.
        segments: int64 (new tokens [B,T], all tokens [B,S]); None while none were given.
        seq_len: tokens of the longest row, the new ones included.
    """

    positions: Tensor
    segments: tuple[Tensor, Tensor] | None
    seq_len: int


def place(ids_BT: Tensor, segments_BT: Tensor | None, cache: ModelCache | None) -> Placed:
    """Where tokens stand that follow those of a cache, or stand alone. Call it before the layers store anything."""
    if cache is not None:
        return cache.place(ids_BT, segments_BT)
    return placed_after(0, ids_BT, segments_BT)


def placed_after(past: int, ids_BT: Tensor, keys_BS: Tensor | None) -> Placed:
    """Where tokens stand after `past` others; `keys_BS` are the segments of all."""
    stop = past + ids_BT.shape[1]
    if keys_BS is None:
        return Placed(torch.arange(past, stop, device=ids_BT.device), None, stop)
    return Placed(segment_positions(keys_BS)[:, past:], (keys_BS[:, past:], keys_BS), stop)


class ModelCache:
    """Made by `model.new_cache()`; handed to every call, it grows with the tokens.

    Args:
        layers: the layers' caches, in order (decoder layers for an encoder–decoder).

    Attributes:
        segments_BS: int64, the segments of all tokens; None while none were given.
        memory: what an encoder read, float [B,S,C], and its segments.
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
        """Bytes of everything held, exactly: the layers' caches, segments, and what an encoder read."""
        own = [self.segments_BS, *(self.memory or ())]
        return sum(layer.n_bytes for layer in self.layers) + bytes_of([t for t in own if t is not None])

    def report(self) -> CacheReport:
        """What the layers' caches cost together."""
        each = [layer.report() for layer in self.layers]
        kinds = " and ".join(dict.fromkeys(report.kind for report in each))
        return CacheReport(kinds, self.length, sum(r.n_bytes for r in each), sum(r.used_bytes for r in each))

    def place(self, ids_BT: Tensor, segments_BT: Tensor | None) -> Placed:
        """Where the next tokens stand, int64 [B,T]; their segments are remembered.

        Tokens without segments continue their row's last one.
        """
        past, held = self.length, self.segments_BS
        if segments_BT is not None or held is not None:
            if segments_BT is None:
                assert held is not None
                segments_BT = held[:, -1:].expand(-1, ids_BT.shape[1])
            if held is None:
                held = segments_BT[:, :1].expand(-1, past)
            self.segments_BS = torch.cat([held, segments_BT], dim=1)
        return placed_after(past, ids_BT, self.segments_BS)

    def crop(self, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            HeadwiseError: a layer no longer holds what it needs to go on from there; nothing has been changed.
        """
        for layer in self.layers:
            layer.check_crop(length)
        for layer in self.layers:
            layer.crop(length)
        if self.segments_BS is not None:
            self.segments_BS = self.segments_BS[:, :length]

    def reorder(self, rows: Tensor) -> None:
        """Keep the rows int64 [B'] of the batch, in this order; a row may come several times or never."""
        for layer in self.layers:
            layer.reorder(rows)
        self._reorder_own(rows)

    def _reorder_own(self, rows: Tensor) -> None:
        if self.segments_BS is not None:
            self.segments_BS = self.segments_BS[rows.to(self.segments_BS.device)]
        if self.memory is not None:
            memory_BSC, segments_BS = self.memory
            rows = rows.to(memory_BSC.device)
            self.memory = (memory_BSC[rows], None if segments_BS is None else segments_BS[rows])

    def fork(self) -> Self:
        """A second cache with the same tokens; the two go on apart."""
        other = copy.copy(self)
        other.layers = [layer.fork() for layer in self.layers]
        return other
