"""Models in and out: published ones become folders of ours, and ours become what the tools people serve with take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.data.portable import portable
from headwise.data.tokenizers import Tokenizer, load_tokenizer
from headwise.errors import DataError, SettingsError, one_of
from headwise.io.atomic import atomic_dir
from headwise.io.hf.export import save_hf
from headwise.io.pretrained import load, save_pretrained
from headwise.io.remote_code import save_with_code

if TYPE_CHECKING:
    import torch

    from headwise.model.base import LanguageModel


@dataclass(frozen=True)
class Format:
    """A form that models are exported in: one line about it, and what writes a model and the ids of its special tokens
    into a folder and says what it is then."""

    summary: str
    write: Callable[[LanguageModel, Path, Mapping[str, Any]], str]


def _with_code(module: LanguageModel, folder: Path, special_ids: Mapping[str, Any]) -> str:
    save_with_code(module, folder, dict(special_ids))
    return "HeadwiseForCausalLM, with its code"


FORMATS: dict[str, Format] = {
    "hf": Format("a class that transformers has, for all that reads its folders; known families only", save_hf),
    "hf-code": Format("a folder for transformers that brings its own code; any decoder", _with_code),
}


@dataclass(frozen=True)
class Moved:
    """What came of an import or export: the line, its parameters, what it was saved as, and with which tokenizer.

    `no_tokenizer` says why there is none, where there is none.
    """

    line: str
    params: int
    saved_as: str
    tokenizer: str | None
    no_tokenizer: str | None
    out: Path

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {**vars(self), "out": str(self.out)}

    def __str__(self) -> str:
        tokenizer = self.tokenizer or f"none ({self.no_tokenizer})"
        return (
            f"{self.line}\n{self.params:,} parameters, saved as {self.saved_as}\ntokenizer: {tokenizer}\nin {self.out}"
        )


def import_model(path: Path | str, out: Path | str, *, dtype: torch.dtype | None = None, check: bool = False) -> Moved:
    """Write whatever `headwise.load` takes as a folder of ours, with its tokenizer.

    Args:
        path: a Hugging Face folder, a GGUF file, a run or a folder of ours.
        out: the new folder; missing or empty.
        dtype: in what precision its weights are kept; by default the one they are stored in.
        check: refuse weights that are NaN or infinite.

    Raises:
        FormatError: there is no such model, or it is not whole.
        SettingsError: `out` is taken.
        WriteError: disk or permission.
    """
    out = _free(out)
    module = load(path, dtype=dtype, check=check)
    tokenizer, why = _tokenizer(path)
    save_pretrained(module, out, tokenizer)
    return _moved(module, "a folder of headwise", tokenizer, why, out)


def export_model(path: Path | str, out: Path | str, *, format: str = "hf", check: bool = False) -> Moved:
    """Write a model in the form of other tools, its tokenizer's files included. Arguments as `import_model`'s.

    Args:
        path: as `headwise.load` takes it.
        out: the new folder; missing or empty.
        format: one of FORMATS.
        check: refuse weights that are NaN or infinite.

    Raises:
        FormatError: there is no such model, it is not whole, or the format cannot hold its line.
        SettingsError: no such format, or `out` is taken.
        WriteError: disk or permission.
    """
    if format not in FORMATS:
        raise SettingsError(one_of(format, FORMATS, "format"))
    out = _free(out)
    module = load(path, check=check)
    tokenizer, why = _tokenizer(path)
    with atomic_dir(out) as folder:
        saved_as = FORMATS[format].write(module, folder, tokenizer.special_ids if tokenizer else {})
        if tokenizer is not None:
            portable(tokenizer).save(folder)
    return _moved(module, saved_as, tokenizer, why, out)


def _moved(module: LanguageModel, saved_as: str, tokenizer: Tokenizer | None, why: str | None, out: Path) -> Moved:
    params = sum(parameter.numel() for parameter in module.parameters())
    about = f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids" if tokenizer is not None else None
    return Moved(str(module.spec), params, saved_as, about, why, out)


def _tokenizer(path: Path | str) -> tuple[Tokenizer | None, str | None]:
    """The model's tokenizer; or none, and why. Weights alone are worth having."""
    try:
        return load_tokenizer(path), None
    except DataError as error:
        return None, str(error)


def _free(out: Path | str) -> Path:
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SettingsError(f"out: {out} exists and is not empty; choose another folder")
    return out
