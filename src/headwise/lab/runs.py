"""Training runs of a comparison: those that are not finished yet are done on worker processes, and shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from headwise.lab.display import Display, Row
from headwise.lab.folder import finish_run, note_failure
from headwise.lab.runner import Pool, Task, WorkerSetup
from headwise.train.folder import RunFolder
from headwise.train.guards import StopRequest

# (index of the run, "started" | "progress" | "done" | "failed", the record of a progress or the error)
Tell = Callable[[int, str, Any], None]


@dataclass(frozen=True)
class PlannedRun:
    """One run: the folder that tells whether it is finished, the task that makes it, and its row on the display."""

    row: Row
    folder: RunFolder
    task: Task

    @property
    def finished(self) -> bool:
        return self.folder.result_json.exists()


def run_missing(
    title: str,
    runs: Sequence[PlannedRun],
    workers: int,
    setup: WorkerSetup,
    stop: StopRequest,
    display: Display,
    *,
    keep_checkpoints: bool,
    tell: Tell = lambda index, state, info: None,
) -> list[str | None]:
    """Do what is not done yet, in the order given; the error of each run, None where it finished.

    Raises:
        Interrupted: a stop was requested; runs under way have written their checkpoints.
    """
    for run in runs:
        if run.finished:
            run.row.state, run.row.done, run.row.first = "finished", run.row.total, run.row.total
    todo = [index for index, run in enumerate(runs) if not run.finished]
    errors: list[str | None] = [None] * len(runs)
    display.begin(f"{title}, {min(workers, len(todo))} at once", [run.row for run in runs])

    def on_event(number: int, state: str, info: Any) -> None:
        run = runs[todo[number]]
        run.row.update(state, info)
        if state == "done":
            finish_run(run.folder, keep_checkpoints=keep_checkpoints)
        if state == "failed":
            display.say(f"{run.row.label} failed: {info}")
        display.changed(run.row)
        tell(todo[number], state, info)

    with Pool(workers, setup, stop) as pool:
        for index, outcome in zip(todo, pool.run([runs[i].task for i in todo], on_event)):
            errors[index] = outcome.error
            note_failure(runs[index].folder, outcome.traceback)
    return errors
