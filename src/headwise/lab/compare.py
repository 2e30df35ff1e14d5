"""`compare`: architectures trained under the same conditions, and what may be said about them afterwards.

Every line sees the same batches in the same order for the same seed, and modules that agree start from the same values;
what differs is the architecture. Lines are matched to the baseline (`lab/match.py`), may each choose a learning rate on
seeds of their own, run on worker processes (`lab/runner.py`), are measured in turn (`lab/measure.py`) and judged by
`lab/stats.py`.
"""

from __future__ import annotations

import os
import platform
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from headwise.errors import HeadwiseError, Interrupted, together
from headwise.lab.display import Display, Row, make_display
from headwise.lab.folder import CompareFolder, read_record
from headwise.lab.plan import Plan, make_plan, read_all, settings_json
from headwise.lab.result import (
    CompareResult,
    DatasetInfo,
    Environment,
    LrTrial,
    Measurements,
    RunRecord,
    Setup,
)
from headwise.lab.runner import Pool, Task, WorkerSetup, cores, needed_by
from headwise.lab.runs import PlannedRun, run_missing
from headwise.lab.settings import CompareSettings
from headwise.lab.summary import make_labels, summarise
from headwise.lab.worker import MARK
from headwise.spec import ModelSpec, parse
from headwise.train.folder import RunFolder, environment
from headwise.train.guards import StopRequest, catch_signals
from headwise.train.job import pinned

if TYPE_CHECKING:
    import torch

CALIBRATION_ROUNDS = 9
MEMORY_ROUNDS = 3
# Bytes; below it the process's own few pages decide, not the model.
LEAST_MEMORY = 4 * 2**20

OnProgress = Callable[[dict[str, Any]], None]


def compare(
    lines: Sequence[str | ModelSpec],
    settings: CompareSettings | None = None,
    *,
    on_progress: OnProgress | None = None,
    progress: bool | None = None,
    **changes: Any,
) -> CompareResult:
    """Train every line on several seeds and judge each against the first.

    Args:
        lines: architectures, as lines or specs; the first is the baseline. The same one twice is an A/A comparison.
        settings: `CompareSettings`; its fields may as well be given by keyword.
        on_progress: called with a dict for every run that starts, goes on, is done or fails: `phase` ("tune" or "run"),
            `line`, `variant`, `seed`, `lr`, `state`, and with state "progress" what training tells of itself.
        progress: show the runs on stderr, as a live table on a terminal, as lines elsewhere; None: on terminals only.

    With `out` the folder gets result.json, result.csv and report.html, and the same call goes on where a killed one
    stopped; more `seeds` may be asked for then. A run that fails is reported in `failed_runs`, the others count.

    Raises `SpecError` (all problems of all lines), `SettingsError` and `DataError` before anything runs, `WriteError`,
    and `Interrupted` on Ctrl-C or SIGTERM, when finished runs and checkpoints are kept.
    """
    if os.environ.get(MARK):
        raise HeadwiseError(
            "a worker process cannot start a comparison; put the call under `if __name__ == '__main__':`, "
            "for the script is loaded by every worker"
        )
    given = {} if settings is None else settings.model_dump(exclude_unset=True)
    chosen, _ = together(
        lambda: CompareSettings(**{**given, **changes}),
        lambda: read_all([] if isinstance(lines, str) else lines, parse),
    )
    plan = make_plan(lines, _pinned(chosen))
    with ExitStack() as stack:
        root = chosen.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headwise-")))
        folder = CompareFolder(root)
        stack.enter_context(folder.locked())
        display = stack.enter_context(make_display(progress))
        stop = stack.enter_context(catch_signals())
        try:
            result = _Comparison(plan, folder, display, stop, on_progress).finish(command(plan.lines, chosen))
        except Interrupted as error:
            raise Interrupted(f"{error}; {_how_to_go_on(chosen.out)}") from None
        if chosen.out is not None:
            from headwise.lab.report import build_report

            result.save(root)
            result.to_csv(root / "result.csv")
            build_report(result, root)
    return result


