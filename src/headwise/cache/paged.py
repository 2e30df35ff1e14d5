"""The paged cache: keys and values of many sequences in the blocks of one pool (document 002; PagedAttention, 2023).

A `PagedPool` has the tensors, its `BlockManager` says what lies where. A `PagedModelCache` is what a model is called
with: the block tables and lengths of a batch's rows, which may be of unequal length. Who steps the rows himself, as an
engine does, makes one for each pass; `SequencesCache` asks the manager for room on its own, and is what
`model.new_cache("paged")` gives.

    pool = PagedPool(n_layers=2, num_blocks=64, block_size=16)
    sequence = pool.manager.allocate(prompt)             # shares what the pool holds of the prompt
    cache = pool.cache([sequence])
    logits = model(torch.tensor([prompt[sequence.num_cached_tokens :]]), cache=cache)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from headwise.cache.base import CacheReport, TokenCache, bytes_of
from headwise.cache.block_manager import BlockManager, CachedSequence, OutOfBlocks
from headwise.cache.model import ModelCache, Placed
from headwise.errors import HeadwiseError
from headwise.kernels import paged_attention
from headwise.kernels.paged_attention.stretches import attention, stretches_of

UNKNOWN = -1  # a token that is never shared by its content


class PagedPool:
    """The blocks of all layers; no gradients flow through them.

    Each kept tensor of a layer is one [K,num_blocks·block_size,·]: blocks side by side are one stretch of slots. It is
    made when the layer first writes, which says how wide it is.

    Args:
        n_layers: layers of the model.
        num_blocks, block_size: as `BlockManager`; a block holds `block_size` tokens of every layer.
        grows: whether the pool doubles where blocks run out.
        prefix_sharing: as `BlockManager`.
    """

    def __init__(
        self, n_layers: int, num_blocks: int, block_size: int, *, grows: bool = False, prefix_sharing: bool = True
    ) -> None:
        self.manager = BlockManager(num_blocks, block_size, prefix_sharing=prefix_sharing)
        self.grows = grows
        self.layers: list[list[Tensor]] = [[] for _ in range(n_layers)]

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.manager.block_size

    @property
    def n_bytes(self) -> int:
        """Bytes of all blocks of all layers, exactly."""
        return bytes_of([t for layer in self.layers for t in layer])

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block in all layers."""
        return self.n_bytes // self.manager.num_blocks

    def cache(self, sequences: Sequence[CachedSequence] = ()) -> SequencesCache:
        """A model's cache whose rows are these sequences; without any, rows are made with the first tokens."""
        return SequencesCache(self, sequences)

    def paged(self, layer: int) -> tuple[Tensor, ...]:
        """What a layer keeps, [num_blocks,block_size,K,·] each, as `kernels.paged_attention` takes it."""
        return tuple(t.unflatten(1, (-1, self.block_size)).permute(1, 2, 0, 3) for t in self.layers[layer])

    def write(self, layer: int, slots: Tensor, new: Sequence[Tensor]) -> None:
        """Put tensors [B,K,T,·] into the slots int64 [B,T] of a layer."""
        n_slots = self.manager.num_blocks * self.block_size
        if not self.layers[layer]:
            self.layers[layer] = [t.new_zeros(t.shape[1], n_slots, t.shape[3]) for t in new]
        with torch.no_grad():
            for held, t in zip(self.layers[layer], new):
                held.index_copy_(1, slots.flatten(), t.transpose(0, 1).flatten(1, 2).to(held.dtype))

    def append(self, sequences: Sequence[CachedSequence], token_ids: Sequence[Sequence[int]]) -> None:
        """Give each sequence's tokens their places, make the copies that takes, and more room where the pool grows.

        Raises:
            OutOfBlocks: too few are free for all of them, and the pool does not grow; nothing has been changed.
        """
        manager = self.manager
        needed = sum(manager.blocks_needed(sequence, len(ids)) for sequence, ids in zip(sequences, token_ids))
        lacking = needed - manager.num_free_blocks
        if lacking > 0:
            if not self.grows:
                raise OutOfBlocks(needed, manager.num_free_blocks)
            self.grow(manager.num_blocks + max(lacking, manager.num_blocks))
        for sequence, ids in zip(sequences, token_ids):
            self.copy(manager.append(sequence, ids))

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to) each, as `BlockManager.append` asks for."""
        if copies:
            sources, targets = (list(blocks) for blocks in zip(*copies))
            with torch.no_grad():
                for layer in range(len(self.layers)):
                    for blocks in self.paged(layer):
                        blocks[targets] = blocks[sources]

    def grow(self, num_blocks: int) -> None:
        """More blocks, `num_blocks` in all."""
        added = (num_blocks - self.manager.num_blocks) * self.block_size
        self.manager.grow(num_blocks)
        for layer in self.layers:
            layer[:] = [torch.cat([t, t.new_zeros(t.shape[0], added, t.shape[2])], 1) for t in layer]


class PagedLayerCache(TokenCache):
    """One layer of a pool, as the rows of a `PagedModelCache` see it."""

    kind = "paged"
    attends = True

    def __init__(self, rows: PagedModelCache, layer: int) -> None:
        self._rows, self.layer = weakref.ref(rows), layer  # it lives in what it refers to

    @property
    def rows(self) -> PagedModelCache:
        rows = self._rows()
        assert rows is not None
        return rows

    @property
    def length(self) -> int:  # type: ignore[override]
        """Tokens of the longest row."""
        return self.rows.length

    def append(self, *new: Tensor, segments_BS: Tensor | None = None) -> tuple[Tensor, ...]:
        """Write tensors [B,K,T,·] and gather everything held [B,K,S,·], the rows' last tokens side by side."""
        rows = self.rows
        rows.pool.write(self.layer, rows.slots_BT, new)
        self.padding = rows.padding
        return tuple(t[:, rows.gathered].transpose(0, 1) for t in rows.pool.layers[self.layer])

    def attend(self, q_BHTE: Tensor, new: tuple[Tensor, ...], **scores: Any) -> Tensor | None:
        """Write, and let each row's queries meet its blocks where they lie."""
        factors = scores.pop("bias_factors", None)
        rows, T, on_cuda = self.rows, q_BHTE.shape[2], paged_attention.available(q_BHTE)
        if on_cuda and factors is not None and T > 1:
            return None  # the kernel adds what depends on the key alone
        rows.pool.write(self.layer, rows.slots_BT, new)
        held = rows.pool.layers[self.layer]
        pads = [rows.length - length for length in rows.lengths]
        if on_cuda:
            key_bias = None
            if factors is not None:
                bias_HS = (factors[0] @ factors[1].transpose(-1, -2))[:, 0]
                key_bias = torch.stack([bias_HS.roll(-pad, -1) for pad in pads])
            blocks = rows.pool.paged(self.layer)
            return paged_attention.attention(
                q_BHTE, blocks[0], blocks[-1], rows.block_tables, rows.context_lens, key_bias=key_bias, **scores
            )
        outputs = []
        for q_HTE, stretches, pad in zip(q_BHTE, rows.stretches, pads):
            # A code's factors count from the start of the longest row: a shorter one's keys are its last.
            own = None if factors is None else (factors[0], factors[1][..., pad:, :])
            outputs.append(attention(q_HTE, held[0], held[-1], stretches, bias_factors=own, **scores))
        return torch.stack(outputs)

    def tensors(self) -> list[Tensor]:
        return self.rows.pool.layers[self.layer]

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        raise HeadwiseError("one layer of a paged cache cannot be changed alone; fork or reorder the model's cache")

    def crop(self, length: int) -> None:
        raise HeadwiseError("one layer of a paged cache cannot be cropped alone; crop the model's cache")


