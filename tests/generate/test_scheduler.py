"""The scheduler against a cache that remembers, for every place, the tokens up to the one that was written there."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.cache.block_manager import BlockManager
from headwise.errors import SettingsError
from headwise.generate.scheduler import Chunk, Scheduler, Step, Task


class Pool:
    """Stands for a model and its paged cache: computing a token writes all tokens up to it into its place."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.held: dict[int, tuple[int, ...]] = {}

    def run(self, step: Step) -> None:
        size = self.manager.block_size
        for source, target in step.copies:
            for offset in range(size):
                if source * size + offset in self.held:
                    self.held[target * size + offset] = self.held[source * size + offset]
        for chunk in step.decode:  # all write before any reads, as in one pass
            self.write(chunk)
        for chunk in step.decode:
            self.read(chunk)
        for chunk in step.prefill:
            self.write(chunk)
            self.read(chunk)

    def write(self, chunk: Chunk) -> None:
        for i, slot in enumerate(self.slots(chunk)[chunk.start :], chunk.start):
            self.held[slot] = tuple(chunk.task.token_ids[: i + 1])

    def read(self, chunk: Chunk) -> None:
        for i, slot in enumerate(self.slots(chunk)):
            assert self.held[slot] == tuple(chunk.task.token_ids[: i + 1]), (chunk.start, chunk.stop, i)

    def slots(self, chunk: Chunk) -> list[int]:
        assert chunk.task.sequence is not None
        return self.manager.slot_mapping(chunk.task.sequence, 0, chunk.stop)


@settings(max_examples=250)
@given(seed=st.integers(0, 2**32), sharing=st.booleans())
def test_every_token_reads_what_stands_before_it(seed: int, sharing: bool) -> None:
    """Prompts with common beginnings, chunks, shared blocks, preemption: each pass finds its whole past in the cache,
    every task ends with all its tokens, nothing is left over."""
    rng = random.Random(seed)
    manager = BlockManager(rng.randint(4, 24), rng.randint(1, 5), prefix_sharing=sharing)
    scheduler = Scheduler(manager, max_num_seqs=rng.randint(1, 6), max_num_batched_tokens=rng.randint(1, 20))
    pool, wanted = Pool(manager), {}
    beginning = [rng.randrange(3) for _ in range(12)]
    room = manager.num_blocks * manager.block_size

    def arrive() -> None:
        prompt = beginning[: rng.randint(0, 12)] + [rng.randrange(3) for _ in range(rng.randint(1, 8))]
        prompt = prompt[: room // 2 + 1]
        new = rng.randint(1, max(1, min(10, room - len(prompt))))
        wanted[scheduler.add(prompt, new)] = len(prompt) + new

    for _ in range(rng.randint(1, 8)):
        arrive()
    for n in range(2000):
        if scheduler.is_idle:
            break
        step = scheduler.step()
        assert 0 < step.num_tokens <= scheduler.max_num_batched_tokens
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert len({id(chunk.task) for chunk in [*step.decode, *step.prefill]}) == len(step.decode + step.prefill)
        pool.run(step)
        for chunk in [*step.decode, *step.prefill]:
            if chunk.ends:
                chunk.task.token_ids.append(rng.randrange(3))
                if len(chunk.task.token_ids) == wanted[chunk.task]:
                    scheduler.finish(chunk.task)
        assert manager.invariants([task.sequence for task in scheduler.running]) == []
        if n < 10 and rng.random() < 0.3:
            arrive()
        if rng.random() < 0.05 and (alive := [*scheduler.running, *scheduler.waiting]):
            gone = rng.choice(alive)
            scheduler.finish(gone)  # its user went away
            del wanted[gone]
    assert scheduler.is_idle
    assert all(len(task.token_ids) == length for task, length in wanted.items())
    assert manager.num_free_blocks == manager.num_blocks
    assert manager.invariants([]) == []


def finish(scheduler: Scheduler, wanted: dict[Task, int]) -> list[Step]:
    steps = []
    while not scheduler.is_idle:
        steps.append(scheduler.step())
        for chunk in [*steps[-1].decode, *steps[-1].prefill]:
            if chunk.ends:
                chunk.task.token_ids.append(1)
                if len(chunk.task.token_ids) >= wanted[chunk.task]:
                    scheduler.finish(chunk.task)
    return steps


def test_texts_join_while_others_are_written() -> None:
    """Continuous batching: one that comes later is decoded beside those that are already on their way."""
    scheduler = Scheduler(BlockManager(64, 4))
    first = scheduler.add([5] * 6, 10)
    wanted = {first: 16}
    for _ in range(3):
        (chunk,) = [*(step := scheduler.step()).decode, *step.prefill]
        chunk.task.token_ids.append(1)
    second = scheduler.add([6] * 6, 10)
    wanted[second] = 16
    steps = finish(scheduler, wanted)
    assert max(len(step.decode) for step in steps) == 2
    assert [len(step.prefill) for step in steps[:2]] == [1, 0]


def test_a_long_prompt_goes_in_chunks_and_holds_nobody_up() -> None:
    scheduler = Scheduler(BlockManager(64, 4), max_num_batched_tokens=8)
    short = scheduler.add([1, 2], 30)
    scheduler.step()
    short.token_ids.append(3)
    scheduler.add([7] * 30, 2)
    sizes = []
    for _ in range(4):
        step = scheduler.step()
        assert [chunk.task for chunk in step.decode] == [short]
        short.token_ids.append(3)
        sizes += [chunk.stop - chunk.start for chunk in step.prefill]
    assert sizes == [7, 7, 7, 7]


def test_a_prefix_is_computed_once() -> None:
    scheduler = Scheduler(BlockManager(64, 4))
    prompt = list(range(20))
    tasks = [scheduler.add([*prompt, 50 + n], 1) for n in range(4)]
    step = scheduler.step()
    assert [(chunk.start, chunk.stop) for chunk in step.prefill] == [(0, 21), (20, 21), (20, 21), (20, 21)]
    assert [task.num_cached_tokens for task in tasks] == [0, 20, 20, 20]


def test_the_last_to_come_gives_way_and_is_computed_again() -> None:
    """Two texts that fit at first and not when they grow: the second loses its blocks, and ends all the same."""
    scheduler = Scheduler(BlockManager(5, 4))
    first, second = scheduler.add([1] * 8, 9), scheduler.add([2] * 7, 9)
    steps = finish(scheduler, {first: 17, second: 16})
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert sum(step.preempted == [second] for step in steps) == 1
    assert (len(first.token_ids), len(second.token_ids)) == (17, 16)


def test_what_never_fits_is_refused_alone() -> None:
    scheduler = Scheduler(BlockManager(4, 4))
    fits = scheduler.add([1] * 8, 9)
    message = "a prompt of 8 tokens with max_new_tokens=10 needs 5 blocks of 4 tokens, and the pool has 4; shorten it"
    with pytest.raises(SettingsError, match=re.escape(message)):
        scheduler.add([1] * 8, 10)
    finish(scheduler, {fits: 17})
    assert len(fits.token_ids) == 17
    with pytest.raises(SettingsError, match=r"(?s)max_num_seqs: given 0.*max_num_batched_tokens: given 0"):
        Scheduler(BlockManager(4, 4), max_num_seqs=0, max_num_batched_tokens=0)


def test_planning_needs_no_torch() -> None:
    code = "import sys, headwise.generate.scheduler; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
