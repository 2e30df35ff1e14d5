"""Which tokens of which texts a model computes next (continuous batching, Yu et al. 2022; chunked prefill, Agrawal et
al. 2023; preemption by recomputation, Kwon et al. 2023).

A task is a list of tokens of which the first `num_computed` have keys and values in the cache. What is left is computed
as far as a step's budget goes: one token for a text that is being written, a chunk of a prompt. Tasks already begun
come first, in the order they came in, then those that wait. Where the blocks run out, the task that came last gives all
of its blocks back and waits again, at the front; the cache may still have them when its turn comes.

No tensor is known here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from headwise.cache.block_manager import BlockManager, CachedSequence
from headwise.errors import SettingsError


@dataclass(eq=False)
class Task:
    """One text on its way through the cache.

    Attributes:
        token_ids: the prompt's tokens and those written since; whoever writes appends here.
        sequence: its place in the cache, while it has one.
        num_computed: tokens whose keys and values are in the cache, or will be after the step that is planned.
        num_cached_tokens: those that came with a shared prefix and were never computed.
        num_preemptions: how often it lost its blocks.
    """

    token_ids: list[int]
    sequence: CachedSequence | None = None
    num_computed: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True)
class Chunk:
    """The tokens `start` … `stop` − 1 of a task, to be computed in this step."""

    task: Task
    start: int
    stop: int

    @property
    def ends(self) -> bool:
        """Whether these are the last tokens there are: the next one can be chosen then."""
        return self.stop == len(self.task.token_ids)


@dataclass
class Step:
    """What to compute, in this order: `copies`, `decode`, `prefill`.

    Attributes:
        copies: blocks to copy before anything is written, as (from, to).
        decode: one token of each of these, in one pass.
        prefill: chunks, one after the other: a later one may read blocks that an earlier one fills.
        preempted: tasks that lost their blocks.
    """

    copies: list[tuple[int, int]] = field(default_factory=list)
    decode: list[Chunk] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)
    preempted: list[Task] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(chunk.stop - chunk.start for chunk in [*self.decode, *self.prefill])


class Scheduler:
    """Plans step after step.

    Args:
        manager: gives out the blocks.
        max_num_seqs: tasks under way at once, at most.
        max_num_batched_tokens: tokens a step, at most; longer prompts are computed in chunks.

    Raises:
        SettingsError: a number below 1.
    """

    def __init__(self, manager: BlockManager, *, max_num_seqs: int = 32, max_num_batched_tokens: int = 512) -> None:
        sizes = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        if problems := [f"{name}: given {size}, should be at least 1" for name, size in sizes.items() if size < 1]:
            raise SettingsError(problems)
        self.manager = manager
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: deque[Task] = deque()
        self.running: list[Task] = []

    def add(self, token_ids: Sequence[int], max_new_tokens: int) -> Task:
        """A new task, last in line.

        Raises:
            SettingsError: the pool is too small for it even alone. Only this task is refused.
        """
        # The last token that is written is never fed back.
        needed = -(-max(1, len(token_ids) + max_new_tokens - 1) // self.manager.block_size)
        if needed > self.manager.num_blocks:
            raise SettingsError(
                f"a prompt of {len(token_ids)} tokens with max_new_tokens={max_new_tokens} needs {needed} blocks of "
                f"{self.manager.block_size} tokens, and the pool has {self.manager.num_blocks}; shorten it, or take "
                "more blocks"
            )
        task = Task(list(token_ids))
        self.waiting.append(task)
        return task

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing left to do."""
        return not self.waiting and not self.running

    def finish(self, task: Task) -> None:
        """A task has all its tokens, or is given up: its blocks are free again, their content may still be shared."""
        if task in self.running:
            self.running.remove(task)
        elif task in self.waiting:
            self.waiting.remove(task)
        if task.sequence is not None:
            self.manager.free(task.sequence)
            task.sequence = None

    def step(self) -> Step:
        """What to compute next. It counts as computed from here on."""
        step, budget = Step(), self.max_num_batched_tokens
        for task in list(self.running):
            if task.sequence is None or budget == 0:
                continue  # it has lost its blocks to one before it
            stop = min(len(task.token_ids), task.num_computed + budget)
            if not self._make_room(task, stop, step):
                continue
            chunk = self._place(task, stop, step)
            (step.decode if stop - chunk.start == 1 else step.prefill).append(chunk)
            budget -= stop - chunk.start
        # What was just taken from someone is not given to one who came later.
        while self.waiting and budget and len(self.running) < self.max_num_seqs and not step.preempted:
            task = self.waiting[0]
            task.sequence = sequence = self.manager.allocate(task.token_ids)
            stop = min(len(task.token_ids), sequence.num_tokens + budget)
            if self.manager.blocks_needed(sequence, stop - sequence.num_tokens) > self.manager.num_free_blocks:
                self.manager.free(sequence)
                task.sequence = None
                break
            self.waiting.popleft()
            self.running.append(task)
            task.num_computed = sequence.num_tokens
            task.num_cached_tokens = max(task.num_cached_tokens, sequence.num_cached_tokens)
            chunk = self._place(task, stop, step)
            step.prefill.append(chunk)  # even one token: what it shares may be written in this same step
            budget -= stop - chunk.start
        return step

    def _place(self, task: Task, stop: int, step: Step) -> Chunk:
        assert task.sequence is not None
        start = task.num_computed
        step.copies += self.manager.append(task.sequence, task.token_ids[start:stop])
        self.manager.commit(task.sequence)  # who shares these blocks reads them later in this step
        task.num_computed = stop
        return Chunk(task, start, stop)

    def _make_room(self, task: Task, stop: int, step: Step) -> bool:
        """Whether the blocks for the task's tokens up to `stop` are free, after taking them from those behind it; if
        not even that is enough it has lost its own."""
        assert task.sequence is not None
        while self.manager.blocks_needed(task.sequence, stop - task.num_computed) > self.manager.num_free_blocks:
            last = self.running[-1]
            self._preempt(last, step)
            if last is task:
                return False
        return True

    def _preempt(self, task: Task, step: Step) -> None:
        assert task.sequence is not None
        self.running.remove(task)
        self.manager.free(task.sequence)
        task.sequence, task.num_computed = None, 0
        task.num_preemptions += 1
        self.waiting.appendleft(task)
        step.preempted.append(task)
