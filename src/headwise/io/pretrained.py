"""Models on disk, of whatever form, found by what stands at a path:

* a folder of ours: config.json, model.safetensors and, where there is one, tokenizer/
* the folder of a training run, and then the newest whole checkpoint in it
* a Hugging Face folder: a config.json with `model_type` (`io/hf`), or one of ours with its code (`io/remote_code`)
* a GGUF file, or a folder with exactly one (`io/gguf`)

    config.json   {"format": "headwise-model", "version": 1, "line": the resolved line, "spec": the same spec as JSON}

The line is what a model is built from again; the JSON spec is for other readers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from headwise.errors import FormatError, SettingsError, SpecError
from headwise.io.atomic import atomic_dir, write_json
from headwise.io.checkpoint import MODEL, list_checkpoints, read_checked_tensors, read_json, read_state
from headwise.io.hf.folder import CONFIG, MOST_CONFIG, fits_count, hf_spec, load_hf, read_folder
from headwise.io.json_file import read_object
from headwise.io.tensors import assign, check_fits, common_dtype, module_tensors, read_tensors, write_tensors
from headwise.model import build
from headwise.model.quantise import Scheme, arrange, quantisation
from headwise.model.quantise import quantise as put_in_bits
from headwise.spec import ModelSpec, parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from headwise.model.base import LanguageModel

VERSION = 1


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
            {
                "format": "headwise-model",
                "version": VERSION,
                "line": str(spec),
                "spec": spec.model_dump(mode="json"),
                "quantised": quantisation(module),
            },
        )
        write_tensors(temporary / MODEL, module_tensors(module))
        if tokenizer is not None:
            tokenizer.save(temporary / "tokenizer")


def load(
    path: Path | str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    quantise: Scheme | None = None,
    check: bool = False,
) -> LanguageModel:
    """The model at `path`, in eval mode, with its `spec`.

    Weights in safetensors are mapped from the file, not copied: a page is read when it is first needed.

    Args:
        path: a folder of ours or of a training run, a Hugging Face folder, a GGUF file or a folder with one.
        device: where the parameters are kept; the CPU by default.
        dtype: in what precision; by default the one they are stored in (float32 where GGUF has them quantised).
        quantise: put its linear maps into "int8" or "int4" (see `hw.quantise`); a model saved so needs no telling.
        check: also look at every number, and refuse weights that are NaN or infinite.

    Raises:
        FormatError: in one line, for whatever is missing, cut short, of another shape, or asks for what we lack.
        SettingsError, HeadwiseError: as `hw.quantise` raises them.
    """
    path = Path(path)
    module = _form(path).load(path, device, dtype)
    if check:
        check_finite(module, path)
    if quantise is not None:
        put_in_bits(module, quantise)
    return module


def saved_spec(path: Path | str) -> ModelSpec:
    """The line of what `load` would load, without its weights. Raises `FormatError` as that does."""
    path = Path(path)
    return _form(path).spec(path)


def check_finite(module: LanguageModel, where: Path) -> None:
    """Refuse a model with weights that are NaN or infinite; the FormatError names the first tensors."""
    wrong = [name for name, tensor in module_tensors(module).items() if not bool(torch.isfinite(tensor).all())]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise FormatError(f"{where} holds NaN or infinite weights, in {', '.join(map(repr, wrong[:3]))}{more}")


class _Form(NamedTuple):
    spec: Callable[[Path], ModelSpec]
    load: Callable[[Path, torch.device | str | None, torch.dtype | None], LanguageModel]


def _form(path: Path) -> _Form:
    """How what stands at `path` is read."""
    if path.is_file() and path.suffix == ".gguf":
        return _gguf(path)
    if not path.is_dir():
        raise FormatError(f"{path} is no folder; give the folder of a model or of a training run, or a .gguf file")
    if (path / "run.json").exists():
        return _Form(_run_spec, _load_run)
    if (path / CONFIG).exists():
        about = read_object(path / CONFIG, MOST_CONFIG)
        if about.get("model_type") == "headwise":
            return _Form(_coded_spec, _load_coded)
        if "model_type" in about and "format" not in about:
            return _Form(hf_spec, load_hf)
        return _Form(_own_spec, _load_own)
    if len(found := sorted(path.glob("*.gguf"))) == 1:
        return _gguf(found[0])
    if found:
        raise FormatError(f"{path} holds {len(found)} GGUF files; name one of them, such as {found[0]}")
    raise FormatError(f"{path} holds neither a model (config.json or a .gguf file) nor a training run (run.json)")


def _gguf(file: Path) -> _Form:
    from headwise.io.gguf import gguf_spec, load_gguf

    return _Form(lambda _path: gguf_spec(file), lambda _path, device, dtype: load_gguf(file, device, dtype))


def _own_spec(path: Path) -> ModelSpec:
    return _parsed(read_json(path / CONFIG, "headwise-model", VERSION), "line", path / CONFIG)


def _coded_spec(path: Path) -> ModelSpec:
    return _parsed(read_object(path / CONFIG, MOST_CONFIG), "line", path / CONFIG)


def _run_spec(path: Path) -> ModelSpec:
    return _parsed(read_json(path / "run.json", "headwise-run", VERSION), "resolved_line", path / "run.json")


def _parsed(about: dict[str, Any], name: str, where: Path) -> ModelSpec:
    if not isinstance(about.get(name), str):
        raise FormatError(f"{where} is damaged: {name!r} is missing or no text")
    try:
        return parse(about[name])
    except SpecError as error:
        raise FormatError(f"{where}: its line cannot be read by this headwise: {error}") from None


def _load_own(path: Path, device: torch.device | str | None, dtype: torch.dtype | None) -> LanguageModel:
    spec, quantised = _own_spec(path), read_json(path / CONFIG, "headwise-model", VERSION).get("quantised")
    tensors, where = read_tensors(path / MODEL), path / MODEL
    if quantised is None:
        return _filled(spec, tensors, where, device, dtype)
    module = build(spec, device="meta")
    try:
        put_in_bits(module, quantised["scheme"], group_size=quantised["group_size"])
    except (SettingsError, KeyError, TypeError):
        raise FormatError(f"{path / CONFIG} is damaged: it says of how its weights are kept {quantised!r}") from None
    check_fits(module_tensors(module), tensors, where)
    dtype = dtype or common_dtype({name: tensors[name] for name, _ in module.named_parameters() if name in tensors})
    module.to(dtype=dtype).to_empty(device=device or "cpu").load_state_dict(tensors, strict=False)
    arrange(module)
    return module.eval()


def _load_coded(path: Path, device: torch.device | str | None, dtype: torch.dtype | None) -> LanguageModel:
    """A folder with its own code (`io/remote_code`); the code is not run, the line says all."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in read_folder(path).items()}
    return _filled(_coded_spec(path), tensors, path, device, dtype)


def _load_run(path: Path, device: torch.device | str | None, dtype: torch.dtype | None) -> LanguageModel:
    spec, problem = _run_spec(path), "it has no checkpoint yet"
    for checkpoint in reversed(list_checkpoints(path / "checkpoints")):
        try:
            tensors = read_checked_tensors(checkpoint, MODEL, read_state(checkpoint))
        except FormatError as error:
            problem = str(error)
        else:
            return _filled(spec, tensors, checkpoint / MODEL, device, dtype)
    raise FormatError(f"{path} is a training run without a whole checkpoint: {problem}")


def _filled(
    spec: ModelSpec,
    tensors: dict[str, Tensor],
    where: Path,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> LanguageModel:
    """The module of a line with these tensors, which bear its own names."""
    fits_count(spec, tensors, where)
    module = build(spec, device="meta")
    check_fits(module_tensors(module), tensors, where)
    assign(module, tensors.items(), device, dtype or common_dtype(tensors))
    return module.eval()
