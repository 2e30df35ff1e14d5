"""Where a run's records go: metrics.jsonl, TensorBoard, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from headwise.errors import SettingsError
from headwise.io.atomic import write_error

Record = Mapping[str, Any]
"""One moment of a run: `step` (updates done), and what is known then of `loss` (nats a token, mean since the record
before), `lr`, `grad_norm` (before clipping), `tokens` and `seconds` (training so far), `tokens_per_s`, `val_loss`,
`bits_per_byte`."""


class Tracker(Protocol):
    """Something that takes records, in the order of their steps."""

    def record(self, values: Record) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """A line of JSON a record. `start` is the length in bytes to go on from; what lies behind it is cut off.

    A resumed run starts from the length its checkpoint noted, so no step appears twice and none is left out.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self._path = path
        try:
            self._file = path.open("ab")
            self._file.truncate(min(start, path.stat().st_size))
        except OSError as error:
            raise write_error(path, error) from error

    def record(self, values: Record) -> None:
        """Append one line; at once visible to readers. Raises `WriteError`."""
        self._write(json.dumps(dict(values), allow_nan=False).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise write_error(self._path, error) from error

    def length(self) -> int:
        """Bytes written, all of them on the disk when this returns."""
        try:
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise write_error(self._path, error) from error

    def close(self) -> None:
        with suppress(OSError):  # a full disk: the line that did not fit has been reported
            self._file.close()


class TensorBoardTracker:
    """Every number of a record as a scalar of its name; events after `step`, of a course cut short, are purged."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SettingsError("tensorboard is not installed: pip install 'headwise[tensorboard]'") from None
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def record(self, values: Record) -> None:
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line]
