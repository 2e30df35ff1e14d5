"""Many texts through one model at once: continuous batching over the paged cache.

A step computes what the scheduler plans: the next token of every text that is being written, in one pass with a row
each, and then chunks of prompts. Texts join and leave between steps. What prompts begin with in common is computed
once, also for prompts that come later, as long as the blocks are there.

    engine = Engine(model, tokenizer)
    results = engine.generate(["Once", "Twice"], max_new_tokens=50)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headwise.cache import PagedModelCache, PagedPool
from headwise.errors import HeadwiseError, SettingsError
from headwise.generate.decode import evaluating, start
from headwise.generate.request import Generation, Request, Running
from headwise.generate.sampling import Sampling
from headwise.generate.scheduler import Chunk, Scheduler, Step, Task

if TYPE_CHECKING:
    from torch import Tensor

    from headwise.data import Tokenizer
    from headwise.model.base import LanguageModel

BLOCK_SIZE = 32
# Tokens that the pool has room for, by default, for each text under way.
TOKENS_PER_SEQ = 1024


@dataclass(frozen=True)
class Event:
    """What a step did for one request.

    Attributes:
        id: what `add` returned.
        text: the new piece of text, which may be empty.
        result: the whole of it, once it has ended.
        error: why it could not go on; nothing comes after it.
    """

    id: int
    text: str = ""
    result: Generation | None = None
    error: HeadwiseError | None = None

    @property
    def ends(self) -> bool:
        """Whether this is the request's last event."""
        return self.result is not None or self.error is not None


@dataclass
class Stats:
    """What an engine has done so far: `steps`, `computed_tokens` (prompts and new ones), `cached_tokens` (of prompts,
    found in the cache), `new_tokens` (chosen), `preemptions`."""

    steps: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    preemptions: int = 0


