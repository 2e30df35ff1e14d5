"""The progress bar of one run, on stderr."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from headwise.train.metrics import Record


def wanted(progress: bool | None) -> bool:
    """Whether to draw: as told, and untold only where stderr is a terminal."""
    return sys.stderr.isatty() if progress is None else progress


class ProgressTracker:
    """A rich bar with loss, tokens/s and ETA; a tracker like the others, so it moves with every record."""

    def __init__(self, label: str, steps: int, start: int) -> None:
        self._last: dict[str, Any] = {}
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(label, total=steps, completed=start, numbers="")
        self._bar.start()

    def record(self, values: Record) -> None:
        self._last.update(values)
        parts = [f"loss {self._last['loss']:.3f}", f"{self._last['tokens_per_s']:,.0f} tokens/s"]
        if "val_loss" in self._last:
            parts.insert(1, f"val {self._last['val_loss']:.3f}")
        self._bar.update(self._task, completed=values["step"], numbers="  ".join(parts))

    def close(self) -> None:
        self._bar.stop()
