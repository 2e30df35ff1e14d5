"""Several texts at once: one pass of the model makes the next token of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from headwise.errors import HeadwiseError
from headwise.generate.decode import evaluating, start
from headwise.generate.request import Generation, Request, Running
from headwise.generate.session import check_length

if TYPE_CHECKING:
    from torch import Tensor

    from headwise.data import Tokenizer
    from headwise.model.base import LanguageModel


def complete_batch(
    model: LanguageModel,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    batch_size: int = 8,
    cache: str = "auto",
    on_result: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """What follows several prompts, `batch_size` of them at once; their lengths need not be equal.

    Shorter prompts are padded at the left, in a segment of their own, which changes nothing for the tokens of the text.
    What has ended leaves the batch. Each request draws from its own generator (seed and `index`), so that it is
    answered as it is alone. `on_result` is called with a request's place and its result as soon as it has ended.

    Raises as `complete`, whichever request it is that cannot be answered; `answers` goes on with the others.
    """
    results: dict[int, Generation] = {}
    for place, result in answers(model, tokenizer, requests, batch_size=batch_size, cache=cache):
        if isinstance(result, HeadwiseError):
            raise result
        results[place] = result
        if on_result is not None:
            on_result(place, result)
    return [results[place] for place in range(len(requests))]


def answers(
    model: LanguageModel,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    batch_size: int = 8,
    cache: str = "auto",
) -> Iterator[tuple[int, Generation | HeadwiseError]]:
    """Each request's place with its result, or with why there is none, as soon as that is known."""
    with evaluating(model):
        for first in range(0, len(requests), batch_size):
            rows: dict[int, Running] = {}
            for place, request in enumerate(requests[first : first + batch_size], first):
                try:
                    rows[place] = start(model, tokenizer, request)
                except HeadwiseError as error:
                    yield place, error
            places = list(rows)
            for n, problem in _together(model, list(rows.values()), cache):
                yield places[n], rows[places[n]].result() if problem is None else problem


def _together(model: LanguageModel, rows: Sequence[Running], cache: str) -> Iterator[tuple[int, HeadwiseError | None]]:
    """Decode several texts in one batch. Gives the place of each as soon as it has ended, and the error where it could
    not go on."""
    yield from ((place, None) for place, row in enumerate(rows) if row.finish_reason is not None)
    places = [place for place, row in enumerate(rows) if row.finish_reason is None]
    if not places:
        return
    try:
        longest = max(len(rows[place].prompt) for place in places)
        check_length(model, longest + max(rows[place].request.max_new_tokens for place in places) - 1)
    except HeadwiseError:  # each fits by itself, but not behind the padding that the others ask for
        for place in places:
            yield from _decode(model, rows, [place], cache)
    else:
        yield from _decode(model, rows, places, cache)


@torch.inference_mode()
def _decode(
    model: LanguageModel, rows: Sequence[Running], places: list[int], kind: str
) -> Iterator[tuple[int, HeadwiseError | None]]:
    ids_BT, segments_BT = _left_padded([rows[place].prompt for place in places], next(model.parameters()).device)
    cache = model.new_cache(kind)
    if model.spec.architecture == "encoder_decoder":
        # Padding is of another segment than the decoder's tokens, which are of 0.
        apart = None if segments_BT is None else 1 - segments_BT
        cache.memory = (model.encode(ids_BT, apart), apart)  # type: ignore[operator]
        ids_BT, segments_BT = ids_BT[:, -1:], None
    while places:
        logits_BV = model(ids_BT, segments=segments_BT, cache=cache, last=True)[:, -1]
        segments_BT = None  # new tokens are of their row's last segment
        going = []
        for n, place in enumerate(places):
            error = None
            try:
                rows[place].step(logits_BV[n])
            except HeadwiseError as found:
                error = found
            if error is not None or rows[place].finish_reason is not None:
                yield place, error
            else:
                going.append(n)
        if going and len(going) < len(places):
            cache.reorder(torch.tensor(going, device=ids_BT.device))
        places = [places[n] for n in going]
        ids_BT = torch.tensor([rows[place].new[-1:] for place in places], device=ids_BT.device)


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids [B,T], and segments [B,T] that are 0 in the padding and 1 in the prompts; None where nothing is padded."""
    T = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (T - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    if all(len(prompt) == T for prompt in prompts):
        return ids_BT, None
    starts_B1 = torch.tensor([[T - len(prompt)] for prompt in prompts], device=device)
    return ids_BT, (torch.arange(T, device=device) >= starts_B1).to(torch.int64)
