"""Everything that can be chosen about an A/B: the settings of its distillations, the arms, and how they are judged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_settings import CliSuppress, NoDecode

from headwise.distill.settings import DistillSettings, Projection
from headwise.errors import SettingsError
from headwise.lab.ab.arms import Arm, parse_arms
from headwise.lab.settings import number_or_list, seed_problems, seeds_of
from headwise.train.settings import TrainSettings

EVALUATIONS = 10


def _joined(value: Any) -> Any:
    """A list of arms is as good as a text."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


class ABSettings(DistillSettings):
    """How ways to distil are compared. The settings of distillation hold for every run of every arm."""

    arms: Annotated[str, BeforeValidator(_joined)] = Field(
        "none,flat,structured,structured:share=no,structured:init=random",
        description="ways to distil: a projection, and :setting=value where it differs, as flat:lambda_kv=1",
    )
    baseline: str | None = Field(None, description="the arm that others are judged against; default flat, or the first")
    seeds: Annotated[int | tuple[int, ...], BeforeValidator(number_or_list), NoDecode] = Field(
        6, description="how many seeds, or the seeds themselves, as 0,1,2; a claim needs at least 5"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="the first seed, where seeds is a number")
    out: Path | None = Field(None, description="folder of the A/B; one begun there goes on")
    margin: float = Field(
        0.005, ge=0, allow_inf_nan=False, description="largest relative difference of loss that does not matter"
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="how often an A/B may claim a difference wrongly")
    workers: int | None = Field(
        None, ge=1, description="processes that train at once; default one a core on a CPU, one on a GPU"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of a run; default 1, so that runs fill the cores")
    eval_every: int = Field(0, ge=0, description=f"updates between evaluations; default {EVALUATIONS} in a run")
    checkpoint_every: int = Field(100, ge=0, description="updates between checkpoints; 0: only at the end")
    keep_checkpoints: bool = Field(True, description="keep each run's last checkpoint, 12 bytes a parameter")
    projection: CliSuppress[Projection] = Field("structured", description="not for an A/B: its arms say it")

    def contradictions(self) -> Iterable[tuple[tuple[str, ...], str]]:
        yield from super().contradictions()
        yield from seed_problems(self.seed_list, self.seeds)
        if "projection" in self.model_fields_set:
            yield ("projection",), f"projection: is what arms differ in; give it as an arm, as --arms {self.projection}"
        try:
            arms = self.arm_list
        except SettingsError as error:
            yield from ((("arms",), problem) for problem in error.problems)
            return
        if self.baseline is not None and self.baseline not in (names := [arm.name for arm in arms]):
            yield ("arms", "baseline"), f"baseline: given {self.baseline!r}, the arms are {', '.join(names)}"
        for arm in arms:
            yield from self._problems_of(arm)

    def _problems_of(self, arm: Arm) -> Iterable[tuple[tuple[str, ...], str]]:
        """What is wrong with one arm's settings and not with those of all."""
        given = {name: getattr(self, name) for name in set(DistillSettings.model_fields) & self.model_fields_set}
        try:
            DistillSettings(**{**given, **arm.changes})
        except SettingsError as error:
            named = [problem for problem in error.problems if problem.partition(":")[0] in arm.changes]
            yield from ((("arms",), f"arms: in {arm.name!r}: {problem}") for problem in named)

    @property
    def arm_list(self) -> tuple[Arm, ...]:
        """The arms, the baseline first."""
        arms = parse_arms(self.arms, DistillSettings.model_fields)
        first = self.baseline or ("flat" if any(arm.name == "flat" for arm in arms) else arms[0].name)
        return tuple(sorted(arms, key=lambda arm: arm.name != first))

    @property
    def seed_list(self) -> list[int]:
        """The seeds of the verdict."""
        return seeds_of(self.seeds, self.seed)

    def for_run(self, arm: Arm, seed: int, out: Path, threads: int | None, steps: int | None) -> DistillSettings:
        """The settings of one distillation; `steps` are given where they are known, in place of epochs."""
        own = set(DistillSettings.model_fields) & self.model_fields_set
        given: dict[str, Any] = {name: getattr(self, name) for name in own}
        if steps is not None:
            given |= {"steps": steps, "epochs": None, "eval_every": self.eval_every or max(1, steps // EVALUATIONS)}
        given |= {"checkpoint_every": self.checkpoint_every, "seed": seed, "out": out, "threads": threads}
        return DistillSettings(**{**given, **arm.changes})

    def differences(self, other: TrainSettings) -> list[str]:
        """What would make other runs. What only adds runs or judges them may change from one call to the next."""
        free = {"arms", "baseline", "seeds", "seed", "margin", "alpha", "workers", "keep_checkpoints"}
        found = [text for text in super().differences(other) if text.partition("=")[0] not in free]
        if (self.threads or 1) != (other.threads or 1):  # the order of sums depends on it
            found.append(f"threads={other.threads} (was {self.threads})")
        return found
