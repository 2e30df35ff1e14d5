"""Two finished distillations against each other, in the words and tables of an A/B with one seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from headwise.distill.settings import DistillSettings
from headwise.errors import FormatError, SettingsError
from headwise.io.atomic import write_text
from headwise.lab.ab.arms import Arm
from headwise.lab.ab.markdown import markdown
from headwise.lab.ab.plan import shell
from headwise.lab.ab.records import read_distilled
from headwise.lab.ab.result import ABResult, DistillRecord
from headwise.lab.ab.summary import summarise_ab
from headwise.lab.compare import environment_of
from headwise.lab.plan import variant_info
from headwise.lab.result import DatasetInfo, Setup, VariantInfo
from headwise.spec import parse
from headwise.train.folder import RunFolder


def compare_runs(baseline: Path | str, experimental: Path | str, output: Path | str | None = None) -> ABResult:
    """What two runs of `headwise distill run` came to, as an A/B with the first as its baseline.

    One run each shows no more than itself: the verdict is "undecided", whatever the difference. In what else than the
    way to distil the two differ, `notes` say. `output` gets the Markdown.

    Raises:
        FormatError: no distillation there, or one that is not finished.
        SettingsError: runs on other data, whose losses mean different things.
        WriteError: `output` cannot be written.
    """
    runs = [_read(Path(folder), index) for index, folder in enumerate((baseline, experimental))]
    (_, one, about, first), (_, other, about_other, second) = runs
    if about["data"]["fingerprint"] != about_other["data"]["fingerprint"]:
        raise SettingsError(
            f"{baseline} and {experimental} were trained on different data, {about['data']['name']} and "
            f"{about_other['data']['name']}, or tokenizers; losses on these cannot be compared"
        )
    names = _names(one, other, Path(baseline), Path(experimental))
    arms = [
        Arm(name, _changes(settings, against)) for name, settings, against in zip(names, (one, other), (other, one))
    ]
    setup = Setup(
        seeds=[one.seed],
        dataset=DatasetInfo(name=about["data"]["name"], fingerprint=about["data"]["fingerprint"]),
        environment=environment_of(torch.device("cpu")).model_copy(update=about["environment"]),
        settings=one.model_dump(mode="json", exclude={"out"}),
        match="none",
        finished_at=None,
        command=f"headwise distill compare --baseline {baseline} --experimental {experimental}",
    )
    result = summarise_ab(
        arms,
        [_variant(arm, settings, line) for arm, (_, settings, line, _) in zip(arms, runs)],
        [first, second.model_copy(update={"seed": one.seed})],
        setup,
        teacher=list(one.teacher),
        student=str(one.student),
        commands=[_command(one), _command(other)],
        notes=_notes(one, other),
    )
    if output is not None:
        write_text(Path(output), markdown(result))
    return result


def _read(folder: Path, index: int) -> tuple[Path, DistillSettings, dict[str, Any], DistillRecord]:
    run = RunFolder(folder)
    if not run.is_distilled:
        what = "is a training run" if run.run_json.exists() else "holds no run"
        raise FormatError(f"{folder} {what}; give the --out of a finished `headwise distill run`")
    settings, about = run.settings_as(DistillSettings), run.read()
    record = read_distilled(run, index, settings.seed)
    if record is None:
        raise FormatError(f"{folder} is not finished; go on with `headwise resume {folder}`")
    return folder, settings, about, record


def _names(one: DistillSettings, other: DistillSettings, baseline: Path, experimental: Path) -> list[str]:
    """The runs' own names, else their folders' as far up as they differ."""
    if one.run_name and other.run_name and one.run_name != other.run_name:
        return [one.run_name, other.run_name]
    parts = [path.absolute().parts for path in (baseline, experimental)]
    least = 2 if all(each[-1].startswith("seed-") for each in parts) else 1  # the runs of an A/B
    depth = next((n for n in range(least, min(map(len, parts))) if parts[0][-n:] != parts[1][-n:]), least)
    names = ["/".join(each[-depth:]) for each in parts]
    return names if names[0] != names[1] else [names[0], f"{names[1]} #2"]


def _changes(settings: DistillSettings, against: DistillSettings) -> dict[str, Any]:
    """What is one run's own, its projection first."""
    own = {name for name in type(settings).model_fields if getattr(settings, name) != getattr(against, name)}
    dumped = settings.model_dump(mode="json", include=own - {"out", "run_name", "projection"})
    return {"projection": settings.projection, **dumped}


def _notes(one: DistillSettings, other: DistillSettings) -> list[str]:
    differences = one.differences(other)
    notes = ["One run each: nothing is claimed from that; `headwise distill ab` runs several seeds."]
    if differences:
        notes.append(f"The second run has {'; '.join(differences)}.")
    if one.steps != other.steps:
        notes.append("Their steps are not equal: the longer run had more training, whatever else differs.")
    if one.seed != other.seed:
        notes.append("Their seeds differ: other batches and another start account for some of the difference.")
    return notes


def _variant(arm: Arm, settings: DistillSettings, about: dict[str, Any]) -> VariantInfo:
    spec = parse(about["resolved_line"])
    return variant_info(arm.name, spec, settings.seq_len, steps=settings.steps, lr=settings.lr)


def _command(settings: DistillSettings) -> str:
    """The shell command of a run, with what is not as it would be anyway."""
    fields = type(settings).model_fields
    own = {name for name, value in settings if value != fields[name].get_default(call_default_factory=True)}
    names = (own | {"recipe", "projection", "steps", "seed"}) - {"threads"}
    return shell(["headwise", "distill", "run"], settings, names)
