"""The pool: outcomes that depend on the task alone, failures that stay where they happen, and a clean end."""

from __future__ import annotations

import queue
import sys
from pathlib import Path
from typing import Any

import pytest
from small_comparisons import BREAKING, module_with

from headwise.errors import HeadwiseError, Interrupted
from headwise.lab.runner import Pool, Task, WorkerSetup, _Worker, needed_by
from headwise.registry import FFN
from headwise.spec import parse
from headwise.train.guards import StopRequest

# What the workers can do in these tests: they import this module.
TASKS = """
import os, signal, sys, time
from headwise.errors import TrainingError
from headwise.lab.worker import TASKS

def square(task, send):
    print("this must not reach the parent as a message")
    for n in range(3):
        send({"progress": {"step": n}})
    return [task["n"] ** 2, os.getpid()]

def fail(task, send):
    raise TrainingError("loss is nan")

def bug(task, send):
    raise ValueError("line one\\nline two")

def leave(task, send):
    sys.exit(3)

def die(task, send):
    os.kill(os.getpid(), signal.SIGKILL)

def sleep(task, send):
    send({"progress": {"pid": os.getpid()}})
    time.sleep(600)

TASKS.update(square=square, fail=fail, bug=bug, leave=leave, die=die, sleep=sleep)
"""


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerSetup:
    (tmp_path / "tasks_of_this_test.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return WorkerSetup(modules=("tasks_of_this_test",), log=tmp_path / "workers.log")


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def squares(count: int) -> list[Task]:
    return [Task(f"square {n}", "square", {"n": n}) for n in range(count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_outcomes_stand_in_the_order_of_the_tasks(setup: WorkerSetup, workers: int) -> None:
    events: list[tuple[int, str]] = []
    with Pool(workers, setup, StopRequest()) as pool:
        outcomes = pool.run(squares(5), lambda index, state, info: events.append((index, state)))
    assert [outcome.value[0] for outcome in outcomes] == [0, 1, 4, 9, 16]
    assert len({outcome.value[1] for outcome in outcomes}) <= workers
    for index in range(5):
        assert [state for i, state in events if i == index] == ["started", *["progress"] * 3, "done"]
    assert not any(alive(outcome.value[1]) for outcome in outcomes)


def test_a_failure_of_any_kind_loses_no_other_task(setup: WorkerSetup) -> None:
    tasks = squares(4)
    for place, kind in ((1, "die"), (2, "leave"), (3, "fail"), (4, "bug")):
        tasks.insert(place, Task(kind, kind))
    with Pool(1, setup, StopRequest()) as pool:
        outcomes = pool.run(tasks)
    assert [outcome.value[0] for outcome in outcomes if outcome.error is None] == [0, 1, 4, 9]
    errors = {task.name: outcome for task, outcome in zip(tasks, outcomes) if outcome.error}
    assert errors["die"].error == "the worker process was ended by SIGKILL (the system may be out of memory)"
    assert errors["leave"].error == f"the worker process ended with status 3; see {setup.log}"
    assert errors["fail"].error == "loss is nan"
    assert errors["bug"].error == "ValueError: line one line two"
    assert "ValueError" in (errors["bug"].traceback or "")
    assert "this must not reach the parent" in setup.log.read_text() if setup.log else False


def test_a_new_process_for_every_task(setup: WorkerSetup) -> None:
    with Pool(1, setup, StopRequest(), one_task_each=True) as pool:
        outcomes = pool.run(squares(2))
    assert outcomes[0].value[1] != outcomes[1].value[1]


def test_a_stop_ends_the_workers_and_says_so(setup: WorkerSetup) -> None:
    stop, pids = StopRequest(), []

    def on_event(index: int, state: str, info: Any) -> None:
        if state == "progress":
            pids.append(info["pid"])
            stop.signal = "SIGINT"

    with pytest.raises(Interrupted, match="SIGINT: stopped"), Pool(1, setup, stop) as pool:
        pool.run([Task("sleep", "sleep")], on_event)
    assert len(pids) == 1
    assert not alive(pids[0])


def test_a_worker_does_not_outlive_who_started_it(setup: WorkerSetup) -> None:
    """A killed parent's pipes close; the worker ends in the middle of its task then, and writes to no file any more."""
    inbox: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()
    worker = _Worker(setup, inbox)
    worker.tell({"kind": "sleep"})
    assert "progress" in (inbox.get(timeout=60)[1] or {})
    assert worker.process.stdin is not None
    worker.process.stdin.close()
    assert worker.process.wait(timeout=60) == 0
    worker.end()


def test_a_worker_that_cannot_be_set_up_fails_its_tasks(tmp_path: Path) -> None:
    with Pool(1, WorkerSetup(modules=("no_such_module_anywhere",)), StopRequest()) as pool:
        (outcome,) = pool.run(squares(1))
    assert outcome.error == "ModuleNotFoundError: No module named 'no_such_module_anywhere'"


def test_workers_load_the_modules_that_lines_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert needed_by([parse("gpt2"), parse("llama(ffn=pattern(mlp, geglu))")]) == ((), None)
    with module_with(BREAKING, "breaking_of_this_test", tmp_path):
        fragile = parse("gpt2(ffn=pattern(mlp, fragile))")
        assert needed_by([parse("gpt2"), fragile]) == (("breaking_of_this_test",), None)
        monkeypatch.setattr(FFN.get("fragile").module, "__module__", "__main__")
        monkeypatch.setattr(sys.modules["__main__"], "__file__", "script.py", raising=False)
        assert needed_by([fragile]) == ((), str(Path("script.py").absolute()))
        monkeypatch.delattr(sys.modules["__main__"], "__file__")
        with pytest.raises(HeadwiseError, match="ffn 'fragile' is defined in this session"):
            needed_by([fragile])
