"""`train`, `resume` and `train_or_resume`: the run from its first step to its result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from headwise.errors import DataError, Interrupted, SettingsError, TrainingError, together
from headwise.io.atomic import WriteError, write_json
from headwise.io.checkpoint import Checkpoint, load_newest, save_checkpoint
from headwise.io.pretrained import load
from headwise.spec import ModelSpec, parse
from headwise.train.folder import RunFolder
from headwise.train.guards import StopRequest, catch_signals
from headwise.train.job import pinned, prepare, torch_state
from headwise.train.metrics import JsonlTracker, Record, TensorBoardTracker, Tracker, read_metrics
from headwise.train.settings import TrainSettings
from headwise.train.trainer import Trainer

if TYPE_CHECKING:
    from torch import nn

    from headwise.data import Dataset

R = TypeVar("R", bound="TrainResult")
OnProgress = Callable[[dict[str, Any]], None]
Warn = Callable[[str], None]


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    `val_loss` is in nats a token over the whole validation split, `bits_per_byte` None for a masked LM; `seconds` and
    `tokens_per_s` are of training alone, without evaluation and checkpoints. `history` holds every record
    (`headwise.train.metrics.Record`); `metrics` and `out` are None where nothing was written.
    """

    val_loss: float
    bits_per_byte: float | None
    train_loss: float
    steps: int
    tokens: int
    seconds: float
    tokens_per_s: float
    line: str
    spec: ModelSpec
    settings: TrainSettings
    model: nn.Module
    history: list[dict[str, Any]]
    out: Path | None
    metrics: Path | None

    def figures(self) -> dict[str, Any]:
        """The numbers, as JSON."""
        names = ("val_loss", "bits_per_byte", "train_loss", "steps", "tokens", "seconds", "tokens_per_s")
        return {"line": self.line, **{name: getattr(self, name) for name in names}}

    def remarks(self) -> list[str]:
        """What else there is to tell a person at the end of the run."""
        return []


def train(
    line: str | ModelSpec,
    settings: TrainSettings | None = None,
    *,
    dataset: Dataset | None = None,
    on_progress: OnProgress | None = None,
    progress: bool | None = None,
    **changes: Any,
) -> TrainResult:
    """Train the architecture `line` and return the model (in eval mode) with its figures.

    Args:
        line: a line as `gpt2(d_model=128)`, or a spec.
        settings: `TrainSettings`; its fields may as well be given by keyword.
        dataset: already loaded data; it then replaces `data` and `tokenizer`.
        on_progress: called with every record, and `steps`.
        progress: draw a bar on stderr; None: where it is a terminal.

    Raises `SettingsError`, `SpecError`, `DataError` (before anything is written), `TrainingError` (loss or gradients
    not finite), `WriteError` (disk full) and `Interrupted` (SIGINT, SIGTERM), after which `resume` goes on where `out`
    is set. The same line, settings, machine and number of threads give the same bits.
    """
    given = settings
    settings, spec = together(lambda: _merged(given, changes), lambda: parse(line) if isinstance(line, str) else line)
    folder = None if settings.out is None else RunFolder(settings.out)
    if folder is not None:
        folder.check_free()
    job = prepare(spec, settings, dataset)
    with torch_state(settings, job.device):
        trainer = Trainer(job)
        if settings.init_from is not None:  # here alone: who resumes has the weights of a checkpoint
            trainer.model.load_state_dict(load(settings.init_from, dtype=torch.float32).state_dict())
        if folder is None:
            return Run(trainer, str(spec), None, summary=TrainResult).finish(on_progress, progress)
        folder.create(str(spec), job)
        with folder.claimed():
            return Run(trainer, str(spec), folder, summary=TrainResult).finish(on_progress, progress)


def resume(
    out: Path | str,
    *,
    dataset: Dataset | None = None,
    on_progress: OnProgress | None = None,
    progress: bool | None = None,
    warn: Warn = warnings.warn,
) -> TrainResult:
    """Go on with the run in `out` from its newest whole checkpoint, to the same bits as if it had never stopped.

    A run that is finished is only read. `warn` gets a line for each damaged checkpoint passed over. Raises
    `FormatError` (no run there, or no checkpoint whole), `DataError` (the data are not those of the run) and what
    `train` raises.
    """
    folder = RunFolder(Path(out))
    about, settings = folder.read(), folder.settings()
    if folder.is_distilled:
        raise SettingsError(f"{out} was made by `headwise distill run`; go on with `headwise resume {out}`")
    job = prepare(about["resolved_line"], settings.model_copy(update={"init_from": None}), dataset)
    job = replace(job, settings=settings)
    if job.dataset.fingerprint != about["data"].get("fingerprint"):
        raise DataError(
            f"the data of the run in {out} have changed: {settings.data!r} with tokenizer {settings.tokenizer!r} has "
            f"fingerprint {job.dataset.fingerprint}, the run began with {about['data'].get('fingerprint')}; "
            f"bring the old data back, or train anew in another folder"
        )
    with torch_state(settings, job.device), folder.claimed():
        checkpoint = load_newest(folder.checkpoints, warn)
        run = Run(Trainer(job), about["line"], folder, checkpoint, summary=TrainResult)
        return run.finish(on_progress, progress)


