"""Requests of many lengths passing through a model: what a cache has to hold at each step of it. Needs no torch.

As many requests as the batch has places are under way. Each has a prompt, which is read in one step, and grows by a
token a step until its answer is done; the next request takes its place. Lengths are log-normal with σ = 1, as those of
conversations are; the default means are what Kwon et al. 2023 (PagedAttention, section 6.1) count in ShareGPT. A share
of the prompts begins with the same tokens, as a system prompt or examples do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field

from headwise.cache.block_manager import BlockManager, CachedSequence
from headwise.train.settings import Settings

SIGMA = 1.0


class CacheSettings(Settings):
    """What passes through the caches."""

    line: str = Field(
        "llama(d_model=576, n_layers=30, n_heads=9, attention=gqa(kv_heads=3), vocab_size=49152, max_seq_len=2048)",
        description="the model whose keys and values are kept: a line of text",
    )
    requests: int = Field(256, ge=1, description="requests in all")
    batch_size: int = Field(32, ge=1, description="requests under way at once")
    prompt_tokens: float = Field(161.0, ge=1, description="tokens of a prompt, on average, without a shared beginning")
    new_tokens: float = Field(338.0, ge=1, description="tokens of an answer, on average")
    max_len: int = Field(2048, ge=2, description="tokens that a request may have; what preallocation reserves for each")
    shared_prefix: int = Field(256, ge=0, description="tokens that some prompts begin with in common")
    shared: float = Field(0.5, ge=0, le=1, description="share of the prompts that begin with them")
    block_size: int = Field(16, ge=1, description="tokens a block of the paged caches")
    seed: int = Field(0, ge=0, description="of the requests' lengths and order")
    out: Path | None = Field(None, description="folder for report.html and result.json; without one nothing is written")


@dataclass
class Request:
    """Its prompt's tokens, and how many it will have in the end."""

    prompt: list[int]
    final: int


def requests(settings: CacheSettings) -> list[Request]:
    """The requests, in the order in which they come; the same for the same settings."""
    draw = random.Random(settings.seed)

    def length(mean: float) -> int:
        return max(1, round(draw.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA)))

    made: list[Request] = []
    for number in range(settings.requests):
        # Token ids that occur in no other prompt, but for those shared.
        common = list(range(settings.shared_prefix)) if draw.random() < settings.shared else []
        own = [
            (number + 1) * settings.max_len + settings.shared_prefix + i for i in range(length(settings.prompt_tokens))
        ]
        prompt = (common + own)[: settings.max_len - 1]
        made.append(Request(prompt, min(len(prompt) + length(settings.new_tokens), settings.max_len)))
    return made


@dataclass
class Held:
    """What a way of keeping tokens has reserved and filled, in tokens, summed over the steps.

    Attributes:
        reserved: room for so many tokens.
        filled: so many tokens stand in it, one that several requests share counted once.
        wanted: so many the requests have, shared ones counted for each.
        peak: the most that was reserved at once.
    """

    reserved: int = 0
    filled: int = 0
    wanted: int = 0
    peak: int = 0

    def add(self, reserved: int, filled: int, wanted: int) -> None:
        self.reserved, self.filled, self.wanted = self.reserved + reserved, self.filled + filled, self.wanted + wanted
        self.peak = max(self.peak, reserved)

    @property
    def waste(self) -> float:
        """The share of what is reserved that holds nothing, over time."""
        return 1 - self.filled / self.reserved

    @property
    def sharing(self) -> float:
        """The share of the requests' tokens that another request holds for them, over time."""
        return 1 - self.filled / self.wanted


@dataclass
class Preallocated:
    """Room for `max_len` tokens for each place of the batch."""

    max_len: int

    def room(self, lengths: dict[int, int]) -> tuple[int, int]:
        return self.max_len * len(lengths), sum(lengths.values())


@dataclass
class Growing:
    """Buffers that double when full, as `cache.LayerCache` has them."""

    capacity: dict[int, int] = field(default_factory=dict)

    def room(self, lengths: dict[int, int]) -> tuple[int, int]:
        for request, length in lengths.items():
            before = self.capacity.get(request, 0)
            if length > before:
                self.capacity[request] = max(length, 2 * (length - 1) if before else 0, 16)
        self.capacity = {request: self.capacity[request] for request in lengths}
        return sum(self.capacity.values()), sum(lengths.values())


class Paged:
    """Blocks that a `BlockManager` gives out."""

    def __init__(self, settings: CacheSettings, *, sharing: bool) -> None:
        blocks = settings.batch_size * -(-settings.max_len // settings.block_size)
        self.manager = BlockManager(blocks, settings.block_size, prefix_sharing=sharing)
        self.sequences: dict[int, CachedSequence] = {}
        self.prompts = [request.prompt for request in requests(settings)]

    def room(self, lengths: dict[int, int]) -> tuple[int, int]:
        manager, size = self.manager, self.manager.block_size
        for request in self.sequences.keys() - lengths.keys():
            manager.free(self.sequences.pop(request))
        fill: dict[int, int] = {}
        for request, length in lengths.items():
            if request not in self.sequences:
                self.sequences[request] = manager.allocate(self.prompts[request])
            sequence, prompt = self.sequences[request], self.prompts[request]
            held = sequence.num_tokens
            # What a request writes itself is its own: nothing shares it, and no id need be made up.
            manager.append(sequence, [*prompt[held:length], *[-1] * (length - max(held, len(prompt)))])
            manager.commit(sequence)
            for at, block in enumerate(sequence.block_table):
                fill[block] = min(size, length - at * size)
        return len(fill) * size, sum(fill.values())


def steps(settings: CacheSettings) -> Iterator[dict[int, int]]:
    """At each step the requests under way, by number, and their lengths."""
    waiting = list(enumerate(requests(settings)))[::-1]
    lengths: dict[int, int] = {}
    finals: dict[int, int] = {}
    while waiting or lengths:
        lengths = {number: length + 1 for number, length in lengths.items() if length < finals[number]}
        while waiting and len(lengths) < settings.batch_size:
            number, request = waiting.pop()
            lengths[number], finals[number] = len(request.prompt), request.final
        if lengths:
            yield dict(lengths)
