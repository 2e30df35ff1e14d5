"""What a distillation would train and how large it is, without any of it: for `--dry-run`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from headwise.distill.caching import cache_size, sketch
from headwise.distill.job import prepare, settled
from headwise.distill.settings import DistillSettings
from headwise.spec import count


@dataclass(frozen=True)
class Plan:
    """What `distill` would do. `str` of it is for people.

    Attributes:
        student, teachers: (resolved line, parameters).
        aligner_params: of what learns beside the student.
        cache_bytes: what the teachers' caches take, or would with `--cache-teacher`, beyond what is there already.
    """

    student: tuple[str, int]
    teachers: tuple[tuple[str, int], ...]
    projection: str
    recipe: str
    aligner_params: int
    data: str
    steps: int
    tokens: int
    cache_bytes: int
    cache_dtype: str
    cached: bool

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"student  {self.student[1]:>13,} parameters  {self.student[0]}"]
        lines += [f"teacher  {params:>13,} parameters  {line}" for line, params in self.teachers]
        lines.append(f"aligner  {self.aligner_params:>13,} parameters  projection {self.projection}")
        lines.append(f"recipe {self.recipe}: {self.steps:,} steps, {self.tokens:,} tokens of {self.data}")
        verb = "takes" if self.cached else "would take, with --cache-teacher,"
        lines.append(f"the teacher's cache {verb} {self.cache_bytes / 1e6:,.1f} MB in {self.cache_dtype}")
        lines.append("nothing was trained and nothing written (--dry-run)")
        return "\n".join(lines)


def plan(settings: DistillSettings) -> Plan:
    """What `distill` would do. Raises what it would raise before its first step."""
    job = prepare(settled(settings))
    settings = job.settings
    beside = [sketch(teacher, job.spec, settings) for teacher in job.teachers]
    tokens = settings.steps * settings.batch_size * settings.accumulate * settings.seq_len
    return Plan(
        student=(str(job.spec), count(job.spec).params),
        teachers=tuple((str(teacher.spec), count(teacher.spec).params) for teacher in job.teachers),
        projection=settings.projection,
        recipe=settings.recipe,
        aligner_params=sum(p.numel() for each in beside for p in each.parameters() if p.requires_grad),
        data=job.dataset.name,
        steps=settings.steps,
        tokens=tokens,
        cache_bytes=cache_size(job),
        cache_dtype=settings.cache_dtype,
        cached=settings.cache_teacher,
    )
