"""Speculative decoding: tokens are guessed cheaply, and the model judges several of them in one pass.

A guess x was drawn from q; the model's own distribution there is p (both after all steps of the sampling). x is taken
with probability min(1, p(x)/q(x)); otherwise the token is drawn from max(p − q, 0), normalised, and the later guesses
are forgotten. The token then has exactly the distribution p (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023,
arXiv:2302.01318). After k taken guesses the same pass gives one token more.

A greedy text is the greedy text. Where the guess is one certain token (n-gram lookup), q is 1 there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from headwise.errors import SettingsError
from headwise.generate.sampling import History, draw
from headwise.generate.session import Session, check_prompt

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from headwise.generate.request import Running
    from headwise.model.base import LanguageModel


class Guess(NamedTuple):
    """A proposed token, and what it was drawn from: float64 [V], None where it was certain."""

    token: int
    probs_V: Tensor | None = None


class Draft(Protocol):
    """What proposes tokens, `n_tokens` at a time."""

    @property
    def n_tokens(self) -> int: ...

    def guesses(self, running: Running, most: int) -> list[Guess]:
        """At most `most` tokens that may follow the text, each drawn given those before it."""
        ...


class DraftModel:
    """A smaller model with the same vocabulary as `target`; it draws `n_tokens` guesses with the request's sampling.

    Raises `SettingsError` where the vocabularies differ.
    """

    def __init__(self, model: LanguageModel, target: LanguageModel, n_tokens: int = 4) -> None:
        _check(n_tokens)
        own, other = (each.spec.dims.vocab_size for each in (model, target))
        if own != other:
            raise SettingsError(
                f"draft: has a vocabulary of {own} ids, the model one of {other}; give a model of the same tokenizer"
            )
        self._session = Session(model.eval(), slack=n_tokens + 1)
        self.n_tokens = n_tokens

    def guesses(self, running: Running, most: int) -> list[Guess]:
        """Drawn one by one, up to an end token. Raises `HeadwiseError` where the text is too long for this model."""
        if not running.new:
            check_prompt(self._session.model, running.prompt, running.request.max_new_tokens)
        found: list[Guess] = []
        constraint = running.constraint.copy() if running.constraint else None
        for _ in range(min(self.n_tokens, most)):
            new = [*running.new, *(guess.token for guess in found)]
            logits_V = running.of_tokenizer(self._session.read(running.prompt, new)[0])
            allowed_V = constraint.allowed(len(logits_V)) if constraint else None
            probs_V = running.request.sampling.probabilities(logits_V, History(running.prompt, new), allowed_V)
            token = draw(probs_V, running.generator)
            found.append(Guess(token, probs_V))
            if running.ends(token) or (constraint and constraint.take(token)):
                break
        return found


@dataclass(frozen=True)
class NgramLookup:
    """What followed the last time the text ended as it does now (prompt lookup, Saxena 2023): no second model.

    The longest of the endings of `longest` … `shortest` ids that stands earlier in prompt or new text counts, and of
    its places the last one.
    """

    n_tokens: int = 4
    longest: int = 3
    shortest: int = 1

    def __post_init__(self) -> None:
        _check(self.n_tokens)
        if not 1 <= self.shortest <= self.longest:
            raise SettingsError(f"ngram: given {self.shortest}…{self.longest}, should be 1 ≤ shortest ≤ longest")

    def guesses(self, running: Running, most: int) -> list[Guess]:
        """Certain guesses; none where the text's end is new."""
        ids = [*running.prompt, *running.new]
        for n in range(min(self.longest, len(ids) - 1), self.shortest - 1, -1):
            for at in range(len(ids) - n - 1, -1, -1):
                if ids[at : at + n] == ids[-n:]:
                    return [Guess(token) for token in ids[at + n : at + n + min(self.n_tokens, most)]]
        return []


def speculate(session: Session, running: Running, draft: Draft) -> str:
    """One pass of the model: judge the guesses, go on by those taken and one token more; the text that lets out."""
    guesses = draft.guesses(running, running.request.max_new_tokens - len(running.new) - 1)
    new = [*running.new, *(guess.token for guess in guesses)]
    logits_TV = session.read(running.prompt, new, n_last=len(guesses) + 1)
    running.drafted += len(guesses)
    text = ""
    for guess, logits_V in zip(guesses, logits_TV):
        token, taken = judge(guess, running.probabilities(logits_V), running.generator)
        running.accepted += taken
        text += running.take(token, logits_V)
        if not taken or running.finish_reason is not None:
            return text
    return text + running.step(logits_TV[-1])


def judge(guess: Guess, probs_V: Tensor, generator: Generator) -> tuple[int, bool]:
    """A token of the distribution float64 [V], and whether it is the guess."""
    token, guess_V = guess
    if guess_V is None:
        guess_V = torch.zeros_like(probs_V).index_fill_(0, torch.tensor(token), 1.0)
    if float(torch.rand((), dtype=torch.float64, generator=generator)) * guess_V[token] < probs_V[token]:
        return token, True
    # Nothing is left only where rounding alone made the two differ.
    rest_V = (probs_V - guess_V).clamp_min(0)
    return draw(rest_V if float(rest_V.sum()) > 0 else probs_V, generator), False


def _check(n_tokens: int) -> None:
    if n_tokens < 1:
        raise SettingsError(f"draft_tokens: given {n_tokens}, should be at least 1")
