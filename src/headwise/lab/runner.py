"""Tasks on worker processes: as many at once as there are cores, each told of as it goes on, none lost with another.

What a task computes does not depend on the number of workers, nor on which of them it meets: every worker is a fresh
process with its own torch, one thread by default, and a task carries everything it needs.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from headwise.errors import HeadwiseError, Interrupted
from headwise.lab.worker import MARK, main_file
from headwise.registry import ATTENTION, FFN, NORM, POSITION
from headwise.spec import ModelSpec
from headwise.train.guards import StopRequest

if TYPE_CHECKING:
    import torch

POLL_SECONDS = 0.2
# A worker told to stop finishes its step and writes a checkpoint; a large model's takes a while.
GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class Task:
    """Work for a worker: `kind` is a key of `headwise.lab.worker.TASKS`, `payload` what that function reads."""

    name: str
    kind: str
    payload: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a task: its value, or the error it ended with."""

    value: Any = None
    error: str | None = None
    traceback: str | None = None


# (index of the task, "started" | "progress" | "done" | "failed", the record of a progress or the error)
OnEvent = Callable[[int, str, Any], None]


@dataclass(frozen=True)
class WorkerSetup:
    """What every worker is told at its start.

    Attributes:
        threads: torch's threads; None leaves them to torch.
        modules: modules to import, since they register mechanisms.
        main: a script to run for the same reason, its `__name__` not being `__main__`.
        log: file that the workers' stderr is added to.
    """

    threads: int | None = 1
    modules: tuple[str, ...] = ()
    main: str | None = None
    log: Path | None = None


