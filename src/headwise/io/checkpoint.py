"""Checkpoints of a training run: ROOT/step-000300/{model.safetensors, optimizer.safetensors, state.json}, no pickle.

`optimizer.safetensors` holds every other tensor of the run (the optimiser's by parameter name, random-number states as
bytes), `state.json` the numbers, and the SHA-256 of both tensor files: a checkpoint is used only if it is wholly what
was written. Each is written atomically and the newest two are kept, so that damage to one leaves another.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.errors import FormatError
from headwise.io.atomic import atomic_dir
from headwise.io.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
KEEP = 2
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` updates."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    root: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int = KEEP,
) -> Path:
    """Write the checkpoint of `step` under `root` and then drop all but the newest `keep`; `state` is strict JSON.

    Checkpoints of later steps are dropped too: they are damaged ones that a resumed run has passed over. Raises
    `WriteError` (a full disk, say), and then leaves every earlier checkpoint as it was.
    """
    path = root / f"step-{step:06d}"
    with atomic_dir(path) as folder:
        write_tensors(folder / MODEL, model)
        write_tensors(folder / OPTIMIZER, optimizer)
        about = {
            "format": "headwise-checkpoint",
            "version": VERSION,
            "step": step,
            "sha256": {name: _sha256(folder / name) for name in (MODEL, OPTIMIZER)},
            "state": dict(state),
        }
        (folder / STATE).write_text(json.dumps(about, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    existing = list_checkpoints(root)
    newest = existing.index(path) + 1
    for other in existing[: max(0, newest - keep)] + existing[newest:]:
        shutil.rmtree(other, ignore_errors=True)
    return path


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints under `root`, oldest first; unopened, so some may be damaged."""
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint, checked for form; `FormatError` otherwise."""
    about = read_json(path / STATE, "headwise-checkpoint", VERSION)
    sums = about.get("sha256")
    if not (isinstance(about.get("step"), int) and isinstance(about.get("state"), dict) and isinstance(sums, dict)):
        raise FormatError(f"{path / STATE} is damaged: step, state or sha256 is missing")
    return about


def read_json(path: Path, kind: str, version: int) -> dict[str, Any]:
    """One of our JSON files, of the given `format` and a version not newer than ours; `FormatError` otherwise."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is damaged or no JSON ({error})") from None
    if not isinstance(about, dict) or about.get("format") != kind:
        given = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise FormatError(f"{path} was not written by headwise: its format is {given!r}, not {kind!r}")
    if not isinstance(about.get("version"), int) or about["version"] > version:
        raise FormatError(
            f"{path} has version {about.get('version')!r}; this headwise reads up to {version}: upgrade it"
        )
    return about


def read_checked_tensors(path: Path, name: str, about: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one file of the checkpoint `path`, its SHA-256 compared with `state.json` (`about`)."""
    if not (path / name).is_file():
        raise FormatError(f"{path / name} is missing")
    if _sha256(path / name) != about["sha256"].get(name):
        raise FormatError(f"{path / name} is damaged: its SHA-256 is not the one written")
    return read_tensors(path / name)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint whole, on the CPU; `FormatError` if anything about it is not as it was written."""
    about = read_state(path)
    model, optimizer = (read_checked_tensors(path, name, about) for name in (MODEL, OPTIMIZER))
    return Checkpoint(path, about["step"], model, optimizer, about["state"])


def load_newest(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where there is none at all.

    A damaged one is passed over, with a line to `warn`; if all are damaged, `FormatError`.
    """
    problems = []
    for path in reversed(list_checkpoints(root)):
        try:
            return load_checkpoint(path)
        except FormatError as error:
            problems.append(str(error))
            warn(f"checkpoint passed over: {error}")
    if problems:
        raise FormatError(f"no checkpoint in {root} is whole: {problems[0]}; start again in another folder")
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
