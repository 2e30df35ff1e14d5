"""What is asked for, one request on its way, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from headwise.errors import SettingsError, short
from headwise.generate.sampling import History, Sampling
from headwise.generate.text import TextStream

if TYPE_CHECKING:
    from torch import Tensor

    from headwise.data import Tokenizer
    from headwise.generate.constraints import Constraint

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Request:
    """One text to go on with.

    Attributes:
        prompt: text, or ids.
        sampling: how tokens are chosen.
        max_new_tokens: how many at most.
        stop: strings that end the text; nothing of them is given out, also where they span several tokens.
        stop_ids: ids that end the text, beside the tokenizer's end-of-text id.
        logprobs: log-probabilities of the chosen tokens and of this many of the likeliest; None: none.
        constraint: what the new text must be, see `headwise.generate.constraints`.
        index: the request's number: with the seed it makes the draws, so that equal prompts are answered differently
            and one request alone as among others.
    """

    prompt: str | Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 200
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None
    index: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 0:
            problems.append(f"max_new_tokens: given {self.max_new_tokens}, should be at least 0")
        if isinstance(self.stop, str) or not all(isinstance(each, str) and each for each in self.stop):
            problems.append(f"stop: given {short(self.stop)}, should be a list of strings that are not empty")
        if self.logprobs is not None and self.logprobs < 0:
            problems.append(f"logprobs: given {self.logprobs}, should be at least 0 (0: of the chosen tokens alone)")
        if self.index < 0:
            problems.append(f"index: given {self.index}, should be at least 0")
        if problems:
            raise SettingsError(problems)


@dataclass(frozen=True)
class TokenLogprob:
    """The natural log-probability the model gave a chosen token, before any step of the sampling; `top` has those of
    the likeliest tokens, (id, log-probability), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Generation:
    """What came of a request.

    Attributes:
        text: the new text, without stop string and end token; empty where there was no tokenizer.
        token_ids: the chosen ids, without the end token. After a stop string they are those that spell it too.
        finish_reason: "stop" (an end token, a stop string, or a constraint that nothing can follow), "length"
            (max_new_tokens), "interrupted".
        stopped_by: the stop string that ended the text.
        prompt_tokens: tokens of the prompt.
        logprobs: of each of `token_ids`, where they were asked for.
        drafted, accepted: tokens that speculation proposed, and that the model took over.
        score: of beam search: the sum of log-probabilities divided by length ** length_penalty.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stopped_by: str | None = None
    prompt_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    drafted: int = 0
    accepted: int = 0
    score: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values; those that do not apply are left out."""
        found: dict[str, Any] = {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
        }
        if self.stopped_by is not None:
            found["stopped_by"] = self.stopped_by
        if self.logprobs is not None:
            found["logprobs"] = [
                {"token_id": each.token_id, "logprob": each.logprob, "top": [list(pair) for pair in each.top]}
                for each in self.logprobs
            ]
        if self.drafted:
            found |= {"drafted": self.drafted, "accepted": self.accepted, "acceptance": self.accepted / self.drafted}
        if self.score is not None:
            found["score"] = self.score
        return found


class InterruptedGeneration(KeyboardInterrupt):
    """Ctrl-C while a text was written; `result` has what was written so far."""

    def __init__(self, result: Generation) -> None:
        super().__init__("interrupted")
        self.result = result


class Running:
    """One request on its way: it is given logits and takes a token of them, until it has ended.

    Attributes:
        prompt: the prompt's ids.
        new: the ids chosen so far.
        finish_reason: why it has ended, None before.
        drafted, accepted: counted by speculation.
    """

    def __init__(self, request: Request, prompt: Sequence[int], tokenizer: Tokenizer | None = None) -> None:
        self.request = request
        self.prompt = list(prompt)
        self.new: list[int] = []
        self.finish_reason: FinishReason | None = None if request.max_new_tokens else "length"
        self.drafted = self.accepted = 0
        self.generator = request.sampling.generator(request.index)
        self.constraint = request.constraint.start() if request.constraint else None
        ends = request.stop_ids if tokenizer is None else (*request.stop_ids, *tokenizer.eos_ids)
        self._ends = frozenset(ends)
        self._n_ids = None if tokenizer is None else tokenizer.vocab_size
        self._stream = TextStream(tokenizer, request.stop) if tokenizer is not None else None
        self._logprobs: list[TokenLogprob] = []

    @property
    def history(self) -> History:
        return History(self.prompt, self.new)

    @property
    def n_ends(self) -> int:
        """How many tokens end the text."""
        return len(self._ends)

    def ends(self, token: int) -> bool:
        """Whether a token ends the text."""
        return token in self._ends

    def of_tokenizer(self, logits_V: Tensor) -> Tensor:
        """The logits without rows for ids that the tokenizer lacks: published models pad their vocabulary."""
        return logits_V[: self._n_ids]

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """float64 [V]: what the next token is drawn from."""
        logits_V = self.of_tokenizer(logits_V)
        return self.request.sampling.probabilities(logits_V, self.history, self._allowed(logits_V))

    def step(self, logits_V: Tensor) -> str:
        """Choose the next token of its logits; the text it lets out."""
        known_V = self.of_tokenizer(logits_V)
        token = self.request.sampling.pick(known_V, self.generator, self.history, self._allowed(known_V))
        return self.take(token, logits_V)

    def take(self, token: int, logits_V: Tensor) -> str:
        """Go on with a token chosen of `logits_V`; the text it lets out."""
        if self.ends(token):
            return self.end("stop")
        self.new.append(token)
        if self.request.logprobs is not None:
            self._logprobs.append(_logprob(logits_V, token, self.request.logprobs))
        piece = self._stream.push(token) if self._stream else ""
        if self._stream and self._stream.stopped is not None:
            self.finish_reason = "stop"
        elif self.constraint and self.constraint.take(token):
            return piece + self.end("stop")
        elif len(self.new) == self.request.max_new_tokens:
            return piece + self.end("length")
        return piece

    def end(self, reason: FinishReason) -> str:
        """No further token comes; the text that was held back."""
        self.finish_reason = reason
        piece = self._stream.finish() if self._stream else ""
        if self._stream and self._stream.stopped is not None:
            self.finish_reason = "stop"
        return piece

    def _allowed(self, logits_V: Tensor) -> Tensor | None:
        return self.constraint.allowed(len(logits_V)) if self.constraint else None

    def result(self) -> Generation:
        assert self.finish_reason is not None
        return Generation(
            text=self._stream.text if self._stream else "",
            token_ids=tuple(self.new),
            finish_reason=self.finish_reason,
            stopped_by=self._stream.stopped if self._stream else None,
            prompt_tokens=len(self.prompt),
            logprobs=tuple(self._logprobs) if self.request.logprobs is not None else None,
            drafted=self.drafted,
            accepted=self.accepted,
        )


def _logprob(logits_V: Tensor, token: int, n_top: int) -> TokenLogprob:
    logs_V = logits_V.detach().double().log_softmax(0)
    best = logs_V.topk(min(n_top, len(logs_V)))
    return TokenLogprob(
        token, float(logs_V[token]), tuple(zip(best.indices.tolist(), best.values.tolist())) if n_top else ()
    )