class _Worker:
    """One process, and the thread that reads what it says into `inbox`; None there means that it has ended."""

    def __init__(self, setup: WorkerSetup, inbox: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]]) -> None:
        environment = {**os.environ, MARK: "1", "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        if setup.threads is not None:
            environment |= {"OMP_NUM_THREADS": str(setup.threads), "MKL_NUM_THREADS": str(setup.threads)}
        log = subprocess.DEVNULL if setup.log is None else setup.log.open("ab")
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from headwise.lab.worker import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C in the terminal is for us alone; we tell the workers
            )
        finally:
            if not isinstance(log, int):
                log.close()
        self.task: int | None = None
        self._inbox = inbox
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self.tell({"threads": setup.threads, "modules": setup.modules, "main": setup.main})

    def tell(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died; the listener tells
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with suppress(json.JSONDecodeError):  # cut off by a kill
                self._inbox.put((self, json.loads(line)))
        self._inbox.put((self, None))

    def end(self) -> None:
        """Tell it that there is nothing more to come: it ends at once, in whatever it is."""
        self._close_stdin()
        self.collect()

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def collect(self) -> int:
        """The exit status of one that has ended, or is about to; closes what belonged to it."""
        try:
            status = self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._close_stdin()
        self._thread.join()
        self.process.stdout.close()  # type: ignore[union-attr]
        return status

    def _close_stdin(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]


class Pool:
    """Worker processes, started when there is work and ended with the `with` block.

    Args:
        workers: processes at once.
        setup: what each is told.
        stop: asked between events; once it holds a signal, `run` stops everything and raises Interrupted.
        one_task_each: a new process for every task.
    """

    def __init__(self, workers: int, setup: WorkerSetup, stop: StopRequest, *, one_task_each: bool = False) -> None:
        self._size, self._setup, self._stop, self._one_task_each = workers, setup, stop, one_task_each
        self._inbox: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        while self._workers:
            worker = self._workers.pop()
            worker.kill() if worker.task is not None else worker.end()

    def run(self, tasks: Sequence[Task], on_event: OnEvent = lambda index, state, info: None) -> list[Outcome]:
        """Do all tasks, started in their order; a task that fails, or whose process dies, has an error.

        Raises:
            Interrupted: a stop was requested; runs under way have written their checkpoints.
        """
        waiting = deque(range(len(tasks)))
        outcomes: dict[int, Outcome] = {}
        while len(outcomes) < len(tasks):
            self._assign(tasks, waiting, on_event)
            if self._stop.signal:
                self._wind_up()
                raise Interrupted(f"{self._stop.signal}: stopped")
            try:
                worker, message = self._inbox.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            index = worker.task
            if index is not None and message is not None and "progress" in message:
                on_event(index, "progress", message["progress"])
                continue
            outcome = self._outcome(worker, message)
            if index is not None:
                outcomes[index] = outcome
                on_event(index, "done" if outcome.error is None else "failed", outcome.error)
        return [outcomes[index] for index in range(len(tasks))]

    def _assign(self, tasks: Sequence[Task], waiting: deque[int], on_event: OnEvent) -> None:
        """Give every idle worker a task, and start workers while there are too few."""
        while waiting and not self._stop.signal:
            idle = next((worker for worker in self._workers if worker.task is None), None)
            if idle is None:
                if len(self._workers) >= self._size:
                    return
                idle = _Worker(self._setup, self._inbox)
                self._workers.append(idle)
            index = idle.task = waiting.popleft()
            on_event(index, "started", None)
            idle.tell({"kind": tasks[index].kind, **tasks[index].payload})

    def _outcome(self, worker: _Worker, message: dict[str, Any] | None) -> Outcome:
        """What a worker's last word on its task means; None is its end."""
        worker.task = None
        if message is None:
            if worker not in self._workers:
                return Outcome()  # one of those that do a single task; it was done
            self._workers.remove(worker)
            return Outcome(error=self._cause(worker.collect()))
        if self._one_task_each:
            self._workers.remove(worker)
            worker.end()
        return Outcome(message.get("done"), message.get("failed"), message.get("traceback"))

    def _cause(self, status: int) -> str:
        """Why a process ended in the middle of its task."""
        if status < 0:
            name = signal.Signals(-status).name
            hint = " (the system may be out of memory)" if name == "SIGKILL" else ""
            return f"the worker process was ended by {name}{hint}"
        where = "" if self._setup.log is None else f"; see {self._setup.log}"
        return f"the worker process ended with status {status}{where}"

    def _wind_up(self) -> None:
        """Ask all workers to save and stop, and give them time for it."""
        for worker in self._workers:
            worker.process.terminate()
        end = time.monotonic() + GRACE_SECONDS
        busy = {worker for worker in self._workers if worker.task is not None}
        while busy and (left := end - time.monotonic()) > 0:
            with suppress(queue.Empty):
                worker, message = self._inbox.get(timeout=left)
                if message is None or "progress" not in message:
                    busy.discard(worker)
                    worker.task = None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(asked: int | None, device: torch.device) -> int | None:
    """CPU threads of a run: as asked for, else one, so that runs fill the cores; torch's choice where a GPU works."""
    return asked or (1 if device.type == "cpu" else None)


def workers_of(asked: int | None, threads: int | None, device: torch.device) -> int:
    """Runs at once: as asked for, else as many as have a core each, and one on a GPU."""
    if asked is not None:
        return asked
    return max(1, cores() // (threads or 1)) if device.type == "cpu" else 1


def needed_by(specs: Iterable[ModelSpec]) -> tuple[tuple[str, ...], str | None]:
    """The modules, and the main script, that a fresh process must load to know every mechanism of `specs`.

    Raises:
        HeadwiseError: one is defined where no other process can find it.
    """
    modules: set[str] = set()
    main: str | None = None
    for spec in specs:
        for family in (ATTENTION, POSITION, NORM, FFN):
            for item in getattr(spec, family.family).each():
                module = family.get(item.kind).module.__module__
                if module == "__main__":
                    file = main_file(sys.modules["__main__"])
                    if file is None:
                        raise HeadwiseError(
                            f"{family.family} {item.kind!r} is defined in this session, where the processes that train "
                            f"cannot see it; put it into a file of its own and import that"
                        )
                    main = str(file)
                elif not module.startswith("headwise."):
                    modules.add(module)
    return tuple(sorted(modules)), main
