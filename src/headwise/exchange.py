"""Models in and out: published ones become folders of ours, and ours become what the tools people serve with take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.data.portable import portable
from headwise.data.tokenizers import RustBackedTokenizer, Tokenizer, load_tokenizer
from headwise.errors import DataError, FormatError, SettingsError, one_of
from headwise.io.atomic import atomic_dir
from headwise.io.hf.export import save_hf
from headwise.io.pretrained import load, save_pretrained
from headwise.io.remote_code import save_with_code

if TYPE_CHECKING:
    import torch

    from headwise.model.base import LanguageModel


Writer = Callable[["LanguageModel", Path, RustBackedTokenizer | None], str]


@dataclass(frozen=True)
class Format:
    """A form that models are exported in: one line about it, and what writes a model with its tokenizer to a path and
    says what it is then. A folder is made at the path itself; a single file may stand in a folder of that name."""

    summary: str
    write: Writer
    file: str | None = None

    def place(self, out: Path) -> Path:
        """Where it is written: the file asked for, or one in a folder."""
        return out if self.file is None or out.suffix == Path(self.file).suffix else out / self.file


def _hf(module: LanguageModel, folder: Path, tokenizer: RustBackedTokenizer | None) -> str:
    with atomic_dir(folder) as temporary:
        saved_as = save_hf(module, temporary, tokenizer.special_ids if tokenizer else {})
        if tokenizer is not None:
            tokenizer.save(temporary)
    return saved_as


def _with_code(module: LanguageModel, folder: Path, tokenizer: RustBackedTokenizer | None) -> str:
    with atomic_dir(folder) as temporary:
        saved_as = save_with_code(module, temporary, tokenizer.special_ids if tokenizer else {})
        if tokenizer is not None:
            tokenizer.save(temporary)
    return f"{saved_as}, with its code"


def _gguf(kind: str | None) -> Writer:
    def write(module: LanguageModel, file: Path, tokenizer: RustBackedTokenizer | None) -> str:
        from headwise.io.gguf.export import save_gguf

        return save_gguf(
            module, file, kind, (tokenizer.rust, tokenizer.config, tokenizer.eos_ids) if tokenizer else None
        )

    return write


FORMATS: dict[str, Format] = {
    "hf": Format("a class that transformers has, for all that reads its folders; known families only", _hf),
    "hf-code": Format("a folder for transformers that brings its own code; any line", _with_code),
    "gguf": Format("a file for llama.cpp in the precision that the weights have", _gguf(None), "model.gguf"),
    "gguf-f16": Format("a file for llama.cpp in half precision", _gguf("f16"), "model.gguf"),
    "gguf-q8_0": Format("a file for llama.cpp in 8 bits", _gguf("q8_0"), "model.gguf"),
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
        out: the new folder, missing or empty; for GGUF the new file, or a folder for it.
        format: one of FORMATS.
        check: refuse weights that are NaN or infinite.

    Raises:
        FormatError: there is no such model, it is not whole, or the format cannot hold its line.
        SettingsError: no such format, or `out` is taken.
        WriteError: disk or permission.
    """
    if format not in FORMATS:
        raise SettingsError(one_of(format, FORMATS, "format"))
    out = FORMATS[format].place(_free(out))
    module = load(path, check=check)
    tokenizer, why = _tokenizer(path)
    saved_as = FORMATS[format].write(module, out, portable(tokenizer) if tokenizer is not None else None)
    return _moved(module, saved_as, tokenizer, why, out)


def _moved(module: LanguageModel, saved_as: str, tokenizer: Tokenizer | None, why: str | None, out: Path) -> Moved:
    params = sum(parameter.numel() for parameter in module.parameters())
    about = f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids" if tokenizer is not None else None
    return Moved(str(module.spec), params, saved_as, about, why, out)


def _tokenizer(path: Path | str) -> tuple[Tokenizer | None, str | None]:
    """The model's tokenizer; or none, and why. Weights alone are worth having."""
    try:
        return load_tokenizer(path), None
    except (DataError, FormatError) as error:  # none at all, or in a GGUF file one of a kind that is not known
        return None, str(error)


def _free(out: Path | str) -> Path:
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SettingsError(f"out: {out} exists and is not empty; choose another name")
    return out
