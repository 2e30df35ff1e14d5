"""What the arms of an A/B are called: `structured:share=no:lambda_kv=1` is a projection and settings that differ.

An arm begins with the projection (`none`, `flat`, `structured`); each `:key=value` after it sets a field of
`DistillSettings` for this arm alone. `share` and `init` (uniform or random) are short for document 004's two switches.
A value that holds a comma stands in brackets: `flat:logit_kd=(2,0.5)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from headwise.errors import SettingsError, one_of, short

PROJECTIONS = ("none", "flat", "structured")
SHORT = {"share": "share_dim_proj", "init": "init_uniform"}
WORDS: dict[str, Any] = {"yes": True, "no": False, "true": True, "false": False}
INITS = {"uniform": True, "random": False}
# What belongs to a whole A/B: arms that differ in these would not see the same data, teacher or budget.
SHARED = {
    *("out", "seed", "steps", "epochs", "data", "text_column", "val_fraction", "tokenizer", "format", "loss_on"),
    *("teacher", "teacher_weights", "student", "init_from", "align", "batch_size", "accumulate", "seq_len", "size"),
    *("threads", "device", "deterministic", "compile", "log_every", "eval_every", "checkpoint_every", "measure_rows"),
    *("cache_teacher", "cache_dtype", "cache_dir", "tensorboard", "run_name", "projection"),
    *("train_limit", "val_limit"),
}
# What an arm has that does not say otherwise, for telling in which settings two arms differ.
DEFAULTS: dict[str, Any] = {"share_dim_proj": True, "init_uniform": True}


@dataclass(frozen=True)
class Arm:
    """One way to distil: its name as typed, and the settings that are its own."""

    name: str
    changes: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What is its own, and the defaults that arms are most often told apart by."""
        return DEFAULTS | self.changes

    @property
    def projection(self) -> str:
        return str(self.changes["projection"])


def parse_arms(arms: str | Sequence[str], fields: Iterable[str]) -> tuple[Arm, ...]:
    """The arms, in the order given. `fields` are the names of settings that an arm may set.

    Raises:
        SettingsError: all problems of all arms: unknown projections and settings, pieces without `=`, the same twice.
    """
    texts = _split(arms) if isinstance(arms, str) else [str(arm).strip() for arm in arms]
    allowed = sorted({*SHORT, *fields} - SHARED)
    made: list[Arm] = []
    problems: list[str] = []
    for text in texts:
        try:
            made.append(_arm(text, allowed))
        except SettingsError as error:
            problems += [f"arms: in {short(text)}: {problem}" for problem in error.problems]
    for i, arm in enumerate(made):
        if twin := next((other.name for other in made[:i] if other.changes == arm.changes), None):
            problems.append(f"arms: {arm.name!r} is the same as {twin!r}; give each once")
    if not texts:
        problems.append("arms: none given; as none,flat,structured")
    if problems:
        raise SettingsError(problems)
    return tuple(made)


def _split(text: str) -> list[str]:
    """The pieces between commas that stand in no brackets."""
    return [piece.strip() for piece in re.split(r",(?![^()]*\))", text) if piece.strip()]


def _arm(text: str, allowed: Sequence[str]) -> Arm:
    projection, *pieces = [piece.strip() for piece in text.split(":")]
    problems = [] if projection in PROJECTIONS else [one_of(projection, PROJECTIONS, "projection")]
    changes: dict[str, Any] = {"projection": projection}
    for piece in pieces:
        key, equals, value = (part.strip() for part in piece.partition("="))
        key = key.replace("-", "_")
        name = SHORT.get(key, key)
        if not equals or not value:
            problems.append(f"{piece!r} should be a setting and its value, as share=no")
        elif key in SHARED:
            problems.append(f"{key} is the same for all arms; give it as --{key.replace('_', '-')}")
        elif key not in allowed:
            problems.append(one_of(key, allowed, "setting"))
        elif name in changes:
            problems.append(f"{key} is given twice")
        elif key == "init" and value not in INITS:
            problems.append(one_of(value, INITS, "init"))
        else:
            changes[name] = INITS[value] if key == "init" else WORDS.get(value.lower(), value.strip("()"))
    if problems:
        raise SettingsError(problems)
    return Arm(":".join([projection, *pieces]), changes)
