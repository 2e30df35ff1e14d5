"""The folder of a comparison, and going on with one that was begun there.

OUT/compare.json            the lines, the settings, what was made of them
OUT/runs/I-LINE/seed-N/     a training run each (see `headwise.train.folder`)
OUT/tune/I-LINE/lr-X/seed-N/    the same for the trials of learning rates
OUT/measurements.json       speed and memory
OUT/workers.log             what the worker processes wrote on stderr
OUT/result.json, result.csv, report.html    when all is done
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.errors import FormatError, SettingsError, SpecError
from headwise.io.atomic import write_error, write_json, write_text
from headwise.io.checkpoint import read_json
from headwise.lab.plan import Plan
from headwise.lab.result import Measurements, RunRecord, Series, VariantInfo
from headwise.lab.settings import CompareSettings
from headwise.spec import parse
from headwise.train.folder import RunFolder
from headwise.train.metrics import read_metrics

VERSION = 1
EPS = ".eps_mean"  # how a module's mean reconstruction error is named in metrics.jsonl
KIND, MEASURED = "headwise-compare", "headwise-measurements"


@dataclass(frozen=True)
class CompareFolder:
    """Paths and papers of one comparison."""

    root: Path

    @property
    def compare_json(self) -> Path:
        return self.root / "compare.json"

    @property
    def measurements_json(self) -> Path:
        return self.root / "measurements.json"

    @property
    def log(self) -> Path:
        return self.root / "workers.log"

    def run(self, name: str, seed: int) -> RunFolder:
        """The folder of a run that enters the verdict."""
        return RunFolder(self.root / "runs" / name / f"seed-{seed}")

    def trial(self, name: str, lr: float, seed: int) -> RunFolder:
        """The folder of a run that tries a learning rate."""
        return RunFolder(self.root / "tune" / name / f"lr-{lr}" / f"seed-{seed}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The folder, made where it is missing, for this process alone: two would write into the same runs."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / ".lock").open("a")
        except OSError as error:
            raise write_error(self.root, error) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SettingsError(f"out: another comparison is running in {self.root}; wait for it to end") from None
            except OSError:
                pass  # no locks on this file system
            yield

    def begin(self, plan: Plan) -> Plan | None:
        """Write down what is compared here, or check that it is what was begun here, whose plan it then gives back.

        Raises:
            SettingsError: the folder holds something else.
        """
        if not self.compare_json.exists():
            if any(path.name != ".lock" for path in self.root.iterdir()):
                raise SettingsError(f"out: {self.root} exists and is not empty; choose another folder")
            self.note(plan)
            return None
        _, old = self.begun()
        about = self._read()
        try:
            variants = [VariantInfo(**variant) for variant in about["variants"]]
            lines, fingerprint = about["lines"], about["fingerprint"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from None
        differences = old.differences(plan.settings)
        if lines != plan.parsed:
            differences.insert(0, f"lines {' '.join(map(repr, plan.parsed))} (were {' '.join(map(repr, lines))})")
        elif fingerprint != plan.dataset.fingerprint:
            differences.append("data that have changed")
        elif [variant.resolved for variant in variants] != [variant.resolved for variant in plan.variants]:
            differences.append("lines that another version of headwise resolved")
        if differences:
            raise SettingsError(
                f"out: {self.root} holds another comparison; different here: {'; '.join(differences)}; "
                f"choose another folder, or give the same to go on with it"
            )
        return plan.with_variants([v.model_copy(update={"line": n.line}) for v, n in zip(variants, plan.variants)])

    def begun(self) -> tuple[list[str], CompareSettings]:
        """The lines and settings of the comparison that was begun here; FormatError where there is none.

        The lines are as they were typed, unless that was the name of a file that has meanwhile changed or gone.
        """
        if not self.compare_json.exists():
            raise FormatError(f"{self.root} holds no comparison: compare.json is missing")
        about = self._read()
        try:
            typed = [variant["line"] for variant in about["variants"]]
            lines = [line if _means(line, parsed) else parsed for line, parsed in zip(typed, about["lines"])]
            return lines, CompareSettings(**about["settings"], out=self.root)
        except (KeyError, TypeError, SettingsError) as error:
            raise self._damaged(error) from None

    def _read(self) -> dict[str, Any]:
        return read_json(self.compare_json, KIND, VERSION)

    def _damaged(self, error: Exception) -> FormatError:
        return FormatError(f"{self.compare_json} is damaged ({error}); choose another folder")

    def note(self, plan: Plan) -> None:
        """Write compare.json."""
        about = {
            "format": KIND,
            "version": VERSION,
            "lines": plan.parsed,
            "settings": plan.settings.model_dump(mode="json", exclude={"out"}, exclude_unset=True),
            "fingerprint": plan.dataset.fingerprint,
            "variants": [variant.model_dump(mode="json") for variant in plan.variants],
        }
        write_json(self.compare_json, about)

    def measurements(self, n_variants: int, rounds: int) -> list[Measurements] | None:
        """What was measured here before in as many rounds; None where nothing was."""
        if not self.measurements_json.exists():
            return None
        about = read_json(self.measurements_json, MEASURED, VERSION)
        if about.get("rounds") != rounds or len(about.get("variants", ())) != n_variants:
            return None
        return [Measurements(**variant) for variant in about["variants"]]

    def save_measurements(self, measurements: list[Measurements], rounds: int) -> None:
        """Write measurements.json."""
        about = {"format": MEASURED, "version": VERSION, "rounds": rounds}
        write_json(self.measurements_json, {**about, "variants": [m.model_dump(mode="json") for m in measurements]})


def _means(line: str, parsed: str) -> bool:
    """Whether a line still says what it did."""
    try:
        return str(parse(line)) == parsed
    except SpecError:
        return False


def read_record(folder: RunFolder, variant: int, seed: int) -> RunRecord | None:
    """The record of a finished run; None where it is not finished."""
    if not folder.result_json.exists():
        return None
    import json

    try:
        figures = json.loads(folder.result_json.read_text(encoding="utf-8"))
        points = read_metrics(folder.metrics)
        veins = dict.fromkeys(name for point in points for name in point if name.endswith(EPS))
        return RunRecord(
            variant=variant,
            seed=seed,
            val_loss=figures["val_loss"],
            bits_per_byte=figures.get("bits_per_byte"),
            train_curve=series_of(points, "loss"),
            val_curve=series_of(points, "val_loss"),
            eps={name.removesuffix(EPS): series_of(points, name) for name in veins},
            seconds=figures["seconds"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{folder.root} is damaged ({error}); remove that folder to train it anew") from None


def series_of(points: list[dict[str, Any]], name: str) -> Series:
    """The records that have a number of this name, against their steps."""
    known = [(int(p["step"]), p[name]) for p in points if p.get(name) is not None]
    return Series(step=[step for step, _ in known], loss=[loss for _, loss in known])


def finish_run(folder: RunFolder, *, keep_checkpoints: bool) -> None:
    """Tidy up after a run."""
    if not keep_checkpoints:
        shutil.rmtree(folder.checkpoints, ignore_errors=True)


def note_failure(folder: RunFolder, traceback: str | None) -> None:
    """Keep the traceback of a run that failed in code, for whoever wrote that code."""
    if traceback is not None and folder.root.is_dir():
        write_text(folder.root / "traceback.txt", traceback)
