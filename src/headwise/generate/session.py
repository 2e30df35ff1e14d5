"""A model that reads one text and remembers it: what is asked again is not computed again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from headwise.errors import HeadwiseError, SettingsError
from headwise.generate.compiled import cache_kind, step_of
from headwise.kernels import naive_wanted
from headwise.position import Position

if TYPE_CHECKING:
    from torch import Tensor

    from headwise.cache import ModelCache
    from headwise.model.base import LanguageModel


class Session:
    """A model, a cache of one row, and the ids in it. Texts that begin as the last one did are read on from there.

    An encoder–decoder reads the prompt with its encoder, and its decoder's text begins with the prompt's last token, as
    in training.

    Args:
        model: it should be in eval mode when it reads.
        cache: the kind of cache, as `model.new_cache` takes it.
        slack: how many of the last tokens may be taken back without reading the text again, where a cache has to
            provide for that (windows, recurrences).
        compile: decode single tokens by a compiled program (see `compiled`), with a growing cache.

    Attributes:
        ids: the ids whose keys and values are held.
    """

    def __init__(self, model: LanguageModel, cache: str = "auto", slack: int = 0, compile: bool = False) -> None:
        self.model = model
        self.ids: list[int] = []
        self._kind = cache_kind(cache) if compile else cache
        self._step = step_of(model) if compile else None
        self._options = {"slack": slack} if slack and cache in ("auto", "rolling") else {}
        if slack and cache == "auto":
            self._options["checkpoints"] = 1
        self._device = next(model.parameters()).device
        self._encoded: list[int] | None = None
        self._before = 0  # ids held before the last pass: a recurrence can go back to there
        self._reset()

    @torch.inference_mode()
    def read(self, prompt: Sequence[int], new: Sequence[int] = (), n_last: int = 1) -> Tensor:
        """Logits [n_last,V] after the last tokens of prompt + new; only ids that are not held are computed."""
        ids = [*prompt, *new]
        if self.model.spec.architecture == "encoder_decoder":
            self._encode(list(prompt))
            ids = [prompt[-1], *new]
        self._keep(_common(self.ids, ids[: len(ids) - n_last]))
        self._before = len(self.ids)
        fresh_1T = torch.tensor([ids[self._before :]], device=self._device)
        if self._step is not None and self._before and fresh_1T.shape[1] == 1 and not naive_wanted():
            logits_1TV = self._step(self.model, fresh_1T, self._cache)
        else:
            logits_1TV = self.model(fresh_1T, cache=self._cache, last=n_last == 1)
        self.ids = ids
        return logits_1TV[0, -n_last:]

    def _encode(self, prompt: list[int]) -> None:
        if self._encoded != prompt:
            self._reset()
            self._cache.memory = (self.model.encode(torch.tensor([prompt], device=self._device)), None)  # type: ignore[operator]
            self._encoded = prompt

    def _keep(self, length: int) -> None:
        """Forget the ids from `length` on, or more where the cache cannot go back to just there."""
        for to in (length, min(length, self._before)):
            if to == len(self.ids):
                return
            try:
                self._cache.crop(to)
            except HeadwiseError:
                continue
            self.ids = self.ids[:to]
            return
        memory = self._cache.memory
        self._reset()
        self._cache.memory = memory

    def _reset(self) -> None:
        self.ids, self._before = [], 0
        self._cache: ModelCache = self.model.new_cache(self._kind, **self._options)


def _common(a: list[int], b: list[int]) -> int:
    """How many ids two texts begin with in common."""
    if a == b[: len(a)]:
        return len(a)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


def check_prompt(model: LanguageModel, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Say beforehand what cannot work.

    Raises:
        SettingsError: an encoder, an empty prompt, or ids outside the vocabulary.
        HeadwiseError: prompt and new tokens are more than the model has positions for.
    """
    spec = model.spec
    if spec.architecture == "encoder":
        raise SettingsError("an encoder fills in masked tokens and generates no text; use a decoder or encoder–decoder")
    if not len(prompt):
        raise SettingsError("prompt: is empty; give at least one token to go on from")
    if not 0 <= min(prompt) <= max(prompt) < spec.dims.vocab_size:
        raise SettingsError(f"prompt: ids should lie in 0…{spec.dims.vocab_size - 1}; is this the model's tokenizer?")
    # The last new token is never fed back, so it needs no position.
    decoded = 1 if spec.architecture == "encoder_decoder" else len(prompt)
    check_length(model, max(len(prompt), decoded + max_new_tokens - 1))


def check_length(model: LanguageModel, length: int) -> None:
    """Raises `HeadwiseError` where some position code of the model cannot place so many tokens."""
    for module in model.modules():
        if isinstance(module, Position):
            module.check_length(length)
