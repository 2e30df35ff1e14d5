"""The folder of a run: what lies where, how one is begun, and when it must not be.

OUT/run.json        the line, the resolved spec, the settings, the data's fingerprint, the environment
OUT/tokenizer/      what turns text into the run's ids
OUT/metrics.jsonl   the records
OUT/checkpoints/    step-000300/ …
OUT/result.json     the figures, when the run is finished
"""

from __future__ import annotations

import fcntl
import platform
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from headwise.errors import FormatError, SettingsError
from headwise.io.atomic import atomic_dir, write_json
from headwise.io.checkpoint import list_checkpoints, read_json
from headwise.train.settings import TrainSettings

if TYPE_CHECKING:
    from headwise.train.job import Job

S = TypeVar("S", bound=TrainSettings)
VERSION = 1
_PATIENCE = 30  # tenths of a second


@dataclass(frozen=True)
class RunFolder:
    """Paths and papers of one run."""

    root: Path

    @property
    def run_json(self) -> Path:
        return self.root / "run.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def result_json(self) -> Path:
        return self.root / "result.json"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def check_free(self) -> None:
        """`SettingsError` unless the folder is missing or empty: no run is ever written over."""
        if not self.root.exists() or (self.root.is_dir() and not any(self.root.iterdir())):
            return
        if not self.root.is_dir():
            raise SettingsError(f"out: {self.root} is a file; choose a folder")
        if not self.run_json.exists():
            raise SettingsError(f"out: {self.root} exists and is not empty; choose another folder")
        checkpoints = list_checkpoints(self.checkpoints)
        reached = int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
        raise SettingsError(
            f"out: {self.root} already holds a run (at step {reached}); "
            f"go on with `headwise resume {self.root}`, or choose another --out"
        )

    def create(self, line: str, job: Job, **more: Any) -> None:
        """Write run.json, with `more` in it, and the tokenizer, both or neither."""
        spec, dataset = job.spec, job.dataset
        self.check_free()  # once more: since the run's first look the data were loaded, which may take minutes
        with atomic_dir(self.root) as folder:
            dataset.tokenizer.save(folder / "tokenizer")
            write_json(
                folder / "run.json",
                {
                    "format": "headwise-run",
                    "version": VERSION,
                    "line": line,
                    "resolved_line": str(spec),
                    "spec": spec.model_dump(mode="json"),
                    "settings": job.settings.model_dump(mode="json", exclude={"out"}),
                    "data": {
                        "name": dataset.name,
                        "fingerprint": dataset.fingerprint,
                        "train_tokens": len(dataset.train),
                        "val_tokens": len(dataset.val),
                    },
                    "environment": environment(job.device),
                    **more,
                },
            )

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from training in this folder meanwhile; `SettingsError` where one does already.

        The lock (flock) goes with the process, however it ends. One that is being killed is given a moment.
        """
        with self.run_json.open("rb") as file:
            for attempt in range(_PATIENCE):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if attempt == _PATIENCE - 1:
                        raise SettingsError(
                            f"out: another process is training in {self.root}; wait for it, or stop it"
                        ) from None
                    time.sleep(0.1)
                except OSError:  # no locks on this file system
                    break
            yield

    def read(self) -> dict[str, Any]:
        """run.json, checked for form; `FormatError` where the folder holds no run."""
        if not self.run_json.exists():
            raise FormatError(f"{self.root} holds no run: run.json is missing")
        about = read_json(self.run_json, "headwise-run", VERSION)
        kinds = {"line": str, "resolved_line": str, "settings": dict, "data": dict}
        if bad := [name for name, kind in kinds.items() if not isinstance(about.get(name), kind)]:
            raise FormatError(f"{self.run_json} is damaged: {', '.join(bad)} missing or of the wrong kind")
        return about

    @property
    def is_distilled(self) -> bool:
        """Whether the run was made by `headwise distill`, which alone can go on with it."""
        return self.run_json.exists() and "teachers" in self.read()

    def settings(self) -> TrainSettings:
        """The run's settings, `out` being where the folder lies now; of a distillation, those it shares with training.

        Raises `FormatError` where run.json holds none that are valid.
        """
        return self.settings_as(TrainSettings, TrainSettings.model_fields if self.is_distilled else None)

    def settings_as(self, kind: type[S], names: Collection[str] | None = None) -> S:
        """The run's settings as those of `kind`, all of them or those of these names. Raises as `settings`."""
        held = self.read()["settings"]
        try:
            return kind(**{name: held[name] for name in held if names is None or name in names}, out=self.root)
        except SettingsError as error:
            raise FormatError(f"{self.run_json}: settings: {error}") from None


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures of a run depend on besides its settings."""
    return {
        "headwise": version("headwise"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "threads": torch.get_num_threads(),
    }
