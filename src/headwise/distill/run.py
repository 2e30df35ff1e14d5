"""`distill`, `resume`, `distill_or_resume`: a student trained beside its teachers, in a run folder like any other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.distill.caching import fill_stores
from headwise.distill.job import prepare, settled
from headwise.distill.lora import merge_lora
from headwise.distill.settings import DistillSettings
from headwise.distill.trainer import DistillTrainer
from headwise.errors import DataError, FormatError, SettingsError
from headwise.io.checkpoint import load_newest
from headwise.train.folder import RunFolder
from headwise.train.job import torch_state
from headwise.train.loop import OnProgress, Run, TrainResult, Warn

if TYPE_CHECKING:
    from headwise.io.checkpoint import Checkpoint

Say = Callable[[str], None]


@dataclass(frozen=True)
class DistillResult(TrainResult):
    """A finished distillation: a training run's figures, of the student alone, and beside them

    * `val_loss_by_part`: nats a token of each part of the validation split;
    * `likeness`: `cosine_k`, `cosine_v`, `cka_k`, `cka_v` and each with `_shuffled`, a number a layer, and those of
      outputs (`_output`) where a student's layers keep no keys and values (None for a layer without such a thing);
    * `params`, `aligner_params`: of the student, and of what learned beside it.
    """

    settings: DistillSettings
    teachers: tuple[str, ...]
    val_loss_by_part: dict[str, float]
    likeness: dict[str, list[float | None]]
    params: int
    aligner_params: int

    def figures(self) -> dict[str, Any]:
        settings = self.settings
        return {
            **super().figures(),
            "run_name": settings.run_name,
            "teacher": list(self.teachers),
            "recipe": settings.recipe,
            "projection": settings.projection,
            "val_loss_by_part": self.val_loss_by_part,
            **self.likeness,
            "params": self.params,
            "aligner_params": self.aligner_params,
        }

    def remarks(self) -> list[str]:
        made = []
        if len(self.val_loss_by_part) > 1:
            made.append("of which " + ", ".join(f"{part} {loss:.4f}" for part, loss in self.val_loss_by_part.items()))
        for name, what in (("k", "keys"), ("v", "values"), ("output", "attention outputs")):
            if f"cosine_{name}" in self.likeness:
                own, control = (_mean(self.likeness[f"cosine_{name}{end}"]) for end in ("", "_shuffled"))
                made.append(f"{what}: cosine {own:.3f} with the teacher's, {control:.3f} with those of other texts")
        return made


def distill(
    settings: DistillSettings | None = None,
    *,
    on_progress: OnProgress | None = None,
    progress: bool | None = None,
    say: Say = lambda text: None,
    **changes: Any,
) -> DistillResult:
    """Train a student beside one teacher or several, and return it (in eval mode) with its figures.

    Args:
        settings: `DistillSettings`; its fields may as well be given by keyword, as `teacher="runs/teacher"`,
            `student="llama(attention=gqa(kv_heads=1))"`.
        on_progress: called with every record, and `steps`.
        progress: draw bars on stderr; None: where it is a terminal.
        say: told the size of the teacher's cache before it is made; when the run begins, the shapes that are brought
            together, and where it lies.

    Raises `SettingsError`, `SpecError`, `FormatError`, `DataError` and `HeadwiseError` for what does not go together,
    all before anything is trained; `TrainingError`, `WriteError` and `Interrupted` as `headwise.train.train`. The same
    settings, files, machine and number of threads give the same bits.
    """
    settings = _merged(settings, changes)
    folder = None if settings.out is None else RunFolder(settings.out)
    if folder is not None:
        folder.check_free()
    job = prepare(settings)
    fill_stores(job, say, progress)
    with torch_state(job.settings, job.device):
        trainer = DistillTrainer(job)
        if folder is None:
            return _run(trainer, str(job.spec), None).finish(on_progress, progress)
        teachers = [{"name": each.name, "fingerprint": each.fingerprint} for each in job.teachers]
        folder.create(str(job.spec), job, teachers=teachers)
        for matching in trainer.matchings:
            say(matching.about())
        say(f"distilling in {folder.root}")
        with folder.claimed():
            return _run(trainer, str(job.spec), folder).finish(on_progress, progress)


def resume(
    out: Path | str,
    *,
    on_progress: OnProgress | None = None,
    progress: bool | None = None,
    say: Say = lambda text: None,
    warn: Warn = warnings.warn,
) -> DistillResult:
    """Go on with the run in `out` from its newest whole checkpoint, to the same bits as if it had never stopped.

    Raises `FormatError` (no run there, or no checkpoint whole), `DataError` (data or teachers are not those that it
    began with) and what `distill` raises.
    """
    folder = RunFolder(Path(out))
    about = folder.read()
    if not folder.is_distilled:
        raise FormatError(f"{out} is a training run and no distillation; go on with `headwise resume {out}`")
    settings = folder.settings_as(DistillSettings)
    job = prepare(settings, line=about["resolved_line"])
    if job.dataset.fingerprint != about["data"].get("fingerprint"):
        raise DataError(
            f"the data of the run in {out} have changed: {settings.data!r} has fingerprint {job.dataset.fingerprint}, "
            f"the run began with {about['data'].get('fingerprint')}; bring the old data back, or distil anew"
        )
    for teacher, held in zip(job.teachers, about["teachers"]):
        if teacher.fingerprint != held.get("fingerprint"):
            raise DataError(
                f"the teacher of the run in {out} has changed: {teacher.name} has other weights than it began with; "
                "bring the old ones back, or distil anew"
            )
    fill_stores(job, say, progress)
    with torch_state(settings, job.device), folder.claimed():
        checkpoint = load_newest(folder.checkpoints, warn)
        return _run(DistillTrainer(job), about["line"], folder, checkpoint).finish(on_progress, progress)


def distill_or_resume(
    settings: DistillSettings | None = None,
    *,
    on_progress: OnProgress | None = None,
    progress: bool | None = None,
    say: Say = lambda text: None,
    warn: Warn = warnings.warn,
    **changes: Any,
) -> DistillResult:
    """`resume` where `out` holds this very run, `distill` where it is new; `SettingsError` if `out` holds another."""
    settings = _merged(settings, changes)
    if settings.out is None or not RunFolder(settings.out).run_json.exists():
        return distill(settings, on_progress=on_progress, progress=progress, say=say)
    out = settings.out
    if settings.epochs is not None:  # the folder knows the steps that these were
        settings = prepare(settings).settings
    held = RunFolder(out).settings_as(DistillSettings)
    if differences := held.differences(settings):
        raise SettingsError(f"out: {out} holds another run: {'; '.join(differences)}; choose another folder")
    return resume(out, on_progress=on_progress, progress=progress, say=say, warn=warn)


def _mean(values: list[float | None]) -> float:
    """Over the layers that have such a thing."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found)


def _merged(settings: DistillSettings | None, changes: Mapping[str, Any]) -> DistillSettings:
    given = {} if settings is None else settings.model_dump(exclude_unset=True)
    return settled(DistillSettings(**{**given, **changes}))


def _run(
    trainer: DistillTrainer, line: str, folder: RunFolder | None, checkpoint: Checkpoint | None = None
) -> Run[DistillResult]:
    def summary(**fields: Any) -> DistillResult:
        measured = dict(trainer.measured)
        merge_lora(trainer.model)
        return DistillResult(
            **fields,
            teachers=tuple(teacher.name for teacher in trainer.job.teachers),
            val_loss_by_part=measured.pop("val_loss_by_part"),
            likeness=measured,
            params=sum(parameter.numel() for parameter in trainer.model.parameters()),
            aligner_params=sum(p.numel() for p in trainer.beside.parameters() if p.requires_grad),
        )

    return Run(trainer, line, folder, checkpoint, summary=summary)
