"""`ab`: ways to distil a teacher under the same conditions, and what may be said about them afterwards.

For one seed every arm starts from the same student and sees the same batches in the same order for as many steps; what
differs is how the teacher's keys and values are brought to the student's shape. Arms run on the worker processes of a
comparison (`lab/runner.py`) and are judged by its statistics (`lab/stats.py`). A teacher's cache is computed once: its
place depends on teacher and data alone, so that all arms and seeds read the same one.
"""

from __future__ import annotations

import os
import shlex
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError, Interrupted
from headwise.io.atomic import write_text
from headwise.lab.ab import markdown
from headwise.lab.ab.arms import Arm
from headwise.lab.ab.folder import ABFolder
from headwise.lab.ab.plan import ABPlan, command, make_plan
from headwise.lab.ab.records import read_distilled
from headwise.lab.ab.result import ABResult, DistillRecord
from headwise.lab.ab.settings import ABSettings
from headwise.lab.ab.summary import summarise_ab
from headwise.lab.compare import OnProgress, environment_of
from headwise.lab.display import Display, Row, make_display
from headwise.lab.folder import CompareFolder
from headwise.lab.result import Setup
from headwise.lab.runner import WorkerSetup, needed_by
from headwise.lab.runs import PlannedRun, run_missing
from headwise.lab.worker import MARK
from headwise.train.guards import StopRequest, catch_signals

CONDITIONS = (
    "For one seed all arms see the same batches in the same order and start from the same student, for as many steps; "
    "losses are those of the student alone, over the whole validation split."
)
OBJECTIVE = "causal language modelling, and what each arm learns from the teacher"


def ab(
    settings: ABSettings | None = None,
    *,
    on_progress: OnProgress | None = None,
    progress: bool | None = None,
    **changes: Any,
) -> ABResult:
    """Distil by every arm on several seeds, and judge each against the baseline.

    Args:
        settings: `ABSettings`; its fields may as well be given by keyword.
        on_progress: called with a dict for every run that starts, goes on, is done or fails: `arm`, `seed`, `state`,
            and with state "progress" what the run tells of itself.
        progress: show the runs on stderr, as a live table on a terminal, as lines elsewhere; None: on terminals only.

    With `out` the folder gets result.json, result.csv, report.html and AB_RESULTS.md, and the same call goes on where a
    killed one stopped; more `seeds` and other `arms` may be asked for then. A failed run is named, the others count.

    Raises `SettingsError`, `SpecError`, `FormatError` and `DataError` before anything runs, `WriteError`, and
    `Interrupted` on Ctrl-C or SIGTERM, when finished runs and checkpoints are kept.
    """
    if os.environ.get(MARK):
        raise HeadwiseError(
            "a worker process cannot start an A/B; put the call under `if __name__ == '__main__':`, "
            "for the script is loaded by every worker"
        )
    given = {} if settings is None else settings.model_dump(exclude_unset=True)
    chosen = ABSettings(**{**given, **changes})
    plan = make_plan(chosen)
    with ExitStack() as stack:
        root = chosen.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headwise-")))
        stack.enter_context(CompareFolder(root).locked())
        display = stack.enter_context(make_display(progress))
        stop = stack.enter_context(catch_signals())
        try:
            result = _finish(plan, ABFolder(root), display, stop, on_progress, command(chosen))
        except Interrupted as error:
            how = "nothing is kept without out; with one, the A/B could go on"
            if chosen.out is not None:
                how = f"finished runs and checkpoints are kept in {root}; go on with `headwise resume {_quoted(root)}`"
            raise Interrupted(f"{error}; {how}") from None
        if chosen.out is not None:
            save(result, root)
    return result


def resume_ab(out: Path | str, *, on_progress: OnProgress | None = None, progress: bool | None = None) -> ABResult:
    """Go on with the A/B in `out`, as the call that began it would.

    Raises `FormatError` where there is none, and what `ab` raises.
    """
    return ab(ABFolder(Path(out)).begun(), on_progress=on_progress, progress=progress)


def save(result: ABResult, folder: Path) -> Path:
    """Write result.json, result.csv, AB_RESULTS.md and report.html, whose path is given back."""
    from headwise.lab.report import FILE_NAME
    from headwise.lab.report.ab import report_html

    result.save(folder)
    result.to_csv(folder / "result.csv")
    write_text(folder / markdown.FILE_NAME, markdown.markdown(result))
    write_text(folder / FILE_NAME, report_html(result))
    return folder / FILE_NAME


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _finish(
    plan: ABPlan, folder: ABFolder, display: Display, stop: StopRequest, on_progress: OnProgress | None, command: str
) -> ABResult:
    """Train what is not trained yet, and judge."""
    began = time.monotonic()
    going_on = folder.begin(plan)
    if plan.settings.out is not None:
        display.say(f"{'going on' if going_on else 'distilling'} in {folder.root}")
    # Seed by seed, so that a stopped A/B has whole pairs.
    runs = [(arm, seed) for seed in plan.settings.seed_list for arm in plan.arms]
    planned = [_planned(plan, folder, arm, seed) for arm, seed in runs]
    resumed = any(run.finished for run in planned)

    def tell(index: int, state: str, info: Any) -> None:
        if on_progress is not None:
            arm, seed = runs[index]
            detail = info if isinstance(info, dict) else {"error": info} if info else {}
            on_progress({"arm": arm.name, "seed": seed, "state": state, **detail})

    modules, main = needed_by(plan.specs)
    errors = run_missing(
        "distilling",
        planned,
        plan.workers,
        WorkerSetup(plan.threads, modules, main, folder.root / "workers.log"),
        stop,
        display,
        keep_checkpoints=plan.settings.keep_checkpoints and plan.settings.out is not None,
        tell=tell,
    )
    records = [
        read_distilled(run.folder, plan.arms.index(arm), seed)
        or DistillRecord(variant=plan.arms.index(arm), seed=seed, val_loss=None, error=error)
        for (arm, seed), run, error in zip(runs, planned, errors, strict=True)
    ]
    setup = Setup(
        seeds=plan.settings.seed_list,
        dataset=plan.dataset,
        environment=environment_of(plan.device),
        settings=plan.typed.model_dump(mode="json", exclude={"out", "projection"}),
        command=command,
        objective=OBJECTIVE,
        match="none",
        margin=plan.settings.margin,
        alpha=plan.settings.alpha,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        wall_seconds=None if resumed or going_on else time.monotonic() - began,
    )
    return summarise_ab(
        plan.arms,
        plan.variants,
        records,
        setup,
        teacher=plan.typed.teacher or plan.settings.teacher,
        student=str(plan.typed.student),
        commands=[plan.command(arm) for arm in plan.arms],
        conditions=CONDITIONS,
    )


def _planned(plan: ABPlan, folder: ABFolder, arm: Arm, seed: int) -> PlannedRun:
    run = folder.run(arm, seed)
    return PlannedRun(Row(f"seed {seed} · {arm.name}", plan.steps), run, plan.task(arm, seed, run.root))
