"""A model with all that stays the same from request to request: how its texts are looked for, and in which cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headwise.errors import HeadwiseError, SettingsError
from headwise.generate.batch import answers
from headwise.generate.beam import Beams, beam_search
from headwise.generate.compiled import cache_kind
from headwise.generate.decode import complete
from headwise.generate.request import Generation, Request
from headwise.generate.speculative import Draft

if TYPE_CHECKING:
    from headwise.data import Tokenizer
    from headwise.model.base import LanguageModel


@dataclass(frozen=True)
class Writer:
    """Answers requests: by sampling, several in one batch; or one by one, with a draft or by beam search.

    Attributes:
        cache: the kind of cache, as `model.new_cache` takes it.
        draft: what proposes tokens.
        beams: how a beam search runs.
        batch_size: requests decoded in one pass.
        compile: whether texts that are written one by one are decoded by a compiled program.

    Raises `SettingsError` for a draft beside beams, either beside compile, compile with a cache that cannot be
    compiled for, and a batch of less than one.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    cache: str = "auto"
    draft: Draft | None = None
    beams: Beams | None = None
    batch_size: int = 8
    compile: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.draft is not None and self.beams is not None:
            problems.append("a draft does not go with beams: nothing is drawn there")
        if self.compile and (self.draft is not None or self.beams is not None):
            problems.append("compile does not go with a draft or beams: it serves the step of one token of one text")
        if self.compile:
            cache_kind(self.cache)
        if self.batch_size < 1:
            problems.append(f"batch_size: given {self.batch_size}, should be at least 1")
        if problems:
            raise SettingsError(problems)

    def complete(self, request: Request, on_text: Callable[[str], None] | None = None) -> list[Generation]:
        """The texts after one prompt, best first; one unless beams return more. Raises as `complete`."""
        if self.beams is not None:
            return beam_search(self.model, self.tokenizer, request, self.beams, cache=self.cache)
        options: dict[str, Any] = {"draft": self.draft, "cache": self.cache, "compile": self.compile}
        return [complete(self.model, self.tokenizer, request, on_text=on_text, **options)]

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Generation] | HeadwiseError]]:
        """The place of each request with its texts, or with why there are none, as soon as that is known."""
        if self.draft is None and self.beams is None:
            size, cache = self.batch_size, self.cache
            for place, found in answers(self.model, self.tokenizer, requests, batch_size=size, cache=cache):
                yield place, found if isinstance(found, HeadwiseError) else [found]
            return
        for place, request in enumerate(requests):
            try:
                yield place, self.complete(request)
            except HeadwiseError as error:
                yield place, error
