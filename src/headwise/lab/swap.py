"""A mechanism put into a trained model on disk, with its loss before and after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from headwise.distill.job import SWAP
from headwise.errors import SettingsError
from headwise.io.atomic import write_json
from headwise.io.pretrained import load, save_pretrained, saved_spec
from headwise.model.surgery import Swapped, swap_parts, swapped_spec
from headwise.spec import ModelSpec, count
from headwise.train.evaluation import evaluate
from headwise.train.folder import RunFolder
from headwise.train.job import resolve_device
from headwise.train.settings import Settings, TrainSettings

if TYPE_CHECKING:
    from torch import Tensor

    from headwise.data import Dataset


class SwapSettings(Settings):
    """What is put in, where, and what it is measured on."""

    attention: str | None = Field(None, description="the attention to put in, as 'tva(rank=8)'")
    ffn: str | None = Field(None, description="the feed-forward to put in, as 'vft(rank=16)'")
    layers: str | None = Field(None, description="which layers, as 0-3,5; default all")
    out: Path | None = Field(None, description="folder of the new model; default runs/swap-TIME")
    data: str | None = Field(None, description="text to fit and to measure on, as for train; default that of the run")
    text_column: str | None = Field(None, description="column of the text in tables; default that of the run, or text")
    val_fraction: float | None = Field(
        None, gt=0, lt=1, description="share of the text, at its end, that is the val split; default the run's, or 0.1"
    )
    seq_len: int | None = Field(None, ge=2, description="tokens of a window, default as the model was trained")
    calibration_tokens: int = Field(
        8192, ge=0, description="tokens of the train split that low-rank and fitted parts are fitted to; 0: noise"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:N, mps or auto: a GPU where there is one")

    def contradictions(self) -> Iterable[tuple[tuple[str, ...], str]]:
        if self.attention is None and self.ffn is None:
            yield ("attention", "ffn"), "nothing to put in: give --attention, --ffn or both, as --ffn 'vft(rank=16)'"
        if self.out is not None and self.out.is_file():
            yield ("out",), f"out: {self.out} is a file; choose a folder"
        elif self.out is not None and self.out.is_dir() and any(self.out.iterdir()):
            yield ("out",), f"out: {self.out} exists and is not empty; choose another folder"


@dataclass(frozen=True)
class SwapPlan:
    """What would become of a model: its line and size before and after."""

    line_before: str
    line_after: str
    params_before: int
    params_after: int

    def __str__(self) -> str:
        change = self.params_after / self.params_before - 1
        return (
            f"before  {self.params_before:,} parameters  {self.line_before}\n"
            f"after   {self.params_after:,} parameters ({100 * change:+.1f} %)  {self.line_after}"
        )

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class SwapResult:
    """A swapped model: its plan, the validation loss before and after (nats a token), and what each part began from."""

    plan: SwapPlan
    loss_before: float
    loss_after: float
    n_tokens: int
    data: str
    parts: tuple[Swapped, ...]
    out: Path

    def __str__(self) -> str:
        lines = []
        for part in self.parts:
            lines.append(f"layer {part.layer}  {part.family}: {part.old} → {part.new}, from {part.start}")
        lines.append(str(self.plan))
        lines.append(
            f"validation loss {self.loss_before:.4f} → {self.loss_after:.4f} nats a token, "
            f"over {self.n_tokens:,} tokens of {self.data}"
        )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            **self.plan.as_json(),
            "val_loss_before": self.loss_before,
            "val_loss_after": self.loss_after,
            "n_tokens": self.n_tokens,
            "data": self.data,
            "parts": [dict(vars(part)) for part in self.parts],
            "out": str(self.out),
        }


def plan_swap(folder: Path | str, settings: SwapSettings) -> SwapPlan:
    """What `swap_saved` would make of the model in `folder`; reads no weights. Raises as that does."""
    before = saved_spec(folder)
    return _plan(before, swapped_spec(before, settings.attention, settings.ffn, layers=settings.layers))


def swap_saved(folder: Path | str, settings: SwapSettings) -> SwapResult:
    """Load a model or run, put the mechanisms in, measure both on the whole validation split, save the new one.

    The new folder holds the model and its tokenizer. Raises `FormatError` (no model there), `SpecError` (a mechanism or
    layers that do not fit), `SettingsError`, `DataError` and `WriteError`.
    """
    from headwise.data import load_dataset, load_tokenizer

    if settings.out is None:
        raise SettingsError("out: give a folder for the new model")
    folder = Path(folder)
    plan_swap(folder, settings)  # what does not fit is said before anything heavy
    model = load(folder, device=resolve_device(settings.device))
    source = _data_of(folder, settings)
    dataset = load_dataset(
        source.data,
        load_tokenizer(folder),
        text_column=source.text_column,
        val_fraction=source.val_fraction,
    )
    ids_BT = _calibration(dataset, settings.seq_len or model.spec.dims.max_seq_len, settings.calibration_tokens)
    if ids_BT is not None:
        ids_BT = ids_BT.to(next(model.parameters()).device)
    new, parts = swap_parts(model, settings.attention, settings.ffn, layers=settings.layers, calibration=ids_BT)
    before, after = (evaluate(each, dataset.val, seq_len=settings.seq_len) for each in (model, new))
    save_pretrained(new, settings.out, dataset.tokenizer)
    write_json(settings.out / SWAP, {"from": str(folder.absolute())})
    return SwapResult(
        _plan(model.spec, new.spec), before.nats, after.nats, after.n_tokens, dataset.name, tuple(parts), settings.out
    )


def _plan(before: ModelSpec, after: ModelSpec) -> SwapPlan:
    return SwapPlan(str(before), str(after), count(before).params, count(after).params)


def _data_of(folder: Path, settings: SwapSettings) -> TrainSettings:
    """The data of the run, as far as the settings do not say otherwise; a saved model does not know its own."""
    run = RunFolder(folder)
    held = run.settings() if run.run_json.exists() else TrainSettings.model_validate({})
    given = {name: getattr(settings, name) for name in ("data", "text_column", "val_fraction")}
    return held.model_copy(update={name: value for name, value in given.items() if value is not None})


def _calibration(dataset: Dataset, seq_len: int, n_tokens: int) -> Tensor | None:
    """Windows spread evenly over the train split, int64 [B,T]; None where there are to be none."""
    tokens = dataset.train.array
    if not n_tokens or len(tokens) < seq_len:
        return None
    rows = max(1, n_tokens // seq_len)
    last = len(tokens) - seq_len
    starts = sorted({last * i // max(1, rows - 1) for i in range(rows)})
    return torch.tensor([[int(i) for i in tokens[start : start + seq_len]] for start in starts])
