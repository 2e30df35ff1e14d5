"""What a finished distillation left in its folder, as a record for the summary."""

from __future__ import annotations

import json
from typing import Any

from headwise.errors import FormatError
from headwise.lab.ab.result import MEASURES, SHUFFLED, DistillRecord, Likeness
from headwise.lab.folder import read_record, series_of
from headwise.lab.result import Series
from headwise.train.folder import RunFolder
from headwise.train.metrics import read_metrics

NAMES = tuple(name + ending for name in MEASURES for ending in ("", SHUFFLED))


def read_distilled(folder: RunFolder, variant: int, seed: int) -> DistillRecord | None:
    """The record of a finished distillation; None where it is not finished. FormatError: the folder is damaged.

    The training curve is the task's loss alone, so that it means the same in every arm.
    """
    record = read_record(folder, variant, seed)
    if record is None:
        return None
    try:
        figures = json.loads(folder.result_json.read_text(encoding="utf-8"))
        points = read_metrics(folder.metrics)
        task = series_of(points, "loss_task")
        return DistillRecord(
            **{**dict(record), "train_curve": task if task.step else record.train_curve},
            val_loss_by_part=figures.get("val_loss_by_part") or {},
            likeness={name: _likeness(figures[name], points, name) for name in NAMES if figures.get(name)},
            aligner_params=figures.get("aligner_params") or 0,
            tokens_per_s=figures.get("tokens_per_s"),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{folder.root} is damaged ({error}); remove that folder to train it anew") from None


def _likeness(layers: list[float | None], points: list[dict[str, Any]], name: str) -> Likeness:
    known = [(point["step"], mean) for point in points if (mean := _mean(point.get(name))) is not None]
    return Likeness(layers=layers, course=Series(step=[s for s, _ in known], loss=[mean for _, mean in known]))


def _mean(layers: list[float | None] | None) -> float | None:
    known = [value for value in layers or [] if value is not None]
    return sum(known) / len(known) if known else None
