"""Everything that can be chosen about a training run. A field's name is its keyword argument and its flag."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import ErrorDetails

from headwise.errors import SettingsError, one_of


class Settings(BaseModel):
    """A frozen set of settings whose every mistake is reported at once, as one `SettingsError`.

    Subclasses state their fields, and in `contradictions` the rules that tie several fields together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def contradictions(self) -> Iterable[tuple[tuple[str, ...], str]]:
        """The fields that do not go together, and why; a rule is silent when one of its fields is wrong by itself."""
        return ()

    @model_validator(mode="wrap")
    @classmethod
    def _all_problems(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            made, problems, wrong = handler(values), [], set()
        except ValidationError as error:
            details = error.errors(include_url=False)
            problems = [cls._describe(detail) for detail in details]
            wrong = {str(detail["loc"][0]) for detail in details if detail["loc"]}
            if not isinstance(values, dict):
                raise SettingsError(problems) from None
            made = handler({name: value for name, value in values.items() if name not in wrong})
        problems += [text for fields, text in made.contradictions() if not wrong.intersection(fields)]
        if problems:
            raise SettingsError(problems)
        return made

    @classmethod
    def _describe(cls, detail: ErrorDetails) -> str:
        name = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            return one_of(name, cls.model_fields, "setting")
        if detail["type"] == "missing":  # an item of a list or pair
            name, given = name.rpartition(".")[0], detail["input"]
            return f"{name}: given {given!r}, too few values"
        message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
        return f"{name}: given {detail['input']!r}, {message}"


class TrainSettings(Settings):
    """How one model is trained. The defaults suit a model of about one million parameters on a CPU."""

    data: str = Field("shakespeare", description="shakespeare, a text file, folder, .jsonl, .parquet or hf:owner/name")
    text_column: str = Field("text", description="column that holds the text in .jsonl, .parquet and hf: data")
    val_fraction: float = Field(0.1, gt=0, lt=1, description="share of the text, at its end, kept for validation")
    tokenizer: str = Field("char", description="char, byte, bpe, bpe:VOCAB or a folder with tokenizer.json")
    out: Path | None = Field(None, description="folder of the run; without one nothing is written")
    init_from: Path | None = Field(
        None, description="a saved model or run of the same line to start from, with its tokenizer unless one is given"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of initial values, batch order and dropout")
    size: str | None = Field(None, description="parameters of a line without widths; default 1m on a CPU, 10m on a GPU")
    seq_len: int = Field(64, ge=2, description="tokens of one training sequence")
    batch_size: int = Field(12, ge=1, description="sequences in one forward pass")
    accumulate: int = Field(1, ge=1, description="forward passes whose gradients make one update")
    steps: int = Field(300, ge=1, description="updates of the parameters")
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False, description="highest learning rate")
    min_lr: float | None = Field(None, ge=0, allow_inf_nan=False, description="last learning rate; default lr / 10")
    warmup: int | None = Field(None, ge=0, description="updates of linear warm-up; default a twentieth of steps")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine", description="course of the learning rate after warm-up; wsd: constant, then linear to min_lr"
    )
    decay_fraction: float = Field(0.2, gt=0, le=1, description="share of steps in which the wsd schedule decays")
    betas: tuple[float, float] = Field((0.9, 0.99), description="AdamW's decay rates of the two moments")
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False, description="AdamW's decay, of matrices only")
    clip: float = Field(1.0, ge=0, allow_inf_nan=False, description="largest norm of the gradients; 0: no clipping")
    lr_multipliers: dict[str, float] = Field(
        default_factory=dict, description="factors of the learning rate by name pattern, as {'*.vein.*': 0.1}"
    )
    vein_lr: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="learning rate of the vein's parameters as a share of lr, as 0.2"
    )
    vein_freeze: int = Field(0, ge=0, description="updates at the start in which the vein stays as it is")
    tau_schedule: tuple[float, ...] = Field(
        (), description="thresholds of the normal compensation, one after another over the run, as 0.25,0.18,0.10"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="precision of matrix products (autocast; parameters stay float32); float16 needs a GPU"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:N, mps or auto: a GPU where there is one")
    compile: bool = Field(False, description="compile the model with torch.compile")
    activation_checkpointing: bool = Field(
        False, description="recompute each block in the backward pass: less memory, about a third more time"
    )
    deterministic: bool = Field(True, description="deterministic GPU kernels, so that a run repeats bit by bit")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; default torch's own choice")
    log_every: int = Field(10, ge=1, description="updates between two records of metrics.jsonl")
    eval_every: int = Field(
        1000, ge=0, description="updates between evaluations of the whole validation split; 0: only at the end"
    )
    checkpoint_every: int = Field(500, ge=0, description="updates between checkpoints; 0: only at the end")
    tensorboard: bool = Field(False, description="also write OUT/tensorboard (extra: tensorboard)")

    def contradictions(self) -> Iterable[tuple[tuple[str, ...], str]]:
        if self.warmup is not None and self.warmup > self.steps:
            yield ("warmup", "steps"), f"warmup: {self.warmup} is more than steps={self.steps}; warm up for fewer"
        if self.min_lr is not None and self.min_lr > self.lr:
            yield (
                ("min_lr", "lr"),
                f"min_lr: {self.min_lr:g} is more than lr={self.lr:g}; and the schedule ends there",
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            yield ("betas",), f"betas: given {self.betas}, both should be at least 0 and less than 1"
        if bad := {
            pattern: factor for pattern, factor in self.lr_multipliers.items() if not 0 <= factor < float("inf")
        }:
            yield ("lr_multipliers",), f"lr_multipliers: given {bad}, factors should be finite and not negative"
        if bad_tau := [tau for tau in self.tau_schedule if not 0 <= tau < float("inf")]:
            yield ("tau_schedule",), f"tau_schedule: given {bad_tau}, thresholds should be finite and not negative"
        if len(self.tau_schedule) > self.steps:
            yield (
                ("tau_schedule", "steps"),
                f"tau_schedule: {len(self.tau_schedule)} values are more than steps={self.steps}; give fewer",
            )
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            yield ("device",), f"device: given {self.device!r}, should be auto, cpu, cuda, cuda:N or mps"
        if self.dtype == "float16" and self.device == "cpu":
            yield ("dtype", "device"), "dtype: float16 needs a GPU; on the CPU use bfloat16 or float32"
        if self.tensorboard and self.out is None:
            yield ("tensorboard", "out"), "tensorboard: needs out, the folder to write to"

    @property
    def final_lr(self) -> float:
        """The learning rate the schedule ends with: `min_lr`, by default a tenth of `lr`."""
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def warmup_steps(self) -> int:
        """Updates of warm-up: `warmup`, by default a twentieth of `steps`."""
        return self.steps // 20 if self.warmup is None else self.warmup

    def differences(self, other: TrainSettings) -> list[str]:
        """What another run would do differently, a line a field; where the run lies and how it reports do not count."""
        silent = {"out", "threads", "tensorboard", "device"}
        return [
            f"{name}={getattr(other, name)!r} (was {getattr(self, name)!r})"
            for name in type(self).model_fields
            if name not in silent and getattr(self, name) != getattr(other, name)
        ]
