"""Beam search: the texts of highest score, not one that was drawn (transformers' `_beam_search`, step for step).

Of all one-token continuations of the `n_beams` open texts the likeliest 2·n_beams are looked at (more with several end
tokens). Those that end, among the first n_beams, are finished with the score Σ log p / length ** length_penalty, which
counts the end token; the n_beams best of the others stay open. The search stops when no open text can beat the worst of
n_beams finished ones, judged by `early_stopping`:

* False: as if an open text would end now, which is no bound for a positive length_penalty, but what is commonly done;
* True: as soon as n_beams texts are finished;
* "never": by the best score that is still possible, at max_new_tokens where length_penalty is positive.

Texts that reach max_new_tokens count as finished there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from headwise.errors import SettingsError
from headwise.generate.decode import evaluating, start
from headwise.generate.request import Generation, Request, Running
from headwise.generate.sampling import History

if TYPE_CHECKING:
    from headwise.data import Tokenizer
    from headwise.model.base import LanguageModel


@dataclass(frozen=True)
class Beams:
    """How a beam search runs; the module's docstring says what each value does.

    Attributes:
        n_beams: texts kept open.
        length_penalty: more than 0 favours long texts, less than 0 short ones.
        early_stopping: when to stop.
        num_return_sequences: how many texts come out, best first.
    """

    n_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        problems = []
        if self.n_beams < 1:
            problems.append(f"beams: given {self.n_beams}, should be at least 1")
        if not abs(self.length_penalty) < float("inf"):
            problems.append(f"length_penalty: given {self.length_penalty}, should be finite")
        if self.early_stopping not in (True, False, "never"):
            problems.append(f"early_stopping: given {self.early_stopping!r}, should be true, false or never")
        if not 1 <= self.num_return_sequences <= max(self.n_beams, 1):
            problems.append(f"num_return_sequences: given {self.num_return_sequences}, should be 1…beams")
        if problems:
            raise SettingsError(problems)


@dataclass(frozen=True)
class Finished:
    """A text that has ended, with its score."""

    score: float
    ids: tuple[int, ...]
    ended: bool


def beam_search(
    model: LanguageModel, tokenizer: Tokenizer, request: Request, beams: Beams = Beams(), *, cache: str = "auto"
) -> list[Generation]:
    """The `num_return_sequences` best texts after a prompt, best first, each with its `score`.

    Of the request's sampling, biases and penalties count, applied to the log-probabilities; nothing is drawn. Raises as
    `complete`, and `SettingsError` for what does not go with beams.
    """
    problems = [f"{name} does not go with beams" for name in ("stop", "constraint") if getattr(request, name)]
    if request.logprobs is not None:
        problems.append("logprobs does not go with beams; a text's score is their sum")
    if problems:
        raise SettingsError(problems)
    running = start(model, tokenizer, request)
    with evaluating(model):
        found = _search(model, running, beams, cache)
    return [_result(tokenizer, running, each) for each in found[: beams.num_return_sequences]]


@torch.inference_mode()
def _search(model: LanguageModel, running: Running, beams: Beams, kind: str) -> list[Finished]:
    sampling, n, limit = running.request.sampling, beams.n_beams, running.request.max_new_tokens
    device = next(model.parameters()).device
    texts: list[tuple[int, ...]] = [()]  # open, best first
    sums_N = torch.zeros(1)
    finished: list[Finished] = [] if limit else [Finished(0.0, (), False)]
    cache = model.new_cache(kind)
    ids_NT, more = torch.tensor([running.prompt], device=device), {}
    if model.spec.architecture == "encoder_decoder":
        ids_NT, more = ids_NT[:, -1:], {"encoder_ids": ids_NT}
    for length in range(1, limit + 1):
        logs_NV = model(ids_NT, cache=cache, last=True, **more)[:, -1].float().cpu().log_softmax(-1)
        more = {}
        totals_NV = sums_N[:, None] + torch.stack(
            [sampling.scores(logs_V, History(running.prompt, new)) for logs_V, new in zip(logs_NV, texts)]
        )
        V = totals_NV.shape[1]
        best = totals_NV.flatten().topk(min(n * max(2, 1 + running.n_ends), totals_NV.numel()))
        found = [(i // V, i % V, total) for i, total in zip(best.indices.tolist(), best.values.tolist())]
        ends = [running.ends(token) or length == limit for _, token, _ in found]
        finished += [
            Finished(total / length**beams.length_penalty, (*texts[row], token), running.ends(token))
            for (row, token, total), ended in list(zip(found, ends))[:n]
            if ended
        ]
        finished = sorted(finished, key=lambda each: -each.score)[:n]  # stable: of equals the earlier
        kept = [each for each, ended in zip(found, ends) if not ended][:n]
        if not kept or (len(finished) == n and _is_decided(kept[0][2], length, limit, beams, finished[-1].score)):
            break
        sums_N = torch.tensor([total for _, _, total in kept])
        texts = [(*texts[row], token) for row, token, _ in kept]
        cache.reorder(torch.tensor([row for row, _, _ in kept], device=device))
        ids_NT = torch.tensor([[token] for _, token, _ in kept], device=device)
    return finished


def _is_decided(best_open: float, length: int, limit: int, beams: Beams, worst_finished: float) -> bool:
    """Whether no open text may still beat the worst of the finished ones, once there are enough of those."""
    if beams.early_stopping is True:
        return True
    at = limit if beams.early_stopping == "never" and beams.length_penalty > 0 else length
    return best_open / at**beams.length_penalty <= worst_finished


def _result(tokenizer: Tokenizer, running: Running, found: Finished) -> Generation:
    ids = found.ids[:-1] if found.ended else found.ids
    return Generation(
        text=tokenizer.decode(ids),
        token_ids=ids,
        finish_reason="stop" if found.ended else "length",
        prompt_tokens=len(running.prompt),
        score=found.score,
    )
