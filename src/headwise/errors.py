"""The errors a user may meet. Every one says what was given, what is allowed and what to do, in one line a problem.

The command line prints them as `error: …` and exits non-zero; nothing else is caught, so a traceback is a bug.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class HeadwiseError(Exception):
    """Anything a user can cause and can mend. `exit_code` is what the command line ends with."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a specification: which field, what stood there, what may stand there."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class SpecError(HeadwiseError, ValueError):
    """A line, YAML text, flag or keyword that describes no architecture. Carries *all* problems found.

    It is a ValueError too, so that pydantic collects it with the other fields' problems.
    """

    exit_code = 2

    def __init__(self, problems: Sequence[Problem] | str, *, where: str = "") -> None:
        self.problems = [Problem("", problems)] if isinstance(problems, str) else list(problems)
        self.where = where
        super().__init__((f"in {where!r}: " if where else "") + listed(str(p) for p in self.problems))


class RegistryError(HeadwiseError):
    """A name registered twice, or a plug-in that cannot be loaded."""


class SettingsError(HeadwiseError):
    """A setting (keyword or flag) out of its range, or two that contradict each other. Carries all problems found."""

    exit_code = 2

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(listed(self.problems))


class DataError(HeadwiseError):
    """Text that cannot be read: missing, empty, wrongly encoded, or with a vocabulary too large."""


class FormatError(HeadwiseError):
    """A model or checkpoint file that is truncated, malformed or not ours."""


class TrainingError(HeadwiseError):
    """Training that cannot go on: NaN or infinite loss or gradients, named by step and layer."""


class Interrupted(HeadwiseError):
    """Ctrl-C: what was reached is saved, and the message says how to go on."""

    exit_code = 130


def listed(texts: Iterable[str]) -> str:
    """One problem as it is, several as a list with their number."""
    lines = list(texts)
    return (
        "\n".join([f"{len(lines)} problems", *(f"  - {line}" for line in lines)]) if len(lines) > 1 else "".join(lines)
    )


def together(*makers: Callable[[], Any]) -> list[Any]:
    """What the makers return; where several fail on what was asked for, the problems of all in one error.

    Raises:
        SpecError: of the only maker that failed so.
        SettingsError: of the only one, or of all.
    """
    made, errors = [], []
    for make in makers:
        try:
            made.append(make())
        except (SpecError, SettingsError) as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        where = [f"in {error.where!r}: " if isinstance(error, SpecError) and error.where else "" for error in errors]
        raise SettingsError([f"{at}{problem}" for at, error in zip(where, errors) for problem in error.problems])
    return made


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def short(value: object) -> str:
    """A value's repr, cut to one readable piece, quick for any value; a call of the line grammar as it was written."""
    if isinstance(value, dict) and isinstance(kind := value.get("kind"), str):
        return f"{kind[:50]}({'…' if len(value) > 1 else ''})"
    try:
        text = _REPR.repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:59] + "…"


def nearest(name: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest allowed spelling, or the empty string."""
    close = difflib.get_close_matches(name.lower(), list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_of(name: object, allowed: Iterable[str], what: str = "name") -> str:
    """A sentence for an unknown name: what was given, the nearest spelling, and what is allowed."""
    options = sorted(allowed)
    hint = nearest(name, options) if isinstance(name, str) else ""
    return f"unknown {what} {short(name)}{hint}; allowed: {', '.join(options)}"
