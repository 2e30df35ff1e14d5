"""From a line and settings to the concrete thing to train: device, data and a spec that fit each other."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from os import environ
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headwise.allocator import kept_memory
from headwise.errors import SettingsError
from headwise.io.pretrained import saved_spec
from headwise.spec import ModelSpec, parse
from headwise.train.objective import vocab_needed
from headwise.train.settings import TrainSettings
from headwise.train.vein import check_vein, with_last_tau

if TYPE_CHECKING:
    from headwise.data import Dataset


@dataclass(frozen=True)
class Job:
    """What a run trains, on what, and how. `spec` is resolved."""

    spec: ModelSpec
    settings: TrainSettings
    dataset: Dataset
    device: torch.device


def resolve_device(name: str) -> torch.device:
    """The device of a `device` setting; `SettingsError` where this machine has none of that name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device  # "cuda" becomes "cuda:0"
    except (RuntimeError, AssertionError, NotImplementedError):  # what torch raises differs by build
        raise SettingsError(f"device: {name!r} is not on this machine; use auto or cpu") from None


def pinned(settings: TrainSettings) -> TrainSettings:
    """The settings with what they leave to the surroundings written down, so that a run resumes the same anywhere:
    files as absolute paths, and the number of threads, which decides the order of sums."""
    files: dict[str, Any] = {
        name: str(Path(value).absolute())
        for name in ("data", "tokenizer")
        if (value := getattr(settings, name)) not in ("shakespeare", "char", "byte", "bpe") and Path(value).exists()
    }
    if settings.init_from is not None:
        start = files["init_from"] = settings.init_from.absolute()
        inside = start / "tokenizer"
        published = start.suffix == ".gguf" or (start / "tokenizer.json").exists() or any(start.glob("*.gguf"))
        if "tokenizer" not in settings.model_fields_set and (inside.exists() or published):
            files["tokenizer"] = str(inside if inside.exists() else start)
    return settings.model_copy(update={**files, "threads": settings.threads or torch.get_num_threads()})


def prepare(line: str | ModelSpec, settings: TrainSettings, dataset: Dataset | None = None) -> Job:
    """Load the data and resolve the spec for it; `SettingsError` where settings, data and line do not go together."""
    spec = parse(line) if isinstance(line, str) else line
    device = resolve_device(settings.device)
    if settings.dtype == "float16" and device.type != "cuda":
        raise SettingsError(f"dtype: float16 needs a CUDA GPU, the device is {device}; use bfloat16 or float32")
    if dataset is None:
        from headwise.data import load_dataset

        dataset = load_dataset(
            settings.data, settings.tokenizer, text_column=settings.text_column, val_fraction=settings.val_fraction
        )
    needed = vocab_needed(spec.architecture, dataset.tokenizer.vocab_size)
    size = settings.size or ("10m" if device.type == "cuda" else "1m")
    spec = spec.resolve(size=size, vocab_size=needed, max_seq_len=settings.seq_len)
    if spec.dims.vocab_size < needed:
        mask = " and a mask" if spec.architecture == "encoder" else ""
        raise SettingsError(
            f"vocab_size: the line says {spec.dims.vocab_size}, the data need {needed} ids (the tokenizer's{mask}); "
            f"leave vocab_size out or choose at least {needed}"
        )
    if spec.dims.max_seq_len < settings.seq_len:
        raise SettingsError(
            f"seq_len: {settings.seq_len} is more than the line's max_seq_len={spec.dims.max_seq_len}; "
            f"choose at most {spec.dims.max_seq_len}"
        )
    if settings.init_from is not None and (held := saved_spec(settings.init_from)) != spec:
        raise SettingsError(
            f"init_from: {settings.init_from} holds {str(held)!r}, not the line to be trained, {str(spec)!r}; "
            f"train the line that it holds, or put other mechanisms in with `headwise swap`"
        )
    check_vein(spec, settings)
    return Job(with_last_tau(spec, settings), settings, dataset, device)


def torch_state(settings: TrainSettings, device: torch.device) -> AbstractContextManager[object]:
    """The process for the time of a run: threads, seeds, deterministic kernels, memory; afterwards as it was."""
    with ExitStack() as stack:
        stack.enter_context(kept_memory())
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        torch.manual_seed(settings.seed)
        if settings.threads is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(settings.threads)
        if settings.deterministic and device.type == "cuda":  # on a CPU torch's kernels are deterministic as they are
            environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may pick another sum order
            stack.callback(
                torch.use_deterministic_algorithms,
                torch.are_deterministic_algorithms_enabled(),
                warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            )
            torch.use_deterministic_algorithms(True, warn_only=True)
        return stack.pop_all()