def train_or_resume(
    line: str | ModelSpec,
    settings: TrainSettings | None = None,
    *,
    dataset: Dataset | None = None,
    on_progress: OnProgress | None = None,
    progress: bool | None = None,
    warn: Warn = warnings.warn,
    **changes: Any,
) -> TrainResult:
    """`resume` where `out` holds this very run, `train` where it is new; `SettingsError` if `out` holds another."""
    settings = _merged(settings, changes)
    if settings.out is None or not RunFolder(settings.out).run_json.exists():
        return train(line, settings, dataset=dataset, on_progress=on_progress, progress=progress)
    folder = RunFolder(settings.out)
    differences = folder.settings().differences(settings)
    given, held = str(parse(line) if isinstance(line, str) else line), folder.read()["line"]
    if given != held:
        differences.insert(0, f"line {given} (was {held})")
    if differences:
        raise SettingsError(f"out: {settings.out} holds another run: {'; '.join(differences)}; choose another folder")
    return resume(settings.out, dataset=dataset, on_progress=on_progress, progress=progress, warn=warn)


def _merged(settings: TrainSettings | None, changes: Mapping[str, Any]) -> TrainSettings:
    given = {} if settings is None else settings.model_dump(exclude_unset=True)
    return pinned(TrainSettings(**{**given, **changes}))


class Run(Generic[R]):
    """A trainer with its folder and trackers; `summary` makes the result of `TrainResult`'s fields."""

    def __init__(
        self,
        trainer: Trainer,
        line: str,
        folder: RunFolder | None,
        checkpoint: Checkpoint | None = None,
        *,
        summary: Callable[..., R],
    ) -> None:
        self.trainer, self.line, self.folder, self.summary = trainer, line, folder, summary
        self.settings = trainer.job.settings
        self.saved_step: int | None = None
        self.history: list[dict[str, Any]] = []
        self.jsonl: JsonlTracker | None = None
        if checkpoint is not None:
            trainer.restore(checkpoint)
            self.saved_step = checkpoint.step
        if folder is not None:
            self.jsonl = JsonlTracker(folder.metrics, checkpoint.state["metrics_bytes"] if checkpoint else 0)
            self.history = read_metrics(folder.metrics)

    def finish(self, on_progress: OnProgress | None, progress: bool | None) -> R:
        """Train to the last step, and sum up."""
        from headwise.train.progress import ProgressTracker, wanted

        trainer, settings = self.trainer, self.settings
        with ExitStack() as stack:
            trackers: list[Tracker] = [] if self.jsonl is None else [self.jsonl]
            if settings.tensorboard and self.folder is not None:
                trackers.append(TensorBoardTracker(self.folder.tensorboard, trainer.at.step))
            if wanted(progress):
                trackers.append(ProgressTracker(trainer.job.spec.preset, settings.steps, trainer.at.step))
            for tracker in trackers:
                stack.callback(tracker.close)
            stop = stack.enter_context(catch_signals())
            while trainer.at.step < settings.steps:
                self._step(trackers, on_progress, stop)
        return self._result()

    def _step(self, trackers: list[Tracker], on_progress: OnProgress | None, stop: StopRequest) -> None:
        trainer, settings = self.trainer, self.settings
        try:
            trainer.update()
        except TrainingError as error:
            raise TrainingError(f"{error}{self._last_good()}") from None
        step = trainer.at.step
        is_last = step == settings.steps
        evaluates = is_last or _due(step, settings.eval_every)
        if evaluates:
            trainer.evaluate()
        if evaluates or _due(step, settings.log_every):
            self._record(trainer.take_record(), trackers, on_progress)
        if is_last or stop.signal or _due(step, settings.checkpoint_every):
            self._save()
        if stop.signal and not is_last:
            raise Interrupted(f"{stop.signal}: stopped after step {step} of {settings.steps}; {self._how_to_go_on()}")

    def _record(self, values: Record, trackers: list[Tracker], on_progress: OnProgress | None) -> None:
        self.history.append(dict(values))
        for tracker in trackers:
            tracker.record(values)
        if on_progress is not None:
            on_progress({**values, "steps": self.settings.steps})

    def _save(self) -> None:
        if self.folder is None or self.jsonl is None:
            return
        trainer = self.trainer
        try:
            numbers = {**trainer.numbers(), "metrics_bytes": self.jsonl.length()}
            save_checkpoint(self.folder.checkpoints, trainer.at.step, *trainer.tensors(), numbers)
        except WriteError as error:
            raise WriteError(f"step {trainer.at.step}: {error}{self._last_good()}") from None
        self.saved_step = trainer.at.step

    def _last_good(self) -> str:
        if self.folder is None:
            return ""
        if self.saved_step is None:
            return "; no checkpoint was written before"
        return f"; the checkpoint of step {self.saved_step} in {self.folder.root} is intact"

    def _how_to_go_on(self) -> str:
        if self.folder is None:
            return "nothing is saved without out; with one, the run could go on"
        return f"saved; go on with `headwise resume {self.folder.root}`"

    def _result(self) -> R:
        trainer, at = self.trainer, self.trainer.at
        trainer.model.eval()
        assert at.val_nats is not None  # the last step evaluates
        tokens = at.step * trainer.tokens_per_step
        result = self.summary(
            val_loss=at.val_nats,
            bits_per_byte=at.val_bits,
            train_loss=at.last_loss,
            steps=at.step,
            tokens=tokens,
            seconds=at.seconds,
            tokens_per_s=tokens / at.seconds,
            line=self.line,
            spec=trainer.job.spec,
            settings=self.settings,
            model=trainer.model,
            history=self.history,
            out=None if self.folder is None else self.folder.root,
            metrics=None if self.folder is None else self.folder.metrics,
        )
        if self.folder is not None:
            write_json(self.folder.result_json, result.figures())
        return result


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
