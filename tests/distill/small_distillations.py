"""A student and settings with which a whole distillation takes a fraction of a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from headwise.distill import DistillResult, distill
from headwise.io.checkpoint import Checkpoint, list_checkpoints, load_checkpoint

STUDENT = "llama(d_model=8, n_layers=2, n_heads=2)"
QUICK: dict[str, Any] = {
    "threads": 1,
    "seq_len": 16,
    "batch_size": 2,
    "steps": 6,
    "log_every": 1,
    "eval_every": 3,
    "checkpoint_every": 2,
    "measure_rows": 4,
}
TIMINGS = {"seconds", "tokens_per_s", "since_seconds"}


def run(teacher: Path | str | tuple[str, ...], data: Path, student: str = STUDENT, **changes: Any) -> DistillResult:
    names = teacher if isinstance(teacher, tuple) else str(teacher)
    return distill(teacher=names, student=str(student), data=str(data), **{**QUICK, **changes})


def newest(out: Path) -> Checkpoint:
    return load_checkpoint(list_checkpoints(out / "checkpoints")[-1])


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in TIMINGS}


def records(out: Path) -> list[dict[str, Any]]:
    return [untimed(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]


def check_same(one: Path, two: Path) -> None:
    """Parameters, optimiser, what learns beside, random state, counters and records of two runs, bit by bit."""
    first, second = newest(one), newest(two)
    assert first.step == second.step
    for name, value in first.state.items():
        if name not in ("metrics_bytes", "progress"):
            assert value == second.state[name], name
    assert untimed(first.state["progress"]) == untimed(second.state["progress"])
    for left, right in ((first.model, second.model), (first.optimizer, second.optimizer)):
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), name
    assert records(one) == records(two)


def check_same_student(one: DistillResult, two: DistillResult) -> None:
    left, right = one.model.state_dict(), two.model.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