class PagedModelCache(ModelCache):
    """Rows whose places are known: block tables and lengths, for one pass or several.

    Rows may differ in length; then no segments can be given, and all rows get as many new tokens.

    Args:
        pool: where the blocks are.
        block_tables: int32 [B,max_blocks].
        context_lens: int32 [B], the tokens each row already has.

    Attributes:
        context_lens: after a pass, the new tokens included.
    """

    def __init__(self, pool: PagedPool, block_tables: Tensor, context_lens: Tensor) -> None:
        super().__init__(PagedLayerCache(self, layer) for layer in range(len(pool.layers)))
        self.pool = pool
        self._set_rows(block_tables, context_lens)

    def _set_rows(self, block_tables: Tensor, context_lens: Tensor) -> None:
        self.block_tables, self.context_lens = block_tables, context_lens
        self.lengths: list[int] = context_lens.tolist()

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole pool, which others may share, and of what these rows remember themselves."""
        own = [self.block_tables, self.context_lens, self.segments_BS, *(self.memory or ())]
        return self.pool.n_bytes + bytes_of([t for t in own if t is not None])

    def report(self) -> CacheReport:
        """What the pool costs, and the blocks of these rows, each counted once."""
        size = self.pool.block_size
        tables = zip(self.block_tables.tolist(), self.lengths)
        blocks = {block for table, length in tables for block in table[: -(-length // size)]}
        return CacheReport("paged", self.length, self.pool.n_bytes, len(blocks) * self.pool.bytes_per_block)

    def place(self, ids_BT: Tensor, segments_BT: Tensor | None) -> Placed:
        self._make_room(ids_BT, segments_BT)
        (B, T), device, size = ids_BT.shape, ids_BT.device, self.pool.block_size
        if len(self.lengths) != B:
            raise HeadwiseError(f"{B} rows of tokens for a paged cache of {len(self.lengths)}; they must be as many")
        equal = len(set(self.lengths)) == 1
        if segments_BT is not None and not equal:
            raise HeadwiseError("segments and rows of unequal length exclude each other; pad on the left, or leave out")
        past, stop = self.lengths, [length + T for length in self.lengths]
        if max(stop) > self.block_tables.shape[1] * size:
            raise HeadwiseError(f"{max(stop)} tokens do not fit {self.block_tables.shape[1]} blocks of {size}")
        positions_BT = torch.tensor(past, device=device)[:, None] + torch.arange(T, device=device)
        self.slots_BT = self._slots(positions_BT)
        tables = self.block_tables.tolist()
        self.stretches = [stretches_of(table, length, size) for table, length in zip(tables, stop)]
        if equal:
            placed = super().place(ids_BT, segments_BT)
        else:
            placed = Placed(positions_BT, None, max(stop))
        self._set_rows(self.block_tables, torch.tensor(stop, dtype=torch.int32, device=self.context_lens.device))
        return placed

    def _make_room(self, ids_BT: Tensor, segments_BT: Tensor | None) -> None:
        """Have places for the new tokens; here the caller has seen to that."""

    def _slots(self, positions: Tensor) -> Tensor:
        size, tables = self.pool.block_size, self.block_tables.to(positions.device, torch.int64)
        return tables.gather(1, positions // size) * size + positions % size

    @property
    def gathered(self) -> Tensor:
        """The slots of all tokens, int64 [B,S]; shorter rows begin with slots of no meaning."""
        places_BS = torch.arange(self.length, device=self.slots_BT.device)[None] - self._pads[:, None]
        return self._slots(places_BS.clamp_min(0))

    @property
    def padding(self) -> tuple[Tensor, Tensor] | None:
        """Segments that hide those slots."""
        if len(set(self.lengths)) == 1:
            return None
        keys_BS = -(torch.arange(self.length, device=self.slots_BT.device)[None] < self._pads[:, None]).long()
        return torch.zeros_like(self.slots_BT), keys_BS

    @property
    def _pads(self) -> Tensor:
        return self.length - torch.tensor(self.lengths, device=self.slots_BT.device)

    def crop(self, length: int) -> None:
        """Forget every row's tokens from `length` on; the blocks are the caller's affair."""
        self._set_rows(self.block_tables, self.context_lens.clamp(max=length))
        if self.segments_BS is not None:
            self.segments_BS = self.segments_BS[:, :length]

    def reorder(self, rows: Tensor) -> None:
        raise HeadwiseError("these rows are another's; fork its sequences and make a cache of those")

    def fork(self) -> Self:
        raise HeadwiseError("these rows are another's; fork its sequences and make a cache of those")


class SequencesCache(PagedModelCache):
    """Rows that are sequences of the pool's manager: they get their blocks as tokens come.

    `fork` and `reorder` share blocks, which are copied where they are written. `free` gives all blocks back. A cache
    that is no longer used does so by itself, but for sequences that were given to it.
    """

    def __init__(self, pool: PagedPool, sequences: Sequence[CachedSequence] = ()) -> None:
        self.sequences, self._owns = list(sequences), not sequences
        super().__init__(pool, torch.zeros(len(self.sequences), 0, dtype=torch.int32), self._lens())

    def _lens(self) -> Tensor:
        return torch.tensor([sequence.num_tokens for sequence in self.sequences], dtype=torch.int32)

    def _make_room(self, ids_BT: Tensor, segments_BT: Tensor | None) -> None:
        if not self.sequences:
            self.sequences = [self.pool.manager.allocate() for _ in ids_BT]
        self._set_rows(self.block_tables, self._lens())
        # Keys depend on the tokens before and on nothing else only without segments and encoder.
        plain = segments_BT is None and self.segments_BS is None and self.memory is None
        ids = ids_BT.tolist() if plain else [[UNKNOWN] * ids_BT.shape[1]] * len(ids_BT)
        self.pool.append(self.sequences, ids)
        widest = max(len(sequence.block_table) for sequence in self.sequences)
        tables = [sequence.block_table + [0] * (widest - len(sequence.block_table)) for sequence in self.sequences]
        self.block_tables = torch.tensor(tables, dtype=torch.int32, device=ids_BT.device)

    def crop(self, length: int) -> None:
        """Forget every row's tokens from `length` on, and give back their blocks."""
        super().crop(length)
        for sequence in self.sequences:
            self.pool.manager.crop(sequence, length)

    def reorder(self, rows: Tensor) -> None:
        before = self.sequences
        self.sequences = [self.pool.manager.fork(before[row]) for row in rows.tolist()]
        if self._owns:
            self._release(before)
        self._owns = True
        self._set_rows(self.block_tables[rows.to(self.block_tables.device)], self._lens())
        self._reorder_own(rows)

    def fork(self) -> Self:
        other = type(self)(self.pool, [self.pool.manager.fork(sequence) for sequence in self.sequences])
        other.block_tables, other.segments_BS, other.memory = self.block_tables, self.segments_BS, self.memory
        other._owns = True
        return other

    def free(self) -> None:
        """Give all blocks back; the cache is empty then."""
        self._release(self.sequences)
        self.sequences, self.segments_BS = [], None
        self._set_rows(self.block_tables[:0], self._lens())

    def _release(self, sequences: list[CachedSequence]) -> None:
        for sequence in sequences:
            self.pool.manager.free(sequence)

    def __del__(self) -> None:
        if self._owns:
            self._release(self.sequences)


def new_paged_cache(n_layers: int, *, block_size: int = 64, num_blocks: int | None = None) -> SequencesCache:
    """A paged cache with a pool of its own: of `num_blocks` blocks, or one that grows."""
    pool = PagedPool(n_layers, num_blocks or 16, block_size, grows=num_blocks is None)
    return pool.cache()
