"""Models on disk: a folder with config.json, model.safetensors and, where there is one, tokenizer/.

    config.json   {"format": "headwise-model", "version": 1, "line": the resolved line, "spec": the same spec as JSON}

The line is what a model is built from again; the JSON spec is for other readers. `load` also takes the folder of a
training run, and then the newest whole checkpoint in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from headwise.errors import FormatError, SpecError
from headwise.io.atomic import atomic_dir, write_json
from headwise.io.checkpoint import MODEL, list_checkpoints, read_checked_tensors, read_json, read_state
from headwise.io.tensors import fill_module, module_tensors, read_tensors, write_tensors
from headwise.model import build
from headwise.spec import ModelSpec, parse

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from headwise.model.base import LanguageModel

VERSION = 1
CONFIG = "config.json"


class Saves(Protocol):
    """A tokenizer, as far as saving it goes."""

    def save(self, folder: Path) -> None: ...


def save_pretrained(module: LanguageModel, folder: Path | str, tokenizer: Saves | None = None) -> None:
    """Write a model, in the dtype it has; an existing folder is replaced whole. Raises `WriteError` (disk, permission)
    and `FormatError` where `folder` holds something else than a model of ours."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        try:
            read_json(folder / CONFIG, "headwise-model", VERSION)
        except FormatError:
            raise FormatError(f"{folder} is not empty and holds no model of headwise; choose another folder") from None
    spec = module.spec
    with atomic_dir(folder) as temporary:
        write_json(
            temporary / CONFIG,
            {"format": "headwise-model", "version": VERSION, "line": str(spec), "spec": spec.model_dump(mode="json")},
        )
        write_tensors(temporary / MODEL, module_tensors(module))
        if tokenizer is not None:
            tokenizer.save(temporary / "tokenizer")


def load(path: Path | str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LanguageModel:
    """The model `save_pretrained` or a training run left in `path`, in eval mode.

    Its parameters have the dtype they were saved with unless `dtype` says otherwise. `FormatError`, in one line, for
    whatever is missing, cut short, of another shape or not ours.
    """
    path = Path(path)
    if not path.is_dir():
        raise FormatError(f"{path} is no folder; give the folder of a model or of a training run")
    line, tensors, where = _run(path) if (path / "run.json").exists() else _model(path)
    spec = _parsed(line, where)
    if dtype is None:
        dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)
    module = build(spec, device=device, dtype=dtype)
    fill_module(module, tensors, where)
    return module.eval()


def saved_spec(path: Path | str) -> ModelSpec:
    """The spec of what `load` would load, without its weights. Raises `FormatError` as that does."""
    path = Path(path)
    if not path.is_dir():
        raise FormatError(f"{path} is no folder; give the folder of a model or of a training run")
    if (path / "run.json").exists():
        where, about, key = path / "run.json", read_json(path / "run.json", "headwise-run", VERSION), "resolved_line"
    elif (path / CONFIG).exists():
        where, about, key = path / CONFIG, read_json(path / CONFIG, "headwise-model", VERSION), "line"
    else:
        raise FormatError(f"{path} holds neither a model (config.json) nor a training run (run.json)")
    return _parsed(_text(about, key, where), where)


def _parsed(line: str, where: Path) -> ModelSpec:
    try:
        return parse(line)
    except SpecError as error:
        raise FormatError(f"{where}: its line cannot be read by this headwise: {error}") from None


def _model(path: Path) -> tuple[str, dict[str, Tensor], Path]:
    if not (path / CONFIG).exists():
        raise FormatError(f"{path} holds neither a model (config.json) nor a training run (run.json)")
    about = read_json(path / CONFIG, "headwise-model", VERSION)
    return _text(about, "line", path / CONFIG), read_tensors(path / MODEL), path / MODEL


def _run(path: Path) -> tuple[str, dict[str, Tensor], Path]:
    about = read_json(path / "run.json", "headwise-run", VERSION)
    line = _text(about, "resolved_line", path / "run.json")
    problem = "it has no checkpoint yet"
    for checkpoint in reversed(list_checkpoints(path / "checkpoints")):
        try:
            return line, read_checked_tensors(checkpoint, MODEL, read_state(checkpoint)), checkpoint / MODEL
        except FormatError as error:
            problem = str(error)
    raise FormatError(f"{path} is a training run without a whole checkpoint: {problem}")


def _text(about: dict[str, Any], name: str, where: Path) -> str:
    if not isinstance(about.get(name), str):
        raise FormatError(f"{where} is damaged: {name!r} is missing or no text")
    return about[name]
