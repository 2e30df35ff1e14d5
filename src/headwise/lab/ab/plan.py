"""What an A/B will run, before anything runs: teachers, student and data are loaded, and every arm is tried on them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.distill.job import DistillJob, prepare, settled
from headwise.distill.matching import Matching
from headwise.distill.settings import DistillSettings
from headwise.errors import HeadwiseError, SettingsError
from headwise.lab.ab.arms import Arm
from headwise.lab.ab.settings import ABSettings
from headwise.lab.compare import flag
from headwise.lab.plan import variant_info
from headwise.lab.result import DatasetInfo, VariantInfo
from headwise.lab.runner import Task, threads_of, workers_of
from headwise.spec import ModelSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ABPlan:
    """An A/B made concrete. The first arm is the baseline.

    Attributes:
        typed: the settings as they were given, for showing and repeating them.
        settings: the same with files as absolute paths.
        student: the student's resolved spec, the same for all arms.
        teachers: fingerprints of the teachers.
        specs: of student and teachers, for what a fresh process must import to know them.
    """

    typed: ABSettings
    settings: ABSettings
    arms: tuple[Arm, ...]
    device: torch.device
    student: ModelSpec
    teachers: list[str]
    specs: list[ModelSpec]
    dataset: DatasetInfo
    steps: int

    @property
    def threads(self) -> int | None:
        """CPU threads of a run."""
        return threads_of(self.settings.threads, self.device)

    @property
    def workers(self) -> int:
        """Runs at once."""
        return workers_of(self.settings.workers, self.threads, self.device)

    @property
    def variants(self) -> list[VariantInfo]:
        """What a comparison's result says of each arm."""
        student, context = self.student, self.settings.seq_len
        return [
            variant_info(arm.name, student, context, steps=self.steps, lr=_lr(self.settings, arm)) for arm in self.arms
        ]

    def for_run(self, arm: Arm, seed: int, out: Path) -> DistillSettings:
        """The settings of one distillation."""
        return self.settings.for_run(arm, seed, out, self.threads, self.steps)

    def task(self, arm: Arm, seed: int, out: Path) -> Task:
        """One distillation."""
        payload = {"settings": self.for_run(arm, seed, out).model_dump(mode="json", exclude_unset=True)}
        return Task(f"{arm.name}, seed {seed}", "distill", payload)

    def command(self, arm: Arm) -> str:
        """The shell command of the arm's run with the first seed, in a folder of its own."""
        seed, out = self.settings.seed_list[0], Path("runs") / folder_name(arm)
        settings = self.typed.for_run(arm, seed, out, self.threads, self.steps)
        return shell(["headwise", "distill", "run"], settings, settings.model_fields_set - {"threads"})


def make_plan(settings: ABSettings) -> ABPlan:
    """Load teachers, student and data, and build what each arm needs of them; nothing is trained.

    Raises what `headwise.distill.job.prepare` raises, and SettingsError for arms that do not fit, all of them at once.
    """
    arms, out, typed = settings.arm_list, Path("unused"), settings
    settings = _pinned(settings)
    job = prepare(settled(settings.for_run(arms[0], settings.seed_list[0], out, settings.threads, None)))
    problems = []
    for arm in arms[1:]:
        try:
            own = settled(settings.for_run(arm, settings.seed_list[0], out, settings.threads, None))
            for teacher in job.teachers:
                Matching(teacher.spec, job.spec, own)
        except HeadwiseError as error:
            problems.append(f"arms: in {arm.name!r}: {error}")
    if problems:
        raise SettingsError(problems)
    return ABPlan(
        typed=typed,
        settings=settings,
        arms=arms,
        device=job.device,
        student=job.spec,
        teachers=[teacher.fingerprint for teacher in job.teachers],
        specs=[job.spec, *(teacher.spec for teacher in job.teachers)],
        dataset=_dataset_info(job),
        steps=job.settings.steps,
    )


def folder_name(arm: Arm) -> str:
    """An arm's name as that of a folder; that the run in it is this arm's is checked when it goes on."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", arm.name).strip("-")


def command(settings: ABSettings) -> str:
    """The shell command that makes the same A/B in a folder of its own."""
    return shell(["headwise", "distill", "ab"], settings, settings.model_fields_set - {"out", "workers"})


def shell(words: list[str], settings: DistillSettings, names: Collection[str]) -> str:
    """A shell command with these settings as its flags, the teachers first."""
    words = [*words, *(word for teacher in settings.teacher for word in ("--teacher", teacher))]
    for name, value in settings:
        if name in names and name != "teacher":
            words += flag(name, value)
    return shlex.join(words)


def _pinned(settings: ABSettings) -> ABSettings:
    """Files as absolute paths; all else stays open, for each arm's run to settle."""
    fixed = settled(settings)
    names = {"teacher", "student"} | ({"data", "tokenizer", "cache_dir"} & settings.model_fields_set)
    return settings.model_copy(update={name: getattr(fixed, name) for name in names})


def _lr(settings: ABSettings, arm: Arm) -> float:
    return settings.for_run(arm, 0, Path("unused"), None, None).with_recipe().lr


def _dataset_info(job: DistillJob) -> DatasetInfo:
    dataset, settings = job.dataset, job.settings
    return DatasetInfo(
        name=dataset.name,
        fingerprint=dataset.fingerprint,
        tokenizer=settings.tokenizer,
        vocab_size=dataset.tokenizer.vocab_size,
    )
