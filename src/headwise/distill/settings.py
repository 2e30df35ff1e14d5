"""Everything that can be chosen about a distillation: training's settings, the teacher, and what is learned from it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import CliSuppress, NoDecode

from headwise.train.settings import TrainSettings

Projection = Literal["none", "flat", "structured"]
# Fields that only say where a run lies, how it reports or where copies are kept: they change no number of it.
SILENT = frozenset({"run_name", "cache_dir"})
# What a recipe sets where nothing else was asked for.
PRESETS: dict[str, dict[str, Any]] = {
    "kv": {},
    "heal": {"projection": "none", "hidden": 0.3, "logit_kd": (1.0, 2.0)},
    "lolcats": {"projection": "none", "stages": (0.5, 0.5)},
    "mohawk": {"projection": "none", "stages": (0.2, 0.3, 0.5), "logit_kd": (1.0, 1.0)},
}


def _models(value: Any) -> Any:
    """One or several in a text, between commas that stand in no brackets: lines have commas of their own."""
    if isinstance(value, Path):
        return (str(value),)
    if not isinstance(value, str):
        return value
    pieces, depth = [""], 0
    for sign in value:
        depth += (sign == "(") - (sign == ")")
        if sign == "," and not depth:
            pieces.append("")
        else:
            pieces[-1] += sign
    return tuple(piece.strip() for piece in pieces if piece.strip())


def _weights(value: Any) -> Any:
    """ "router", or "1,0.5"."""
    if not isinstance(value, str) or value == "router":
        return value
    try:
        return tuple(float(item) for item in value.strip("[] ").split(",") if item.strip())
    except ValueError:
        raise ValueError("should be numbers such as 1,0.5, one a teacher, or router") from None


def _pair(value: Any) -> Any:
    """ "2,0.5"."""
    try:
        return tuple(float(item) for item in value.strip("[]() ").split(",")) if isinstance(value, str) else value
    except ValueError:
        raise ValueError("should be a temperature and a weight, as 2,0.5") from None


class DistillSettings(TrainSettings):
    """How a student is distilled. Document 004's spellings are in the command line's aliases (`cli/distill.py`)."""

    teacher: Annotated[tuple[str, ...], BeforeValidator(_models), NoDecode] = Field(
        (), description="what to learn from: a folder, a .gguf file or a line (untrained); several: one --teacher each"
    )
    init_from: CliSuppress[Path | None] = Field(
        None, description="not for a distillation: give a folder as the student"
    )
    student: str | None = Field(None, description="what learns: a line, or the folder of a model to start from")
    recipe: Literal["kv", "lolcats", "mohawk", "heal"] = Field(
        "kv", description="what is matched, in which order; sets what is not set by other flags"
    )
    projection: Projection = Field(
        "structured", description="how the teacher's keys and values are brought to the student's shape; none: not used"
    )
    share_dim_proj: bool = Field(True, description="(structured) one projection of widths for all heads")
    init_uniform: bool = Field(True, description="(structured) the head map starts as the average of groups of heads")
    freeze_projector: bool = Field(False, description="the projector stays as it starts, so that it cannot collapse")
    mlp_ratio: int = Field(4, ge=0, description="(flat) hidden width of the projector's MLP; 0: none")
    use_elastic: bool = Field(False, description="(flat) nested widths in the projector's MLP")
    projector_dropout: float = Field(0.0, ge=0, lt=1, description="(flat) dropout in the projector's MLP")
    side: Literal["teacher", "student"] = Field("teacher", description="whose tensors the projector maps to the other")
    layer_map: Literal["ratio", "uniform", "skip", "learned", "cka"] = Field(
        "ratio", description="which teacher layers a student layer learns from"
    )
    rope: Literal["unrotate", "asis"] = Field(
        "unrotate", description="keys are compared before or after positions are worked in"
    )
    lambda_task: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="weight of the text's own loss; 0: the teacher's alone"
    )
    lambda_kv: float = Field(0.5, ge=0, allow_inf_nan=False, description="weight of the loss of keys and values")
    kv_loss: Literal["mse", "cosine", "smooth_l1"] = Field("mse", description="how keys and values are compared")
    structural_loss: bool = Field(False, description="also compare the attention that queries and keys make")
    lambda_struct: float = Field(0.1, ge=0, allow_inf_nan=False, description="weight of the structural loss")
    logit_kd: Annotated[tuple[float, float] | None, BeforeValidator(_pair), NoDecode] = Field(
        None, description="temperature and weight of the loss between the two models' predictions, as 2,0.5"
    )
    hidden: float = Field(0.0, ge=0, allow_inf_nan=False, description="weight of the loss of the layers' outputs")
    teacher_weights: Annotated[tuple[float, ...] | Literal["router"], BeforeValidator(_weights), NoDecode] = Field(
        (), description="shares of several teachers, as 2,1, or router: learned from the prompt; default equal"
    )
    align: Literal["none", "spans"] = Field(
        "none", description="spans: a teacher with another tokenizer is aligned by the characters that tokens cover"
    )
    tokenizer: str = Field(
        "teacher", description="teacher: that of a student folder, else the first teacher's; or as for train"
    )
    format: Literal["auto", "gsm8k", "chat", "marks", "text"] = Field(
        "auto", description="what the data's lines are; auto looks at them"
    )
    train_limit: int | None = Field(
        None, ge=1, description="examples of the training split, the first ones; not for text"
    )
    val_limit: int | None = Field(
        None, ge=1, description="examples of the validation split, the first ones; not for text"
    )
    loss_on: Literal["all", "completion"] = Field("all", description="completion: prompts are read and not predicted")
    cache_teacher: bool = Field(False, description="keep what the teacher makes of the data on disk, computed once")
    cache_dtype: Literal["bfloat16", "int8", "float32"] = Field(
        "bfloat16", description="numbers of the teacher's cache"
    )
    cache_dir: Path | None = Field(None, description="folder of the teacher's cache; default one by teacher and data")
    stages: Annotated[tuple[float, ...], NoDecode, BeforeValidator(_weights)] = Field(
        (), description="shares of the steps of a recipe's stages, as 0.2,0.3,0.5"
    )
    lora_rank: int = Field(8, ge=1, description="(lolcats) rank of the low-rank updates of its last stage")
    measure_rows: int = Field(
        16, ge=0, description="validation sequences that cosine and CKA are measured on at each evaluation; 0: none"
    )
    epochs: float | None = Field(None, gt=0, allow_inf_nan=False, description="passes over the data, in place of steps")
    run_name: str | None = Field(None, description="a name for reports")

    def contradictions(self) -> Iterable[tuple[tuple[str, ...], str]]:
        for fields, text in super().contradictions():
            if not (self.epochs is not None and "steps" in fields):  # their number is known once the data are read
                yield fields, text
        if self.epochs is not None and "steps" in self.model_fields_set:
            yield ("epochs", "steps"), f"epochs: {self.epochs:g} and steps={self.steps} exclude each other; give one"
        if not self.teacher and self.recipe == "kv":  # the others take the model before the swap
            yield ("teacher",), "teacher: none given; a model's folder, a .gguf file or a line, as runs/teacher"
        if self.student is None:
            yield ("student",), "student: none given; a line such as 'llama(attention=gqa(kv_heads=2))', or a folder"
        if self.init_from is not None:
            yield ("init_from",), f"init_from: give the folder as the student, as --student {self.init_from}"
        if self.compile:
            yield ("compile",), "compile: what is compared lies inside the layers; distillation runs without it"
        yield from self._about_teachers()
        yield from self._about_losses()

    def _about_teachers(self) -> Iterable[tuple[tuple[str, ...], str]]:
        weights, n = self.teacher_weights, len(self.teacher)
        if isinstance(weights, tuple) and weights:
            if len(weights) != n:
                yield (
                    ("teacher_weights", "teacher"),
                    f"teacher_weights: {len(weights)} given for {n} teacher{'s' * (n != 1)}; one each",
                )
            if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights):
                yield (
                    ("teacher_weights",),
                    f"teacher_weights: given {weights}, should be finite, none negative, not all 0",
                )
        if weights == "router" and n == 1:
            yield ("teacher_weights", "teacher"), "teacher_weights: a router chooses among teachers; give two or more"
        if self.cache_dir is not None and not self.cache_teacher:
            yield ("cache_dir", "cache_teacher"), "cache_dir: nothing is cached without cache_teacher; give both"
        if self.cache_dir is not None and n > 1:
            yield ("cache_dir", "teacher"), "cache_dir: one folder holds one teacher; leave it out for several"
        if self.side == "student" and self.align == "spans":
            yield (
                ("side", "align"),
                "side: student is for tokens that are the teacher's; with align=spans choose teacher",
            )
        if self.recipe != "kv" and n > 1:
            yield ("recipe", "teacher"), f"recipe: {self.recipe} follows one teacher; {n} given"

    def _about_losses(self) -> Iterable[tuple[tuple[str, ...], str]]:
        if self.logit_kd is not None and not (
            0 < self.logit_kd[0] < float("inf") and 0 <= self.logit_kd[1] < float("inf")
        ):
            yield (
                ("logit_kd",),
                f"logit_kd: given {self.logit_kd}, a temperature more than 0 and a weight of at least 0",
            )
        if self.structural_loss and self.projection == "none":
            yield (
                ("structural_loss", "projection"),
                "structural_loss: compares projected caches; choose projection structured or flat",
            )
        n_stages = {"lolcats": 2, "mohawk": 3}.get(self.recipe, 1)
        if self.stages and len(self.stages) != n_stages:
            yield ("stages", "recipe"), f"stages: {len(self.stages)} shares given, {self.recipe} has {n_stages}"
        if not all(0 <= share < float("inf") for share in self.stages) or (self.stages and not sum(self.stages)):
            yield ("stages",), f"stages: given {self.stages}, shares should be finite, none negative, not all 0"
        if n_stages > 1 and self.vein_freeze:
            yield (
                ("recipe", "vein_freeze"),
                f"vein_freeze: {self.recipe} says what is trained when; leave it out",
            )
        if n_stages > 1 and self.cache_teacher:
            yield (
                ("recipe", "cache_teacher"),
                f"cache_teacher: {self.recipe} shows the student's layers the states of a live teacher; leave it out",
            )

    def with_recipe(self) -> DistillSettings:
        """The settings with what the recipe sets and nobody else did."""
        preset = {name: value for name, value in PRESETS[self.recipe].items() if name not in self.model_fields_set}
        return self.model_copy(update=preset)

    @property
    def uses_cache(self) -> bool:
        """Whether keys and values are compared in training."""
        return self.projection != "none" and (self.lambda_kv > 0 or self.structural_loss)

    def differences(self, other: TrainSettings) -> list[str]:
        return [text for text in super().differences(other) if text.partition("=")[0] not in SILENT]
