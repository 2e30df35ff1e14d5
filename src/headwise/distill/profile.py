"""What one step of a distillation costs, part by part, and whether its shapes and numbers are sound (document 004)."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from headwise.distill.capture import capture
from headwise.distill.job import prepare, settled
from headwise.distill.settings import DistillSettings
from headwise.distill.trainer import DistillTrainer
from headwise.errors import SettingsError
from headwise.train.job import torch_state
from headwise.train.objective import loss_sum

if TYPE_CHECKING:
    from headwise.distill.matching import Pairs
    from headwise.distill.trainer import Lesson

Shapes = dict[str, list[int]]


@dataclass(frozen=True)
class Profile:
    """One step on a batch of real text.

    Attributes:
        teacher_shapes, student_shapes, aligned_shapes: of what is compared, `[B,L,H,T,D]`.
        params: of teacher, student and aligner (all that learns beside the student).
        seconds: of a teacher's reading, of the student's step without it, of aligning, comparing and their backward
            pass: medians over the rounds.
        aligner_share: aligning as a share of the three together.
        signal_bytes: what the teacher's signals of one batch take in float32.
        peak_bytes: the most memory this process has taken so far (of a GPU: what was allocated on it).
        not_finite: what holds a NaN or an infinity, by name; empty where all is sound.
    """

    projection: str
    teacher_shapes: Shapes
    student_shapes: Shapes
    aligned_shapes: Shapes
    params: dict[str, int]
    seconds: dict[str, float]
    aligner_share: float
    signal_bytes: int
    peak_bytes: int
    not_finite: list[str]

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        def shapes(who: str, found: Mapping[str, list[int]]) -> list[str]:
            return [f"{who:<9} {name:<8} {shape}" for name, shape in found.items()]

        lines = [f"projection {self.projection}, tensors [B,L,H,T,D]"]
        lines += shapes("teacher", self.teacher_shapes) + shapes("student", self.student_shapes)
        lines += shapes("aligned", self.aligned_shapes)
        lines.append("parameters: " + ", ".join(f"{name} {n:,}" for name, n in self.params.items()))
        each = ", ".join(f"{name} {1000 * value:,.1f} ms" for name, value in self.seconds.items())
        lines.append(f"one step: {each}; the aligner takes {self.aligner_share:.1%}")
        mib = 2**20
        lines.append(f"memory: {self.signal_bytes / mib:,.1f} MiB of signals, at most {self.peak_bytes / mib:,.0f} MiB")
        bad = ", ".join(self.not_finite)
        lines.append(f"NOT FINITE: {bad}" if bad else "every number is finite")
        return "\n".join(lines)


def profile(settings: DistillSettings | None = None, *, rounds: int = 3, **changes: Any) -> Profile:
    """Take `rounds` steps of what `distill` would train with these settings, and write nothing.

    Raises as `distill` does for what does not fit; `SettingsError` where nothing is projected.
    """
    if rounds < 1:
        raise SettingsError(f"rounds: given {rounds}, at least 1 step is measured")
    given = {} if settings is None else settings.model_dump(exclude_unset=True)
    settings = settled(DistillSettings(**{**given, **changes, "cache_teacher": False, "out": None}))
    if settings.projection == "none":
        raise SettingsError("projection: none has nothing to profile; choose structured or flat")
    job = prepare(settings)
    with torch_state(settings, job.device):
        return _measured(DistillTrainer(job), rounds)


def _measured(trainer: DistillTrainer, rounds: int) -> Profile:
    settings, matching = trainer.job.settings, trainer.matchings[0]
    part = trainer.lesson(trainer.batches.batch(0)).to(trainer.job.device)
    times: dict[str, list[float]] = {"teacher": [], "student": [], "aligner": []}
    for _ in range(rounds):
        times["teacher"].append(_timed(lambda: trainer.look(0, part, matching.of_teacher)))
        times["student"].append(_timed(lambda: _student(trainer, part)))
        times["aligner"].append(_timed(_aligning(trainer, part)))
    trainer.trained.zero_grad(set_to_none=True)
    seen = trainer.look(0, part, matching.of_teacher)
    with capture(trainer.model, matching.of_student) as student:
        trainer.model(part.ids_BT)
    pairs = matching.pairs(student, seen, matching.of_student)
    losses = trainer.losses(part)
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: p.grad for name, p in trainer.trained.named_parameters() if p.grad is not None}
    looked_at = {f"teacher's {name}": x for name, x in seen.signals.items()}
    looked_at |= {f"student's {name}": s for name, (s, _) in pairs.items()}
    looked_at |= {f"aligned {name}": t for name, (_, t) in pairs.items()}
    looked_at |= {f"loss {name}": loss for name, loss in losses.items()}
    looked_at |= {f"gradient of {name}": gradient for name, gradient in gradients.items()}
    seconds = {name: median(values) for name, values in times.items()}
    return Profile(
        projection=settings.projection,
        teacher_shapes={name: list(x.shape) for name, x in seen.signals.items()},
        student_shapes={name: list(s.shape) for name, (s, _) in pairs.items()},
        aligned_shapes={name: list(t.shape) for name, (_, t) in pairs.items()},
        params={
            "teacher": sum(p.numel() for p in trainer.job.teachers[0].model.parameters()),
            "student": sum(p.numel() for p in trainer.model.parameters()),
            "aligner": sum(p.numel() for p in trainer.beside.parameters()),
        },
        seconds=seconds,
        aligner_share=seconds["aligner"] / sum(seconds.values()),
        signal_bytes=sum(x.nbytes for x in seen.signals.values()),
        peak_bytes=_peak(trainer.job.device),
        not_finite=[name for name, x in looked_at.items() if not bool(x.isfinite().all())],
    )


def _student(trainer: DistillTrainer, part: Lesson) -> None:
    (loss_sum(trainer.model, part) / max(1, part.count())).backward()


def _aligning(trainer: DistillTrainer, part: Lesson) -> Callable[[], None]:
    """Aligning and comparing, forward and backward, with the two models' passes done before."""
    matching = trainer.matchings[0]
    seen = trainer.look(0, part, matching.of_teacher)
    with capture(trainer.model, matching.of_student) as student:
        trainer.model(part.ids_BT)
    for name in matching.of_student:
        own = getattr(student, name)
        setattr(student, name, [None if x is None else x.detach().requires_grad_() for x in own])

    def run() -> None:
        pairs: Pairs = matching.pairs(student, seen, matching.of_student)
        torch.stack(list(matching.losses(pairs, seen.mask_BT).values())).sum().backward()

    return run


def _timed(work: Callable[[], object]) -> float:
    _wait()
    began = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
