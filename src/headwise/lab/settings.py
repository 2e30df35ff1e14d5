"""Everything that can be chosen about a comparison: the settings of its training runs, and how they are compared."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import CliSuppress, NoDecode

from headwise.train.settings import TrainSettings

# The first tuning seed: far from the small numbers people choose for the seeds of the verdict.
FIRST_TUNE_SEED = 1_000_000


def number_or_list(value: Any) -> Any:
    """ "6" is a number, "0,1,2" and "[7]" are lists."""
    if not isinstance(value, str):
        return value
    try:
        if not (value.lstrip().startswith("[") or "," in value):
            return int(value)
        return [int(item) for item in value.strip(" []").split(",") if item.strip()]
    except ValueError:
        raise ValueError("should be a number of seeds such as 6, or a list such as 0,1,2") from None


def seeds_of(seeds: int | tuple[int, ...], first: int) -> list[int]:
    """The seeds themselves, where `seeds` may be their number."""
    return list(range(first, first + max(0, seeds))) if isinstance(seeds, int) else list(seeds)


def seed_problems(seeds: list[int], given: int | tuple[int, ...]) -> Iterable[tuple[tuple[str, ...], str]]:
    """What is wrong with the seeds of a comparison, as `Settings.contradictions` tells it."""
    if not seeds:
        yield ("seeds", "seed"), f"seeds: given {given!r}, at least one is needed; 6 is usual"
    if len(set(seeds)) < len(seeds):
        yield ("seeds", "seed"), f"seeds: {_shown(seeds)} has a seed twice; each can count once only"
    if any(not 0 <= seed < 2**63 for seed in seeds):
        yield ("seeds", "seed"), f"seeds: {_shown(seeds)} should lie between 0 and 2^63"


class CompareSettings(TrainSettings):
    """How architectures are compared. The settings of training hold for every run of every line."""

    out: Path | None = Field(None, description="folder of the comparison; a comparison begun there goes on")
    init_from: CliSuppress[Path | None] = Field(None, description="not for a comparison")
    seeds: Annotated[int | tuple[int, ...], BeforeValidator(number_or_list), NoDecode] = Field(
        6, description="how many seeds, or the seeds themselves, as 0,1,2; a claim needs at least 5"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="the first seed, where seeds is a number")
    match: Literal["params", "flops", "tokens", "time", "none"] = Field(
        "params",
        description="what is made equal to the baseline: params or flops (by the feed-forward's width), "
        "tokens (same steps), time (steps that fit the baseline's training time), or none",
    )
    lr_grid: tuple[float, ...] = Field(
        (), description="learning rates to choose from, for each line by itself, on seeds that never enter the verdict"
    )
    tune_seeds: int = Field(2, ge=1, description=f"seeds of each trial of lr_grid: {FIRST_TUNE_SEED:,} and following")
    margin: float = Field(
        0.005, ge=0, allow_inf_nan=False, description="largest relative difference of loss that does not matter"
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="how often a comparison may claim a difference wrongly")
    workers: int | None = Field(
        None, ge=1, description="processes that train at once; default one a core on a CPU, one on a GPU"
    )
    measure_rounds: int = Field(
        7, ge=0, description="rounds in which speed and memory are measured; 6 give a 95 % interval, 0 leaves them out"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of a run; default 1, so that runs fill the cores")
    checkpoint_every: int = Field(100, ge=0, description="updates between checkpoints; 0: only at the end")
    keep_checkpoints: bool = Field(True, description="keep each run's last checkpoint, 12 bytes a parameter")

    def contradictions(self) -> Iterable[tuple[tuple[str, ...], str]]:
        for fields, text in super().contradictions():
            if not (self.lr_grid and "lr" in fields):
                yield fields, text
        if self.init_from is not None:
            yield ("init_from",), "init_from: a comparison trains every line from its own start; use `headwise train`"
        seeds = self.seed_list
        yield from seed_problems(seeds, self.seeds)
        if bad := [lr for lr in self.lr_grid if not 0 < lr < float("inf")]:
            yield ("lr_grid",), f"lr_grid: given {_shown(bad)}, learning rates should be finite and more than 0"
        if len(set(self.lr_grid)) < len(self.lr_grid):
            yield ("lr_grid",), f"lr_grid: {_shown(self.lr_grid)} has a learning rate twice"
        if self.lr_grid and "lr" in self.model_fields_set:
            yield ("lr", "lr_grid"), f"lr: {self.lr:g} and lr_grid={_shown(self.lr_grid)} exclude each other; give one"
        if self.lr_grid and self.min_lr is not None and self.min_lr > min(self.lr_grid):
            yield (
                ("min_lr", "lr_grid"),
                f"min_lr: {self.min_lr:g} is more than {min(self.lr_grid):g} of lr_grid; and the schedule ends there",
            )
        if self.lr_grid and (shared := set(seeds) & set(self.tuning_seeds)):
            yield (
                ("seeds", "seed", "lr_grid", "tune_seeds"),
                f"seeds: {_shown(sorted(shared))} would be used for tuning and for the verdict; choose smaller ones",
            )

    @property
    def seed_list(self) -> list[int]:
        """The seeds of the verdict."""
        return seeds_of(self.seeds, self.seed)

    @property
    def tuning_seeds(self) -> list[int]:
        """The seeds that the learning rate is chosen on."""
        return list(range(FIRST_TUNE_SEED, FIRST_TUNE_SEED + self.tune_seeds))

    def for_run(self, seed: int, lr: float, steps: int, out: Path, threads: int | None) -> TrainSettings:
        """The settings of one training run."""
        own = set(TrainSettings.model_fields) & self.model_fields_set
        given = {name: getattr(self, name) for name in own} | {"checkpoint_every": self.checkpoint_every}
        warmup = None if self.warmup is None else min(self.warmup, steps)
        return TrainSettings(
            **{**given, "seed": seed, "lr": lr, "steps": steps, "warmup": warmup, "out": out, "threads": threads}
        )

    def differences(self, other: TrainSettings) -> list[str]:
        """What would make other runs. What only adds runs or judges them may change from one call to the next."""
        free = {"seeds", "seed", "margin", "alpha", "workers", "measure_rounds", "keep_checkpoints"}
        found = [text for text in super().differences(other) if text.partition("=")[0] not in free]
        if (self.threads or 1) != (other.threads or 1):  # the order of sums depends on it
            found.append(f"threads={other.threads} (was {self.threads})")
        return found


def _shown(values: Iterable[float]) -> str:
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