class Engine:
    """A model, a pool of blocks, and the requests on their way.

    Args:
        model: a decoder whose layers keep keys and values (or latents) of each token; it is put into eval mode by each
            call, and then left as it was.
        tokenizer: what the model was trained with.
        max_num_seqs: texts under way at once, at most; more wait.
        max_num_batched_tokens: tokens a step, at most; longer prompts are computed in chunks.
        block_size: tokens a block of the cache.
        num_blocks: blocks in all; None: room for 1,024 tokens (or the model's `max_seq_len`) of each text under way.
        prefix_sharing: whether equal beginnings are computed once.

    Raises:
        SettingsError: an encoder, layers without a paged cache, or a number below 1.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        block_size: int = BLOCK_SIZE,
        num_blocks: int | None = None,
        prefix_sharing: bool = True,
    ) -> None:
        spec = model.spec
        if spec.architecture != "decoder":
            raise SettingsError(f"an engine runs decoders, and this is an {spec.architecture}; use generate for one")
        if num_blocks is None and block_size >= 1:
            num_blocks = max_num_seqs * -(-min(TOKENS_PER_SEQ, spec.dims.max_seq_len) // block_size)
        model.new_cache("paged", block_size=block_size, num_blocks=1)  # says which layers have none
        self.model, self.tokenizer = model, tokenizer
        self._pool_options: dict[str, Any] = {
            "n_layers": spec.dims.n_layers, "num_blocks": num_blocks, "block_size": block_size,
            "prefix_sharing": prefix_sharing,
        }  # fmt: skip
        self._limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        self._device = next(model.parameters()).device
        self.stats = Stats()
        self._next_id = 0
        self._reset()

    def _reset(self) -> None:
        """An empty pool and nothing on its way."""
        self.pool = PagedPool(**self._pool_options)
        self.scheduler = Scheduler(self.pool.manager, **self._limits)
        self._running: dict[Task, tuple[int, Running]] = {}

    def add(self, request: Request) -> int:
        """Put a request last in line; its number.

        Raises as `headwise.generate.complete`, and `SettingsError` where the pool is too small for it even alone. The
        others are not touched.
        """
        running = start(self.model, self.tokenizer, request)
        task = self.scheduler.add(running.prompt, request.max_new_tokens)
        self._next_id += 1
        self._running[task] = self._next_id, running
        return self._next_id

    def abort(self, id: int) -> None:
        """Give a request up; its blocks are free again. A number that is not on its way is passed over."""
        for task, (number, _) in list(self._running.items()):
            if number == id:
                self._leave(task)

    @property
    def is_idle(self) -> bool:
        """Whether no request is on its way."""
        return not self._running

    def step(self) -> list[Event]:
        """Compute once what is next, and choose a token for each text that is ready for one.

        An interruption, or a failure of the model itself, goes through; the engine is empty then.
        """
        events = [self._ended(task) for task, (_, r) in list(self._running.items()) if r.finish_reason is not None]
        if self.scheduler.is_idle:
            return events
        step = self.scheduler.step()
        try:
            with evaluating(self.model):
                for chunk, logits_V in self._compute(step):
                    events.append(self._take(chunk.task, logits_V))
        except BaseException:  # blocks may stand under a content that was never written
            self._reset()
            raise
        stats = self.stats
        stats.steps += 1
        stats.computed_tokens += step.num_tokens
        stats.preemptions += len(step.preempted)
        return events

    def _compute(self, step: Step) -> Iterator[tuple[Chunk, Tensor]]:
        """The plan carried out; the logits [V] behind each chunk that ends what there is of its text."""
        self.pool.copy(step.copies)
        passes = [step.decode] if step.decode else []
        for chunks in [*passes, *([chunk] for chunk in step.prefill)]:
            logits_BV = self._pass(chunks)
            yield from ((chunk, logits_V) for chunk, logits_V in zip(chunks, logits_BV) if chunk.ends)

    @torch.inference_mode()
    def _pass(self, chunks: list[Chunk]) -> Tensor:
        """One call of the model with a row a chunk, all of one length: the last logits [B,V]."""
        tables = [chunk.task.sequence.block_table for chunk in chunks if chunk.task.sequence is not None]
        widest = max(map(len, tables))
        cache = PagedModelCache(
            self.pool,
            torch.tensor([table + [0] * (widest - len(table)) for table in tables], dtype=torch.int32),
            torch.tensor([chunk.start for chunk in chunks], dtype=torch.int32),
        )
        ids_BT = torch.tensor([c.task.token_ids[c.start : c.stop] for c in chunks], device=self._device)
        return self.model(ids_BT, cache=cache, last=True)[:, -1]

    def _take(self, task: Task, logits_V: Tensor) -> Event:
        """The text's next token."""
        number, running = self._running[task]
        before = len(running.new)
        try:
            text = running.step(logits_V)
        except HeadwiseError as error:
            self._leave(task)
            return Event(number, error=error)
        self.stats.new_tokens += len(running.new) - before
        task.token_ids += running.new[before:]
        if running.finish_reason is None:
            return Event(number, text)
        return self._ended(task, text)

    def _ended(self, task: Task, text: str = "") -> Event:
        number, running = self._running[task]
        self._leave(task)
        return Event(number, text, running.result())

    def _leave(self, task: Task) -> None:
        self.scheduler.finish(task)
        self.stats.cached_tokens += task.num_cached_tokens
        del self._running[task]

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | Request],
        *,
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_result: Callable[[int, Generation], None] | None = None,
    ) -> list[Generation]:
        """What follows each prompt, in the prompts' order.

        Args:
            prompts: texts, ids, or requests with options of their own; the keywords are for the first two.
            max_new_tokens, temperature, top_k, top_p, seed, stop: as `headwise.generate.generate`. Each prompt has
                draws of its own, a function of the seed and its place.
            on_result: called with a prompt's place and its result as soon as it has ended.

        Raises:
            SettingsError: before anything runs, all prompts that cannot be answered.
            HeadwiseError: a text that could not go on; the others are answered (`on_result`) before it is raised.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        places: dict[int, int] = {}
        problems = []
        for place, prompt in enumerate(prompts):
            if not isinstance(prompt, Request):
                prompt = Request(prompt, sampling, max_new_tokens=max_new_tokens, stop=stop, index=place)
            try:
                places[self.add(prompt)] = place
            except HeadwiseError as error:
                problems.append(f"prompt {place}: {error}")
        if problems:
            for id in places:
                self.abort(id)
            raise SettingsError(problems)
        results: dict[int, Generation] = {}
        errors = []
        while not self.is_idle:
            for event in self.step():
                if event.id not in places:
                    continue  # someone else's
                place = places[event.id]
                if event.error is not None:
                    errors.append(f"prompt {place}: {event.error}")
                elif event.result is not None:
                    results[place] = event.result
                    if on_result is not None:
                        on_result(place, event.result)
        if errors:
            raise HeadwiseError("; ".join(errors))
        return [results[place] for place in range(len(prompts))]
