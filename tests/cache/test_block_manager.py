"""The block manager: 100,000 random operations against a memory that is written and copied as the manager says."""

from __future__ import annotations

import random

import pytest

from headwise.cache.block_manager import BlockManager, CachedSequence, OutOfBlocks
from headwise.errors import SettingsError

UNKNOWN = -1


class Memory:
    """Slots that are written, copied and read as a manager says: the keys and values of a pool, one number a token."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.slots: list[object] = [None] * (manager.num_blocks * manager.block_size)

    def append(self, sequence: CachedSequence, tokens: list[int]) -> None:
        """Write the whole prefix with each token: what a layer keeps of it depends on the tokens before."""
        start, size = sequence.num_tokens, self.manager.block_size
        for source, target in self.manager.append(sequence, tokens):
            self.slots[target * size : (target + 1) * size] = self.slots[source * size : (source + 1) * size]
        prefix = hash(tuple(sequence.token_ids[:start]))
        for slot, token in zip(self.manager.slot_mapping(sequence, start, sequence.num_tokens), tokens):
            prefix = hash((prefix, token))
            self.slots[slot] = (prefix, token)

        if len(tokens) % 2:
            self.manager.commit(sequence)

    def read(self, sequence: CachedSequence) -> list[int]:
        held = [self.slots[slot] for slot in self.manager.slot_mapping(sequence, 0, sequence.num_tokens)]
        return [token for _, token in held]  # type: ignore[misc]


def test_a_hundred_thousand_operations_leave_nothing_over() -> None:
    """Small pool, two kinds of tokens: sharing, forks, copies, refusals and evictions all happen thousands of times."""
    draw = random.Random(0)
    manager = BlockManager(num_blocks=20, block_size=3)
    memory = Memory(manager)
    live: list[CachedSequence] = []
    expected: list[list[int]] = []
    seen = dict.fromkeys(("shared", "refused", "forked", "cropped", "freed", "copied"), 0)
    for _ in range(100_000):
        what = draw.choices(("allocate", "append", "fork", "crop", "free"), (3, 8, 2, 3, 2))[0]
        if what == "allocate" and len(live) < 7:
            tokens = draw.choices((1, 2), (9, 1), k=draw.randrange(14))
            sequence = manager.allocate(tokens)
            seen["shared"] += sequence.num_cached_tokens > 0
            live.append(sequence)
            expected.append(tokens[: sequence.num_cached_tokens])
        elif live:
            at = draw.randrange(len(live))
            sequence, tokens = live[at], expected[at]
            if what == "append":
                new = draw.choices((1, 2, UNKNOWN), (90, 9, 1), k=draw.randrange(8))
                needed, free = manager.blocks_needed(sequence, len(new)), manager.num_free_blocks
                try:
                    copied = sum(manager.ref_counts[block] > 1 for block in sequence.block_table[-1:])
                    memory.append(sequence, new)
                except OutOfBlocks:
                    assert needed > free
                    seen["refused"] += 1
                else:
                    assert manager.num_free_blocks == free - needed
                    seen["copied"] += copied
                    tokens += new
            elif what == "fork" and len(live) < 7:
                live.append(manager.fork(sequence))
                expected.append(list(tokens))
                seen["forked"] += 1
            elif what == "crop":
                length = draw.randrange(len(tokens) + 2)
                manager.crop(sequence, length)
                del tokens[length:]
                seen["cropped"] += 1
            elif what == "free":
                manager.free(sequence)
                del live[at], expected[at]
                seen["freed"] += 1
        assert manager.invariants(live) == []
        if live:
            at = draw.randrange(len(live))
            assert memory.read(live[at]) == expected[at] == live[at].token_ids
    assert min(seen.values()) > 1000, seen
    for sequence in live:
        manager.free(sequence)
    assert manager.invariants([]) == []
    assert manager.num_free_blocks == manager.num_blocks


def held(manager: BlockManager, tokens: list[int]) -> CachedSequence:
    """A sequence of these tokens, all written."""
    sequence = manager.allocate()
    assert manager.append(sequence, tokens) == []
    manager.commit(sequence)
    return sequence


def test_what_is_shared_was_computed_after_the_same_tokens() -> None:
    """Block [3, 4] after [1, 2] is another than after [5, 6]: keys depend on what came before."""
    manager = BlockManager(8, 2)
    first = held(manager, [1, 2, 3, 4])
    other = manager.allocate([5, 6, 3, 4, 0])
    assert other.num_cached_tokens == 0
    same = manager.allocate([1, 2, 3, 4, 0])
    assert same.num_cached_tokens == 4
    assert same.block_table == first.block_table


def test_equal_hashes_are_not_equal_tokens() -> None:
    """Python hashes 0 and 2^61 − 1 alike, and so the tuples of them; only the tokens themselves tell them apart."""
    modulus = 2**61 - 1
    assert hash((0, 1)) == hash((modulus, 1))
    manager = BlockManager(8, 2)
    held(manager, [0, 1])
    assert manager.allocate([modulus, 1, 5]).num_cached_tokens == 0
    assert manager.allocate([0, 1, 5]).num_cached_tokens == 2


def test_what_was_never_written_is_never_shared() -> None:
    """A sequence that is given up between getting its places and the pass that writes them leaves no trace."""
    manager = BlockManager(8, 2)
    given_up = manager.allocate()
    manager.append(given_up, [1, 2, 3, 4])
    assert manager.allocate([1, 2, 3, 4, 0]).num_cached_tokens == 0
    manager.free(given_up)
    assert manager.allocate([1, 2, 3, 4, 0]).num_cached_tokens == 0
    going_on = manager.allocate()
    manager.append(going_on, [1, 2])
    manager.append(going_on, [3, 4])
    assert manager.allocate([1, 2, 3, 4, 0]).num_cached_tokens == 2


def test_unknown_tokens_are_shared_with_forks_only() -> None:
    manager = BlockManager(8, 2)
    unknown = held(manager, [UNKNOWN, UNKNOWN])
    assert manager.allocate([UNKNOWN, UNKNOWN, 5]).num_cached_tokens == 0
    assert manager.fork(unknown).block_table == unknown.block_table


def test_the_last_token_is_left_to_compute() -> None:
    """Its logits are what the whole prompt was fed for."""
    manager = BlockManager(8, 2)
    held(manager, [1, 2, 3, 4])
    assert manager.allocate([1, 2, 3, 4]).num_cached_tokens == 2
    assert manager.allocate([]).num_cached_tokens == 0


def test_blocks_without_references_stay_until_their_place_is_needed() -> None:
    """The one unused for longest goes first; of one sequence the last block, without which the others still serve."""
    manager = BlockManager(4, 2)
    old, new = held(manager, [1, 2, 3, 4]), held(manager, [5, 6, 7, 8])
    manager.free(old)
    manager.free(new)
    assert manager.num_free_blocks == 4
    manager.append(manager.allocate(), [9])
    assert manager.allocate([1, 2, 3, 4, 0]).num_cached_tokens == 2
    assert manager.allocate([5, 6, 7, 8, 0]).num_cached_tokens == 4


def test_a_cropped_block_is_written_in_place_and_no_longer_shared_as_it_was() -> None:
    manager = BlockManager(8, 2)
    sequence = held(manager, [1, 2, 3, 4])
    manager.crop(sequence, 3)
    assert manager.append(sequence, [5]) == []
    manager.commit(sequence)
    assert manager.allocate([1, 2, 3, 4, 0]).num_cached_tokens == 2
    assert manager.allocate([1, 2, 3, 5, 0]).num_cached_tokens == 4


def test_forks_copy_only_the_block_they_write_into() -> None:
    manager = BlockManager(8, 2)
    one = manager.allocate()
    manager.append(one, [1, 2, 3])
    two = manager.fork(one)
    assert manager.num_free_blocks == 6
    assert manager.append(two, [4]) == [(one.block_table[1], two.block_table[1])]
    assert manager.append(one, [5]) == []
    assert one.block_table[0] == two.block_table[0]
    assert manager.num_free_blocks == 5


def test_blocks_of_a_sequence_lie_side_by_side_though_it_grows_in_turn_with_others() -> None:
    manager = BlockManager(64, 2)
    sequences = [manager.allocate() for _ in range(4)]
    for n in range(30):
        for sequence in sequences:
            manager.append(sequence, [n])
    for sequence in sequences:
        assert sequence.block_table == list(range(sequence.block_table[0], sequence.block_table[0] + 15))
    long = manager.allocate()
    manager.append(long, [-1] * 8)
    assert manager.invariants([*sequences, long]) == []


def test_a_refusal_names_the_numbers_and_changes_nothing() -> None:
    manager = BlockManager(2, 4)
    sequence = manager.allocate()
    manager.append(sequence, [1, 2, 3])
    with pytest.raises(OutOfBlocks, match=r"2 blocks are needed and 1 are free") as refusal:
        manager.append(sequence, list(range(9)))
    assert (refusal.value.needed, refusal.value.free) == (2, 1)
    assert sequence.token_ids == [1, 2, 3]
    assert manager.invariants([sequence]) == []
    manager.grow(3)
    assert manager.append(sequence, list(range(9))) == []
    assert manager.invariants([sequence]) == []


def test_sharing_can_be_left_out() -> None:
    manager = BlockManager(8, 2, prefix_sharing=False)
    held(manager, [1, 2, 3, 4])
    assert manager.allocate([1, 2, 3, 4]).num_cached_tokens == 0


def test_sizes_below_one_are_refused_together() -> None:
    with pytest.raises(SettingsError, match=r"(?s)num_blocks: given 0.*block_size: given -1"):
        BlockManager(0, -1)


def test_the_invariants_see_what_is_broken() -> None:
    manager = BlockManager(4, 2)
    sequence = manager.allocate()
    manager.append(sequence, [1, 2, 3])
    manager.ref_counts[sequence.block_table[0]] += 1
    assert any("reference counts" in line for line in manager.invariants([sequence]))
