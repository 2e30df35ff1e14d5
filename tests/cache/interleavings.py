"""One text, or several that began as one, in caches of several kinds and in none."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from headwise.cache import CachedSequence, ModelCache, OutOfBlocks, PagedPool, RollingCache, SequencesCache
from headwise.errors import HeadwiseError
from headwise.model.base import LanguageModel

SYMBOLS = 3  # few, so that texts often begin alike


@dataclass(eq=False)
class Branch:
    """A text [B,S] and the caches that hold it; `own` is of the layers' own kind where that is another."""

    ids: Tensor
    paged: SequencesCache
    contiguous: ModelCache
    own: ModelCache | None

    @property
    def plain(self) -> list[ModelCache]:
        return [self.contiguous] if self.own is None else [self.contiguous, self.own]


@dataclass
class Interleaving:
    """Branches that grow, part, are cut and end; after each step every cache must say what no cache says.

    The pool is small: where its blocks run out, the oldest branch ends. Nothing may be left over.
    """

    model: LanguageModel
    pool: PagedPool
    branches: list[Branch] = field(default_factory=list)
    shared: int = 0

    def new_own(self) -> ModelCache | None:
        cache = self.model.new_cache(slack=2)
        return cache if isinstance(cache.layers[0], RollingCache) else None

    def begin(self, rows: int, ids: list[int]) -> None:
        """A new text, the same in all rows; the pool gives what it holds of it."""
        ids_BT = torch.tensor([ids] * rows)
        sequences = [self.pool.manager.allocate(ids) for _ in range(rows)]
        known = sequences[0].num_cached_tokens
        self.shared += known
        given = self.pool.cache(sequences)
        paged = given.fork()  # its sequences are its own
        given.free()
        branch = Branch(ids_BT[:, :known], paged, self.model.new_cache("contiguous"), self.new_own())
        for cache in branch.plain if known else ():
            self.model(ids_BT[:, :known], cache=cache)
        self.branches.append(branch)
        self.append(-1, ids_BT[:, known:])

    def append(self, at: int, new_BT: Tensor) -> None:
        branch = self.branches[at]
        while True:
            try:
                logits = self.model(new_BT, cache=branch.paged)
                break
            except OutOfBlocks:
                if len(self.branches) == 1:
                    return
                oldest = next(each for each in self.branches if each is not branch)
                self.branches.remove(oldest)
                oldest.paged.free()
                self.check_pool()
        branch.ids = torch.cat([branch.ids, new_BT], 1)
        wanted = self.model(branch.ids)[:, -new_BT.shape[1] :]
        for each in (logits, *(self.model(new_BT, cache=cache) for cache in branch.plain)):
            assert float((each - wanted).abs().max()) < 1e-9
        self.check(branch)

    def fork(self, at: int) -> None:
        branch = self.branches[at]
        own = None if branch.own is None else branch.own.fork()
        self.branches.append(Branch(branch.ids, branch.paged.fork(), branch.contiguous.fork(), own))

    def crop(self, at: int, length: int) -> None:
        branch = self.branches[at]
        branch.ids = branch.ids[:, :length]
        branch.paged.crop(length)
        branch.contiguous.crop(length)
        if branch.own is not None:
            try:
                branch.own.crop(length)
            except HeadwiseError:  # what it would need is dropped: read the text again
                branch.own = self.new_own()
                self.model(branch.ids, cache=branch.own)
        self.check(branch)

    def reorder(self, at: int, rows: Tensor) -> None:
        branch = self.branches[at]
        branch.ids = branch.ids[rows]
        for cache in (branch.paged, *branch.plain):
            cache.reorder(rows)

    def end(self, at: int) -> None:
        self.branches.pop(at).paged.free()
        self.check_pool()

    def check(self, branch: Branch) -> None:
        assert {cache.length for cache in (branch.paged, *branch.plain)} == {branch.ids.shape[1]}
        self.check_pool()

    def check_pool(self) -> None:
        assert self.pool.manager.invariants(self.sequences()) == []

    def sequences(self) -> list[CachedSequence]:
        return [sequence for branch in self.branches for sequence in branch.paged.sequences]

    def finish(self) -> None:
        while self.branches:
            self.end(0)
        assert self.pool.manager.num_free_blocks == self.pool.manager.num_blocks
