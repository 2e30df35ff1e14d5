"""Which blocks of a paged cache belong to which sequence (document 002; PagedAttention, Kwon et al. 2023).

A cache is cut into `num_blocks` blocks of `block_size` tokens. A sequence's `block_table` lists its blocks in order;
token i lies in block `block_table[i // block_size]` at offset `i % block_size`. No tensor is known here: the manager
says which blocks to write and which to copy first, whoever owns the keys and values does it.

**Sharing.** A block has as many references as there are block tables with it. Forks share all blocks; who writes into
a block that others read too gets a copy of it first (copy-on-write). A full block is also entered under its content,
which is its tokens and the content before them; `allocate` begins a sequence with the blocks that hold what it begins
with. The entry is found by a hash and compared token by token. Blocks without references keep their content until their
place is needed; the one unused for longest goes first.

**Neighbours.** Blocks that follow each other in a table had better lie side by side, so that a CPU can read them as one
stretch. So a sequence gets the block behind its last where that is blank, and begins far from where others may grow.

    manager = BlockManager(num_blocks=64, block_size=16)
    sequence = manager.allocate(prompt)                  # num_cached_tokens of the prompt are there already
    copies = manager.append(sequence, prompt[sequence.num_cached_tokens :])
    slots = manager.slot_mapping(sequence, sequence.num_cached_tokens, sequence.num_tokens)
    ...                                                  # copy blocks, run the model, which writes the slots
    manager.commit(sequence)                             # now others may share them
    manager.free(sequence)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from headwise.errors import HeadwiseError, SettingsError

ROOT = 0  # the content before a sequence's first token


class OutOfBlocks(HeadwiseError):
    """More blocks are wanted than are free; nothing has been changed."""

    def __init__(self, needed: int, free: int) -> None:
        self.needed, self.free = needed, free
        super().__init__(
            f"{needed} blocks are needed and {free} are free; free or preempt a sequence, or take a larger pool"
        )


@dataclass(eq=False)
class CachedSequence:
    """One sequence's tokens and the blocks that hold them; changed by its `BlockManager` alone.

    Attributes:
        block_table: its blocks, in order.
        token_ids: the tokens that have a place.
        num_cached_tokens: how many of the first ones `allocate` found already held.
    """

    block_table: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    contents: list[int] = field(default_factory=list)  # the number of the content up to and with each full block

    @property
    def num_tokens(self) -> int:
        """Tokens that have a place."""
        return len(self.token_ids)


class Content(NamedTuple):
    """What a full block holds: the number of the content before it, and its tokens."""

    before: int
    token_ids: tuple[int, ...]


class BlockManager:
    """Gives the blocks of one pool to sequences and takes them back.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens a block.
        prefix_sharing: whether sequences may share blocks of equal content that they came by separately.

    Raises:
        SettingsError: a size below 1.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_sharing: bool = True) -> None:
        sizes = {"num_blocks": num_blocks, "block_size": block_size}
        if problems := [f"{name}: given {size}, should be at least 1" for name, size in sizes.items() if size < 1]:
            raise SettingsError(problems)
        self.block_size, self.prefix_sharing = block_size, prefix_sharing
        self.ref_counts: list[int] = []
        self._blank: set[int] = set()  # free and without content
        self._unused: OrderedDict[int, None] = OrderedDict()  # free with content, the one unused for longest first
        self._content: dict[int, tuple[Content, int]] = {}  # a block's content, and that content's number
        self._block: dict[Content, int] = {}  # the other way round
        self._numbers = count(ROOT + 1)
        self.grow(num_blocks)

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return len(self.ref_counts)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence has, those with content that may still be shared included."""
        return len(self._blank) + len(self._unused)

    def grow(self, num_blocks: int) -> None:
        """Add blocks, up to `num_blocks` in all."""
        self._blank.update(range(self.num_blocks, num_blocks))
        self.ref_counts += [0] * (num_blocks - self.num_blocks)

    def allocate(self, token_ids: Sequence[int] = ()) -> CachedSequence:
        """A new sequence that begins with the full blocks held of `token_ids`, the last token always left to compute.

        Only those have a place then, `num_cached_tokens` of them: append the others, all at once or in chunks.
        """
        sequence = CachedSequence()
        before, size = ROOT, self.block_size
        for start in range(0, (len(token_ids) - 1) // size * size if self.prefix_sharing else 0, size):
            block = self._block.get(Content(before, tuple(token_ids[start : start + size])))
            if block is None:
                break
            before = self._content[block][1]
            self._refer(block)
            sequence.block_table.append(block)
            sequence.contents.append(before)
        sequence.num_cached_tokens = len(sequence.block_table) * size
        sequence.token_ids = list(token_ids[: sequence.num_cached_tokens])
        return sequence

    def blocks_needed(self, sequence: CachedSequence, num_new: int) -> int:
        """Free blocks that appending `num_new` tokens will take."""
        if num_new == 0:
            return 0
        total = -(-(sequence.num_tokens + num_new) // self.block_size)
        return total - len(sequence.block_table) + self._copies_tail(sequence)

    def append(self, sequence: CachedSequence, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Give the next tokens of a sequence their places. Those before count as written, as `commit` has it.

        Tokens below 0 are of unknown content: blocks that hold them are shared with forks only.

        Returns:
            Blocks to copy before anything is written and before the next change here, as (from, to).

        Raises:
            OutOfBlocks: too few are free.
        """
        needed = self.blocks_needed(sequence, len(token_ids))
        if needed > self.num_free_blocks:
            raise OutOfBlocks(needed, self.num_free_blocks)
        self.commit(sequence)
        copies, table = [], sequence.block_table
        if token_ids and sequence.num_tokens % self.block_size:
            tail = table[-1]
            if self.ref_counts[tail] > 1:
                table[-1] = self._take(table[-2] if len(table) > 1 else None)
                self._release(tail)
                copies.append((tail, table[-1]))
            else:
                self._forget(tail)  # a cropped block may still stand under what it held when full
        sequence.token_ids.extend(token_ids)
        for lacking in range(-(-sequence.num_tokens // self.block_size) - len(table), 0, -1):
            table.append(self._take(table[-1] if table else None, lacking))
        return copies

    def commit(self, sequence: CachedSequence) -> None:
        """Say that all tokens of a sequence are written: from here on its full blocks are found by their content."""
        size = self.block_size
        for at in range(len(sequence.contents), sequence.num_tokens // size if self.prefix_sharing else 0):
            tokens = tuple(sequence.token_ids[at * size : (at + 1) * size])
            if min(tokens) < 0:
                return
            block = sequence.block_table[at]
            if block not in self._content:  # else a fork has seen to that
                content = Content(sequence.contents[at - 1] if at else ROOT, tokens)
                # Where another block has it already, what follows counts as following that one.
                block = self._block.setdefault(content, block)
                self._content.setdefault(block, (content, next(self._numbers)))
            sequence.contents.append(self._content[block][1])

    def fork(self, sequence: CachedSequence) -> CachedSequence:
        """A second sequence with the same tokens in the same blocks; appending to either will copy what it must."""
        for block in sequence.block_table:
            self.ref_counts[block] += 1
        return CachedSequence(
            list(sequence.block_table), list(sequence.token_ids), sequence.num_cached_tokens, list(sequence.contents)
        )

    def crop(self, sequence: CachedSequence, length: int) -> None:
        """Forget the tokens from `length` on, and give back the blocks that held nothing else.

        Those of tokens that were never written, as where a pass failed, are not found by their content afterwards.
        """
        length = min(max(length, 0), sequence.num_tokens)
        # The last block first: a content is reached through those before it, so they should be evicted after it.
        while (len(sequence.block_table) - 1) * self.block_size >= length and sequence.block_table:
            self._release(sequence.block_table.pop())
        del sequence.token_ids[length:], sequence.contents[length // self.block_size :]
        sequence.num_cached_tokens = min(sequence.num_cached_tokens, length)

    def free(self, sequence: CachedSequence) -> None:
        """Give back all blocks of a sequence, which is empty then."""
        self.crop(sequence, 0)

    def slot_mapping(self, sequence: CachedSequence, start: int, stop: int) -> list[int]:
        """Where tokens start…stop−1 lie: block · block_size + offset, each."""
        size, table = self.block_size, sequence.block_table
        return [table[i // size] * size + i % size for i in range(start, stop)]

    def invariants(self, sequences: Iterable[CachedSequence]) -> list[str]:
        """What does not hold of this manager with these as all its sequences; empty where everything does."""
        wrong, references = [], [0] * self.num_blocks
        for n, sequence in enumerate(sequences):
            for block in sequence.block_table:
                references[block] += 1
            if len(sequence.block_table) != -(-sequence.num_tokens // self.block_size):
                wrong.append(f"sequence {n} has {len(sequence.block_table)} blocks for {sequence.num_tokens} tokens")
            if len(sequence.contents) > sequence.num_tokens // self.block_size:
                wrong.append(f"sequence {n} has more contents than full blocks")
            if sequence.num_cached_tokens > sequence.num_tokens:
                wrong.append(f"sequence {n} counts more cached tokens than tokens")
            for at, (block, number) in enumerate(zip(sequence.block_table, sequence.contents)):
                held = self._content.get(block)
                if held is not None and held[1] == number:
                    tokens = tuple(sequence.token_ids[at * self.block_size : (at + 1) * self.block_size])
                    if held[0].token_ids != tokens:
                        wrong.append(f"sequence {n} shares block {block} under other tokens")
        if references != self.ref_counts:
            wrong.append(f"reference counts are {self.ref_counts}, block tables say {references}")
        free = sorted([*self._blank, *self._unused])
        if free != [block for block, count in enumerate(references) if not count]:
            wrong.append(f"free are {free}, but references {references}")
        if {content: block for block, (content, _) in self._content.items()} != self._block:
            wrong.append("contents and their blocks do not belong together")
        if not self._unused.keys() <= self._content.keys() or not self._content.keys().isdisjoint(self._blank):
            wrong.append("a free block stands in the wrong list")
        return wrong

    def _copies_tail(self, sequence: CachedSequence) -> bool:
        """Whether the next token goes into a block that others read too."""
        return bool(sequence.num_tokens % self.block_size) and self.ref_counts[sequence.block_table[-1]] > 1

    def _refer(self, block: int) -> None:
        self._unused.pop(block, None)
        self.ref_counts[block] += 1

    def _release(self, block: int) -> None:
        self.ref_counts[block] -= 1
        if self.ref_counts[block] == 0:
            if block in self._content:
                self._unused[block] = None
            else:
                self._blank.add(block)

    def _take(self, after: int | None, wanted: int = 1) -> int:
        """A free block, blank: the one behind `after`, another without content, or the one unused for longest."""
        if after is not None and after + 1 in self._blank:
            block = after + 1
            self._blank.remove(block)
        elif self._blank:
            block = self._beginning(wanted)
            self._blank.remove(block)
        else:
            block, _ = self._unused.popitem(last=False)
            self._forget(block)
        self.ref_counts[block] = 1
        return block

    def _beginning(self, wanted: int) -> int:
        """A blank block with blank ones behind it: in the middle of the longest run, as far as `wanted` blocks fit."""
        first, length, start, last = 0, 0, 0, -2
        for block in sorted(self._blank):
            if block != last + 1:
                start = block
            last = block
            if block - start + 1 > length:
                first, length = start, block - start + 1
        # Whoever has the block before the run may want to go on in it; before the pool's first block there is none.
        return first + (min(length // 2, max(length - wanted, 0)) if first else 0)

    def _forget(self, block: int) -> None:
        if block in self._content:
            del self._block[self._content.pop(block)[0]]
