"""A worker: a fresh Python process that does one task after another.

It runs `main`, which reads lines of JSON from stdin (first what it is to be, then tasks) and writes lines of JSON to
stdout; whatever code prints goes to stderr. It ends when stdin does, in the middle of a task too: a worker never
outlives who started it. SIGTERM during a training run saves a checkpoint first.

It is not made by `multiprocessing`, so that `compare` works in a plain script and in a notebook: nothing runs the
caller's main module again unless a mechanism is defined there.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import runpy
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.errors import HeadwiseError

if TYPE_CHECKING:
    from headwise.data import Dataset
    from headwise.train import TrainSettings

Send = Callable[[dict[str, Any]], None]
# Set in every worker's environment, so that a comparison cannot start another one.
MARK = "HEADWISE_WORKER"
MAIN = "__headwise_main__"


def main() -> None:
    """Serve until stdin ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    inbox: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(inbox,), daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    unfit = _caught(lambda: _become(json.loads(inbox.get())))
    while True:
        task = json.loads(inbox.get())
        send(unfit if "failed" in unfit else _caught(lambda: TASKS[task["kind"]](task, send)))  # noqa: B023


def _listen(inbox: queue.SimpleQueue[str]) -> None:
    # Not sys.stdin: a thread that waits in it holds a lock that the interpreter needs in order to end.
    rest = b""
    while piece := os.read(0, 1 << 16):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            inbox.put(line.decode())
    os._exit(0)


def _become(about: dict[str, Any]) -> None:
    import torch

    if about["threads"] is not None:
        torch.set_num_threads(about["threads"])
    for module in about["modules"]:
        importlib.import_module(module)
    if about["main"] is not None:
        runpy.run_path(about["main"], run_name=MAIN)


def _caught(work: Callable[[], Any]) -> dict[str, Any]:
    """What came of some work, as a message."""
    try:
        return {"done": work()}
    except HeadwiseError as error:
        return {"failed": str(error)}
    except Exception as error:
        # Anything: a third party's mechanism may fail in any way, and must not take the other runs with it.
        text = " ".join(str(error).split())
        return {"failed": f"{type(error).__name__}: {text}"[:500], "traceback": traceback.format_exc()}


def _train(task: dict[str, Any], send: Send) -> None:
    from headwise.train import TrainSettings, train_or_resume

    settings = TrainSettings(**task["settings"])
    assert settings.out is not None
    train_or_resume(
        task["line"],
        settings,
        dataset=_dataset(settings),
        on_progress=lambda record: send({"progress": record}),
        progress=False,
        warn=lambda text: print(text, file=sys.stderr),
    )


def _distill(task: dict[str, Any], send: Send) -> None:
    from headwise.distill.run import distill_or_resume
    from headwise.distill.settings import DistillSettings

    distill_or_resume(
        DistillSettings(**task["settings"]),
        on_progress=lambda record: send({"progress": record}),
        progress=False,
        warn=lambda text: print(text, file=sys.stderr),
    )


def _speed(task: dict[str, Any], send: Send) -> list[dict[str, list[float]]]:
    from headwise.lab import measure
    from headwise.train import TrainSettings

    settings = TrainSettings(**task["settings"])
    return measure.speed(task["lines"], settings, _dataset(settings), task["rounds"], decode=task["decode"])


def _memory(task: dict[str, Any], send: Send) -> float:
    from headwise.lab import measure
    from headwise.train import TrainSettings

    settings = TrainSettings(**task["settings"])
    return measure.peak_memory(task["line"], settings, _dataset(settings))


TASKS: dict[str, Callable[[dict[str, Any], Send], Any]] = {
    "train": _train,
    "distill": _distill,
    "speed": _speed,
    "memory": _memory,
}

_datasets: dict[tuple[Any, ...], Dataset] = {}


def _dataset(settings: TrainSettings) -> Dataset:
    """The data of a run, read once a process."""
    from headwise.data import load_dataset

    key = (settings.data, settings.tokenizer, settings.text_column, settings.val_fraction)
    if key not in _datasets:
        _datasets[key] = load_dataset(
            settings.data, settings.tokenizer, text_column=settings.text_column, val_fraction=settings.val_fraction
        )
    return _datasets[key]


def main_file(module: Any) -> Path | None:
    """The file of the main module, None in a notebook or an interactive session."""
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).absolute()