def resume_comparison(
    out: Path | str, *, on_progress: OnProgress | None = None, progress: bool | None = None
) -> CompareResult:
    """Go on with the comparison in `out`, as the call that began it would.

    Raises `FormatError` where there is none, and what `compare` raises.
    """
    lines, settings = CompareFolder(Path(out)).begun()
    return compare(lines, settings, on_progress=on_progress, progress=progress)


def _pinned(settings: CompareSettings) -> CompareSettings:
    """Files as absolute paths. The number of threads stays open: it is `Plan.threads`, not torch's own choice."""
    pinned_files = pinned(settings).model_copy(update={"threads": settings.threads})
    assert isinstance(pinned_files, CompareSettings)
    return pinned_files


def command(lines: Sequence[str], settings: CompareSettings) -> str:
    """The shell command that makes the same comparison in a folder of its own."""
    words = ["headwise", "compare", *lines]
    for name in CompareSettings.model_fields:
        if name in settings.model_fields_set and name not in ("out", "workers"):
            words += flag(name, getattr(settings, name))
    return shlex.join(words)


def flag(name: str, value: Any) -> list[str]:
    """A setting as the words of a shell command."""
    dashed = f"--{name.replace('_', '-')}"
    match value:
        case None:
            return []
        case bool():
            return [dashed if value else dashed.replace("--", "--no-", 1)]
        case dict():
            return [word for key, item in value.items() for word in (dashed, f"{key}={item}")]
        case tuple() | list():
            text = ",".join(map(str, value))
            return [dashed, f"[{text}]" if len(value) == 1 else text] if value else []
    return [dashed, str(value)]


def _how_to_go_on(out: Path | None) -> str:
    if out is None:
        return "nothing is kept without out; with one, the comparison could go on"
    return f"finished runs and checkpoints are kept in {out}; go on with `headwise resume {shlex.quote(str(out))}`"


