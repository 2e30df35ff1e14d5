"""The folder of an A/B, and going on with one that was begun there.

OUT/ab.json                 the settings, and what teachers, student and data were
OUT/runs/ARM/seed-N/        a distillation each (see `headwise.train.folder`)
OUT/workers.log             what the worker processes wrote on stderr
OUT/result.json, result.csv, report.html, AB_RESULTS.md    when all is done
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.errors import FormatError, SettingsError
from headwise.io.atomic import write_json
from headwise.io.checkpoint import read_json
from headwise.lab.ab.arms import Arm
from headwise.lab.ab.plan import ABPlan, folder_name
from headwise.lab.ab.settings import ABSettings
from headwise.train.folder import RunFolder

KIND, VERSION = "headwise-ab", 1


@dataclass(frozen=True)
class ABFolder:
    """Paths and papers of one A/B."""

    root: Path

    @property
    def ab_json(self) -> Path:
        return self.root / "ab.json"

    def run(self, arm: Arm, seed: int) -> RunFolder:
        """The folder of one distillation."""
        return RunFolder(self.root / "runs" / folder_name(arm) / f"seed-{seed}")

    def begin(self, plan: ABPlan) -> bool:
        """Write down what is compared here, or check that it is what was begun here; whether it was.

        Raises:
            SettingsError: the folder holds something else.
        """
        if not self.ab_json.exists():
            if any(path.name != ".lock" for path in self.root.iterdir()):
                raise SettingsError(f"out: {self.root} exists and is not empty; choose another folder")
            self._note(plan)
            return False
        about, old = self._read(), self.begun()
        differences = old.differences(plan.settings)
        for name, now in _made_of(plan).items():
            if about.get(name) != now and not (name == "student" and differences):
                differences.append(f"{name} that has changed")
        if differences:
            raise SettingsError(
                f"out: {self.root} holds another A/B; different here: {'; '.join(differences)}; "
                f"choose another folder, or give the same to go on with it"
            )
        self._note(plan)  # arms and seeds may have been added
        return True

    def begun(self) -> ABSettings:
        """The settings of the A/B that was begun here; FormatError where there is none."""
        if not self.ab_json.exists():
            raise FormatError(f"{self.root} holds no A/B: ab.json is missing")
        try:
            return ABSettings(**self._read()["settings"], out=self.root)
        except (KeyError, TypeError, SettingsError) as error:
            raise FormatError(f"{self.ab_json} is damaged ({error}); choose another folder") from None

    def _read(self) -> dict[str, Any]:
        return read_json(self.ab_json, KIND, VERSION)

    def _note(self, plan: ABPlan) -> None:
        settings = plan.settings.model_dump(mode="json", exclude={"out"}, exclude_unset=True)
        write_json(self.ab_json, {"format": KIND, "version": VERSION, "settings": settings, **_made_of(plan)})


def _made_of(plan: ABPlan) -> dict[str, Any]:
    return {"teacher": plan.teachers, "student": str(plan.student), "data": plan.dataset.fingerprint}
