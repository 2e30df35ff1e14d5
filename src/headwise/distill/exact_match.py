"""Grade-school maths by its final number: what a model writes after a question, against the answer that is known.

Two ways of reading the number out of the text, those of lm-eval's `gsm8k`: *strict*, what follows `####`, as the
examples teach it; *flexible*, the last number there is. They are compared as numbers, so 1,006 is 1006.00.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from headwise.data.segments import FINAL_ANSWER, Example
from headwise.errors import DataError, HeadwiseError
from headwise.generate.batch import answers
from headwise.generate.request import Request
from headwise.generate.sampling import Sampling

if TYPE_CHECKING:
    from headwise.data import Tokenizer
    from headwise.model.base import LanguageModel

_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_NEXT_QUESTION = "\nQuestion:"  # a model that has answered may go on with a question of its own


@dataclass(frozen=True)
class Answer:
    """One question answered: the number wanted, the text written (None: it could not be), and whether they agree."""

    where: str
    wanted: Decimal
    text: str | None
    strict: bool
    flexible: bool


@dataclass(frozen=True)
class ExactMatch:
    """Every question once, in order."""

    answers: tuple[Answer, ...]

    def share(self, way: str = "strict") -> tuple[float, float, float]:
        """The share that is right, read "strict" or "flexible", and its 95 % interval (Wilson 1927)."""
        from scipy.stats import binomtest

        right = sum(getattr(answer, way) for answer in self.answers)
        interval = binomtest(right, len(self.answers)).proportion_ci(0.95, method="wilson")
        return right / len(self.answers), float(interval.low), float(interval.high)

    def figures(self) -> dict[str, Any]:
        """The numbers, as JSON."""
        shares = {way: dict(zip(("share", "low", "high"), self.share(way))) for way in ("strict", "flexible")}
        unanswered = sum(answer.text is None for answer in self.answers)
        return {"questions": len(self.answers), "unanswered": unanswered, **shares}


def exact_match(
    model: LanguageModel,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    shots: Sequence[Example] = (),
    max_new_tokens: int = 256,
    batch_size: int = 8,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> ExactMatch:
    """Let the model answer what the examples ask, greedily, and compare the final numbers.

    Args:
        examples: as `ExampleSet.texts` has them; what stands before their first part that is no prompt is asked, the
            number in their answer is wanted.
        shots: examples that are put before each question, as they stand.
        on_answer: told each answer as soon as it is there.

    A question too long for the model counts as wrong, and as unanswered.

    Raises:
        DataError: no examples, or one whose answer has no number.
        SettingsError: the model writes no text.
    """
    if not examples:
        raise DataError("there are no questions to answer; give examples with prompts and answers (format gsm8k)")
    wanted = [_number_of(example) for example in examples]
    sampling = Sampling(temperature=0.0)
    requests = [
        Request(_prompt(tokenizer, example, shots), sampling, max_new_tokens=max_new_tokens, stop=[_NEXT_QUESTION])
        for example in examples
    ]
    found: dict[int, Answer] = {}
    for place, result in answers(model, tokenizer, requests, batch_size=batch_size):
        text = None if isinstance(result, HeadwiseError) else result.text
        read = [None if text is None else number(text, strict=strict) for strict in (True, False)]
        right = [each is not None and each == wanted[place] for each in read]
        found[place] = Answer(examples[place].where, wanted[place], text, *right)
        on_answer(found[place])
    return ExactMatch(tuple(found[place] for place in range(len(examples))))


def number(text: str, *, strict: bool) -> Decimal | None:
    """The final number of a text: the first behind `####`, or the last one at all; None where there is none."""
    if strict:
        found = _NUMBER.match(text.partition(FINAL_ANSWER)[2].lstrip())
        return None if found is None else _value(found[0])
    numbers = _NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def _value(digits: str) -> Decimal:
    return Decimal(digits.replace(",", "").replace("$", ""))


def _number_of(example: Example) -> Decimal:
    value = number(example.of_part("answer"), strict=False)
    if value is None:
        raise DataError(f"{example.where}: no number in its answer, so exact match has nothing to compare")
    return value


def _prompt(tokenizer: Tokenizer, example: Example, shots: Sequence[Example]) -> list[int]:
    text = "".join(f"{shot.text}\n\n" for shot in shots) + example.prompt
    begin = () if example.special else tokenizer.begin_ids
    return [*begin, *map(int, tokenizer.encode(text, special=example.special))]