class _Comparison:
    """One call of `compare`: its phases share a plan, a folder and what a person sees."""

    def __init__(
        self, plan: Plan, folder: CompareFolder, display: Display, stop: StopRequest, on_progress: OnProgress | None
    ) -> None:
        self.plan, self.folder, self.display, self.stop, self.on_progress = plan, folder, display, stop, on_progress
        self.labels = make_labels(plan.lines)
        modules, main = needed_by(plan.specs)
        self.setup = WorkerSetup(plan.threads, modules, main, folder.log)
        self.workers = plan.workers
        self.resumed = False

    def finish(self, command: str) -> CompareResult:
        """All phases, and the result."""
        began = time.monotonic()
        begun = self.folder.begin(self.plan)
        if self.plan.settings.out is not None:
            self.display.say(f"{'comparing' if begun is None else 'going on'} in {self.folder.root}")
        if begun is not None:
            self.plan, self.resumed = begun, True
        elif self.plan.settings.match == "time":
            self._calibrate()
            self.folder.note(self.plan)
        for label, variant in zip(self.labels, self.plan.variants):
            if variant.match_note:
                self.display.say(f"{label}: {variant.match_note}")
        if self.plan.grid:
            self._tune()
        records = self._train()
        measurements = self._measure()
        setup = Setup(
            seeds=self.plan.settings.seed_list,
            dataset=_dataset_info(self.plan),
            environment=environment_of(self.plan.device),
            settings=settings_json(self.plan.settings),
            command=command,
            objective=self.plan.objective,
            match=self.plan.settings.match,
            margin=self.plan.settings.margin,
            alpha=self.plan.settings.alpha,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            wall_seconds=None if self.resumed else time.monotonic() - began,
        )
        return summarise(self.plan.variants, records, setup, measurements)

    # --- training -----------------------------------------------------------------------------------------------------

    def _train(self) -> list[RunRecord]:
        """The runs of the verdict, seed by seed and the longest first in each, so that all cores stay busy."""
        plan = self.plan
        order = sorted(range(len(plan.variants)), key=plan.cost, reverse=True)
        runs = [
            (variant, seed, lr, self.folder.run(plan.name(variant), seed))
            for seed in plan.settings.seed_list
            for variant in order
            if (lr := plan.variants[variant].lr) is not None
        ]
        errors = self._run("run", runs)
        records = []
        for (variant, seed, _, folder), error in zip(runs, errors):
            record = read_record(folder, variant, seed)
            records.append(record or RunRecord(variant=variant, seed=seed, val_loss=None, error=error))
        for variant, info in enumerate(plan.variants):
            if info.lr is None:
                error = "no learning rate of the grid could be trained with"
                records += [
                    RunRecord(variant=variant, seed=s, val_loss=None, error=error) for s in plan.settings.seed_list
                ]
        return records

    def _tune(self) -> None:
        """Give each line the learning rate with the lowest mean loss over the tuning seeds."""
        plan = self.plan
        seeds = plan.settings.tuning_seeds
        order = sorted(range(len(plan.variants)), key=plan.cost, reverse=True)
        trials = [
            (variant, seed, lr, self.folder.trial(plan.name(variant), lr, seed))
            for seed in seeds
            for lr in plan.grid
            for variant in order
        ]
        self._run("tune", trials)
        losses = {(variant, lr, seed): _loss(folder, variant, seed) for variant, seed, lr, folder in trials}
        variants = []
        for index, info in enumerate(plan.variants):
            table = [_trial(lr, seeds, [losses[index, lr, seed] for seed in seeds]) for lr in plan.grid]
            lr = self._best(index, table)
            variants.append(info.model_copy(update={"lr_grid": table, "lr": lr}))
        self.plan = plan.with_variants(variants)

    def _best(self, index: int, table: list[LrTrial]) -> float | None:
        good = [(trial.val_loss, trial.lr) for trial in table if trial.val_loss is not None]
        label = self.labels[index]
        if not good:
            self.display.say(f"{label}: every learning rate of the grid failed")
            return None
        _, lr = min(good)
        self.display.say(f"{label}: learning rate {lr:g}")
        if lr in (min(self.plan.grid), max(self.plan.grid)):
            self.display.say(f"warning: {label}: {lr:g} is at the edge of the grid; a wider one may do better")
        return lr

    def _run(self, phase: str, runs: Sequence[tuple[int, int, float, RunFolder]]) -> list[str | None]:
        """Train what is not trained yet; the error of each run, None where it finished."""
        plan = self.plan
        planned = [
            PlannedRun(
                Row(
                    f"seed {seed} · {'' if phase == 'run' else f'lr {lr:g} · '}{self.labels[variant]}",
                    plan.variants[variant].steps or plan.settings.steps,
                ),
                folder,
                plan.train_task(variant, seed, lr, folder.root),
            )
            for variant, seed, lr, folder in runs
        ]
        self.resumed |= any(run.finished for run in planned)

        def tell(index: int, state: str, info: Any) -> None:
            if self.on_progress is not None:
                variant, seed, lr, _ = runs[index]
                about = {"phase": phase, "line": plan.lines[variant], "variant": variant, "seed": seed, "lr": lr}
                detail = info if isinstance(info, dict) else {"error": info} if info else {}
                self.on_progress({**about, "state": state, **detail})

        return run_missing(
            "choosing learning rates" if phase == "tune" else "training",
            planned,
            self.workers,
            self.setup,
            self.stop,
            self.display,
            keep_checkpoints=plan.settings.keep_checkpoints and plan.settings.out is not None,
            tell=tell,
        )

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _calibrate(self) -> None:
        """Steps for every line that take as long as the baseline's, by training them in turn for a moment."""
        plan = self.plan
        self.display.say("measuring how long a training step of each line takes")
        outcome = self._speed(CALIBRATION_ROUNDS, decode=False)
        rounds = [each["train_tokens_per_s"] for each in outcome]
        variants = [plan.variants[0]]
        for info, own in zip(plan.variants[1:], rounds[1:]):
            if not own or not rounds[0]:
                note = "its training failed within a few steps, so the time of a step is unknown; the baseline's steps"
                variants.append(info.model_copy(update={"match_note": note, "match_reached": False}))
                continue
            relative = median(base / mine for base, mine in zip(rounds[0], own))  # time of a step ÷ the baseline's
            steps = max(1, round(plan.settings.steps / relative))
            off = steps * relative / plan.settings.steps - 1
            note = f"{steps} steps in the time of {plan.settings.steps}: a step takes {relative:.2f}× the baseline's"
            update = {"steps": steps, "match_note": note, "match_off": off, "match_reached": abs(off) <= 0.01}
            variants.append(info.model_copy(update=update))
        self.plan = plan.with_variants(variants)

    def _measure(self) -> list[Measurements]:
        """Speed and memory of every line; what was measured in this folder before is not measured again."""
        plan, rounds = self.plan, self.plan.settings.measure_rounds
        if not rounds:
            return []
        known = self.folder.measurements(len(plan.variants), rounds)
        if known is not None:
            return known
        self.display.begin("measuring speed and memory", [])
        speeds = self._speed(rounds, decode=plan.specs[0].architecture != "encoder")
        settings = self._settings_to_measure()
        indices = [index for _ in range(min(rounds, MEMORY_ROUNDS)) for index in range(len(plan.variants))]
        tasks = [
            Task("memory", "memory", {"line": plan.variants[index].resolved, "settings": settings}) for index in indices
        ]
        with Pool(self.workers, self.setup, self.stop, one_task_each=True) as pool:
            peaks = [outcome.value for outcome in pool.run(tasks)]
        measurements = []
        for index, speed in enumerate(speeds):
            own = [peak for which, peak in zip(indices, peaks) if which == index and peak is not None]
            if min(own, default=0.0) < LEAST_MEMORY:
                own = []
            measurements.append(Measurements(**speed, peak_memory_bytes=own))
        self.folder.save_measurements(measurements, rounds)
        return measurements

    def _speed(self, rounds: int, *, decode: bool) -> list[dict[str, list[float]]]:
        lines = [variant.resolved for variant in self.plan.variants]
        payload = {"lines": lines, "settings": self._settings_to_measure(), "rounds": rounds, "decode": decode}
        with Pool(1, self.setup, self.stop) as pool:
            (outcome,) = pool.run([Task("speed", "speed", payload)])
        if outcome.error is not None:
            self.display.say(f"warning: speed could not be measured: {outcome.error}")
            return [{} for _ in lines]
        return list(outcome.value)

    def _settings_to_measure(self) -> dict[str, Any]:
        settings = self.plan.settings
        lr = min(settings.lr_grid, default=settings.lr)
        run = settings.for_run(settings.seed_list[0], lr, settings.steps, self.folder.root, self.plan.threads)
        return run.model_dump(mode="json", exclude={"out", "tensorboard"})


