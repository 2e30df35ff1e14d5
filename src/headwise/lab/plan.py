"""What a comparison will run, before anything runs: every line read, resolved, matched to the baseline and built."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from headwise.errors import HeadwiseError, Problem, SettingsError, SpecError
from headwise.lab.match import match
from headwise.lab.result import VariantInfo
from headwise.lab.runner import Task, threads_of, workers_of
from headwise.lab.settings import CompareSettings
from headwise.model import build
from headwise.spec import ModelSpec, count, parse
from headwise.train.job import prepare, resolve_device
from headwise.train.optim import lr_factors
from headwise.train.vein import fitting, unused_by_all

if TYPE_CHECKING:
    import torch

    from headwise.data import Dataset

L = TypeVar("L")
T = TypeVar("T")

OBJECTIVES = {
    "decoder": "causal language modelling",
    "encoder": "masked language modelling",
    "encoder_decoder": "the second half of a text from its first",
}


@dataclass(frozen=True)
class Plan:
    """A comparison made concrete. The first line is the baseline.

    Attributes:
        lines: as given, a spec written as its line.
        parsed: the lines as they were read, for telling whether two comparisons are the same.
        specs: resolved and matched.
        variants: what the report says of each line; `steps` and `lr` are what its runs will have.
    """

    settings: CompareSettings
    dataset: Dataset
    device: torch.device
    lines: list[str]
    parsed: list[str]
    specs: list[ModelSpec]
    variants: list[VariantInfo]

    @property
    def objective(self) -> str:
        """What all lines are trained to predict, in words."""
        return OBJECTIVES[self.specs[0].architecture]

    @property
    def threads(self) -> int | None:
        """CPU threads of a run."""
        return threads_of(self.settings.threads, self.device)

    @property
    def workers(self) -> int:
        """Runs at once."""
        return workers_of(self.settings.workers, self.threads, self.device)

    @property
    def grid(self) -> tuple[float, ...]:
        """The learning rates to tune over; empty where there is nothing to choose."""
        return self.settings.lr_grid if len(self.settings.lr_grid) > 1 else ()

    def train_task(self, index: int, seed: int, lr: float, out: Path) -> Task:
        """One training run of line `index`."""
        steps = self.variants[index].steps or self.settings.steps
        settings = fitting(self.settings.for_run(seed, lr, steps, out, self.threads), self.specs[index])
        payload = {"line": self.variants[index].resolved, "settings": settings.model_dump(mode="json")}
        return Task(f"{self.lines[index]}, seed {seed}", "train", payload)

    def cost(self, index: int) -> float:
        """Training FLOPs of one run of line `index`, for putting long runs first."""
        return (self.variants[index].steps or 0) * (self.variants[index].train_flops_per_token or 0)

    def name(self, index: int) -> str:
        """A folder name for line `index`: 1-llama-attention-gqa-kv-heads-2."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.parsed[index].lower()).strip("-")[:40].rstrip("-")
        return f"{index}-{slug}"

    def with_variants(self, variants: list[VariantInfo]) -> Plan:
        return replace(self, variants=variants)


def make_plan(lines: Sequence[str | ModelSpec], settings: CompareSettings) -> Plan:
    """Read, resolve, match and build every line; nothing is trained and nothing written but the data's cache.

    Raises:
        SpecError: all problems of all lines.
        SettingsError: fewer than two lines, lines with different objectives, or settings that do not fit them.
        DataError: the data cannot be read.
    """
    if isinstance(lines, str):
        raise SettingsError(f"lines: given one text, {lines!r}; give a list of at least two lines")
    if len(lines) < 2:
        raise SettingsError(f"lines: given {len(lines)}, a comparison needs at least two; the first is the baseline")
    parsed = read_all(lines, parse)
    _check_objectives(parsed)
    device = resolve_device(settings.device)
    from headwise.data import load_dataset

    dataset = load_dataset(
        settings.data, settings.tokenizer, text_column=settings.text_column, val_fraction=settings.val_fraction
    )
    if unused := unused_by_all(settings, parsed):
        raise SettingsError(unused)
    resolved = read_all(parsed, lambda line: prepare(line, fitting(settings, line), dataset).spec)
    matches = [match(spec, resolved[0], settings.match, settings.seq_len) for spec in resolved]
    read_all([each.spec for each in matches], lambda spec: _check_buildable(spec, settings))
    texts = [str(line) for line in lines]
    lr = settings.lr if not settings.lr_grid else settings.lr_grid[0] if len(settings.lr_grid) == 1 else None
    variants = []
    for index, (text, each) in enumerate(zip(texts, matches)):
        off, reached = each.off if index else None, each.reached
        more = {"match_note": each.note, "match_off": off, "match_reached": reached, "steps": settings.steps, "lr": lr}
        variants.append(variant_info(text, each.spec, settings.seq_len, **more))
    return Plan(
        settings,
        dataset,
        device,
        texts,
        [str(spec) for spec in parsed],
        [each.spec for each in matches],
        variants,
    )


def variant_info(line: str, spec: ModelSpec, context: int, **more: Any) -> VariantInfo:
    """What is known of a line before it runs: its counts, and `more` of the fields."""
    counts = count(spec, context)
    return VariantInfo(
        line=line,
        resolved=str(spec),
        params=counts.params,
        flops_per_token=counts.flops_per_token,
        params_by_part=counts.params_by_part,
        train_flops_per_token=counts.train_flops_per_token,
        kv_bytes_per_token=counts.kv_bytes_per_token,
        **more,
    )


def read_all(lines: Sequence[L], read: Callable[[L], T]) -> list[T]:
    """`read` of every line; where some fail, one `SpecError` with the problems of all of them."""
    done, problems = [], []
    for line in lines:
        try:
            done.append(read(line))
        except SpecError as error:
            problems += [Problem(f"in {str(line)!r}", str(problem)) for problem in error.problems]
        except SettingsError as error:
            problems.append(Problem(f"in {str(line)!r}", str(error)))
    if problems:
        raise SpecError(problems)
    return done


def _check_objectives(specs: Sequence[ModelSpec]) -> None:
    if len({spec.architecture for spec in specs}) > 1:
        listed = "; ".join(f"{str(spec)!r} is {spec.architecture}" for spec in specs)
        raise SettingsError(
            f"lines with different objectives cannot be compared, for their losses measure different things: {listed}"
        )


def _check_buildable(spec: ModelSpec, settings: CompareSettings) -> None:
    """Refuse a spec that cannot be built, its shapes at least: on the meta device this costs no memory."""
    try:
        model = build(spec, device="meta")
    except HeadwiseError:
        raise
    except Exception as error:  # a third party's mechanism may fail in any way
        raise SpecError(f"cannot be built: {type(error).__name__}: {error}") from error
    lr_factors((name for name, _ in model.named_parameters()), settings.lr_multipliers)


def settings_json(settings: CompareSettings) -> dict[str, Any]:
    """The settings as JSON, without the folder; `CompareSettings(**…)` reads them back."""
    silent = {"out", "lr"} if settings.lr_grid else {"out"}
    return settings.model_dump(mode="json", exclude=silent)