def _trial(lr: float, seeds: list[int], losses: list[float | None]) -> LrTrial:
    finished = [loss for loss in losses if loss is not None]
    mean = fmean(finished) if len(finished) == len(losses) else None
    return LrTrial(lr=lr, val_loss=mean, per_seed=losses, seeds=seeds)


def _loss(folder: RunFolder, variant: int, seed: int) -> float | None:
    record = read_record(folder, variant, seed)
    return None if record is None else record.val_loss


def _dataset_info(plan: Plan) -> DatasetInfo:
    dataset = plan.dataset
    return DatasetInfo(
        name=dataset.name,
        fingerprint=dataset.fingerprint,
        tokenizer=plan.settings.tokenizer,
        vocab_size=dataset.tokenizer.vocab_size,
        n_train_tokens=len(dataset.train),
        n_val_tokens=len(dataset.val),
    )


def environment_of(device: torch.device) -> Environment:
    """What the figures of a comparison on this device depend on."""
    about = environment(device)
    return Environment(
        headwise=about["headwise"],
        python=about["python"],
        torch=about["torch"],
        cpu=_cpu(),
        cores=cores(),
        os=platform.platform(),
        device=device.type if device.type == "cpu" else about["device"],
    )


def _cpu() -> str:
    """The processor's name, which the platform module does not know on Linux."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
