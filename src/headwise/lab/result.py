"""What a comparison hands back: `result.json` as pydantic models, and the raw records it is summarised from.

Inputs (made by the runner): `VariantInfo`, `RunRecord`, `Measurements`, `Setup`. `headwise.lab.summary.summarise` turns
them into a `CompareResult`, a pure function. The file format is described field by field in docs/result-schema.md.

Losses are nats a token, times are seconds, sizes are bytes. What could not be measured is None (null), never NaN.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from headwise.errors import FormatError

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 1

Verdict = Literal["better", "worse", "equivalent", "undecided"]
Interval = tuple[FiniteFloat, FiniteFloat]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Open(BaseModel):
    """Descriptions that may carry more than the named fields (a GPU's name, a data set's revision)."""

    model_config = ConfigDict(extra="allow")


# --- what the runner records ------------------------------------------------------------------------------------------


class Series(_Model):
    """A loss against the optimiser step: `loss[i]` was measured after `step[i]` updates."""

    step: list[int] = []
    loss: list[float] = []


class LrTrial(_Model):
    """One learning rate tried on the tuning seeds (which never enter the verdict)."""

    lr: FiniteFloat
    val_loss: FiniteFloat | None = Field(None, description="mean over the tuning seeds; None where a run failed")
    per_seed: list[FiniteFloat | None] = []
    seeds: list[int] = []


class VariantInfo(_Model):
    """One line of the comparison, before any run. The first one is the baseline."""

    line: str = Field(description="as typed")
    resolved: str = Field(description="every dimension written out, the matched width among them")
    params: int
    flops_per_token: float = Field(description="forward FLOPs a token at the comparison's context length")
    params_by_part: dict[str, int] = {}
    train_flops_per_token: float | None = None
    kv_bytes_per_token: float | None = None
    match_note: str = Field("", description="what was adjusted to match the baseline, as a sentence; '' if nothing")
    match_off: float | None = Field(None, description="(variant − baseline) / baseline of the matched quantity")
    match_reached: bool = Field(True, description="False where the match is further off than it should be")
    steps: int | None = Field(None, description="optimiser steps of each run (match=time and =flops may change them)")
    lr: float | None = Field(None, description="the learning rate of the counted runs")
    lr_grid: list[LrTrial] = []


class RunRecord(_Model):
    """One counted training run. A run that failed has `error`; a loss that is not finite counts as failed as well."""

    variant: int = Field(description="index into the list of VariantInfo")
    seed: int
    val_loss: float | None = Field(None, description="nats a token over the whole validation split")
    bits_per_byte: float | None = None
    train_curve: Series = Series()
    val_curve: Series = Series()
    eps: dict[str, Series] = Field(
        default_factory=dict, description="mean ε of each vein, by its module's name; values stand in `loss`"
    )
    seconds: float | None = None
    error: str | None = None


class Measurements(_Model):
    """Speed and memory of one variant, one entry a round; round i of all variants ran next to one another."""

    train_tokens_per_s: list[float] = []
    decode_tokens_per_s: list[float] = []
    peak_memory_bytes: list[float] = []


class DatasetInfo(_Open):
    name: str
    fingerprint: str = ""
    tokenizer: str = ""
    vocab_size: int | None = None
    n_train_tokens: int | None = None
    n_val_tokens: int | None = None


class Environment(_Open):
    headwise: str = ""
    python: str = ""
    torch: str = ""
    cpu: str = ""
    cores: int | None = None
    os: str = ""
    device: str = ""


class Setup(_Model):
    """Everything about a comparison that is not a measurement; part of `CompareResult` as it stands."""

    seeds: list[int]
    dataset: DatasetInfo
    environment: Environment = Environment()
    settings: dict[str, Any] = Field({}, description="every setting of the comparison, JSON values only")
    command: str = Field("", description="the shell command that repeats this comparison")
    objective: str = "causal language modelling"
    match: str = "params"
    margin: Annotated[float, Field(ge=0)] = 0.005
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    finished_at: str | None = Field(None, description="ISO 8601, UTC")
    wall_seconds: float | None = None


# --- the result -------------------------------------------------------------------------------------------------------


class Loss(_Model):
    """A loss over seeds. `per_seed` is in the order of the result's `seeds`, None where the run failed."""

    mean: FiniteFloat | None
    ci95: Interval | None = Field(description="t-interval of the mean; None with fewer than two finished seeds")
    per_seed: list[FiniteFloat | None]


class Diff(_Model):
    """Variant − baseline, paired by seed; negative is better. See headwise.lab.stats for every definition."""

    n: int = Field(description="pairs: seeds both finished")
    mean: FiniteFloat | None
    ci95: Interval | None
    relative: FiniteFloat | None = Field(description="mean / the baseline's mean loss")
    p: FiniteFloat | None = Field(description="paired t-test, two-sided, uncorrected")
    p_holm: FiniteFloat | None
    p_equivalent: FiniteFloat | None = Field(description="TOST within ±margin, Holm-corrected")
    effect_size: FiniteFloat | None = Field(description="Cohen's d_z with Hedges' correction")
    min_detectable: FiniteFloat | None = Field(description="nats; the difference this run sees with 80 % power")
    verdict: Verdict
    seeds_needed: int | None = Field(None, description="for 'undecided': about how many seeds more")
    seeds_capped: bool = Field(False, description="True: seeds_needed is a cap, the real number is larger")


class Ratio(_Model):
    """A ratio to the baseline: the median over rounds and its 95 % interval (None with a single round)."""

    ratio: FiniteFloat
    lo: FiniteFloat | None
    hi: FiniteFloat | None


class Ratios(_Model):
    train: Ratio | None = None
    decode: Ratio | None = None
    memory: Ratio | None = None


class Curve(_Model):
    """The losses of one run, and what its veins lose, thinned to at most 200 points."""

    seed: int
    train: Series
    val: Series
    eps: dict[str, Series] = Field(
        default_factory=dict, description="mean ε of each vein, by its module's name; values stand in `loss`"
    )


class FailedRun(_Model):
    line: str
    label: str
    seed: int
    error: str


class VariantResult(_Model):
    """One line's outcome. The first is the baseline: its `diff` is None and its ratios are 1."""

    line: str
    label: str = Field(description="short and unique within the comparison")
    resolved: str
    params: int
    flops_per_token: float
    params_by_part: dict[str, int]
    train_flops_per_token: float | None
    kv_bytes_per_token: float | None
    match_note: str
    match_off: float | None
    match_reached: bool
    steps: int | None
    lr: float | None
    lr_grid: list[LrTrial]
    val_loss: Loss
    bits_per_byte: Loss
    diff: Diff | None
    train_tokens_per_s: FiniteFloat | None
    decode_tokens_per_s: FiniteFloat | None
    peak_memory_bytes: FiniteFloat | None
    ratios: Ratios
    seconds: list[FiniteFloat | None] = Field(description="training time of each seed's run")
    curves: list[Curve]


class _Version(_Open):
    schema_version: int = SCHEMA_VERSION


class CompareResult(Setup):
    """A finished comparison. In a notebook it shows itself as a table."""

    schema_version: int = SCHEMA_VERSION
    baseline: str
    margin_nats: FiniteFloat | None = Field(description="margin × the baseline's mean loss")
    variants: list[VariantResult]
    failed_runs: list[FailedRun] = []

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read `result.json`, given itself or its folder. FormatError: missing, malformed or of a newer schema."""
        path = Path(path)
        if path.is_dir():
            path = path / "result.json"
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise FormatError(
                f"{path}: no such file; give the --out of a finished comparison, "
                f"or finish one that was stopped: headwise resume {path.parent}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"{path}: cannot be read ({error})") from None
        try:
            # The version alone first: a newer file may have fields that mean nothing here.
            schema = _Version.model_validate_json(text).schema_version
            if schema > SCHEMA_VERSION:
                raise FormatError(f"{path}: has schema {schema}, this headwise reads {SCHEMA_VERSION}; update headwise")
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise FormatError(f"{path}: not a comparison's result: {where}: {first['msg']}") from None

    def save(self, path: str | Path) -> Path:
        """Write JSON, whole or not at all, to a file ending in .json or to `result.json` in any other path."""
        from headwise.io.atomic import write_json

        path = Path(path)
        if path.suffix != ".json":
            path = path / "result.json"
        write_json(path, self.model_dump(mode="json"))
        return path

    def to_csv(self, path: str | Path) -> Path:
        """Write one row a variant, the losses of the seeds in columns of their own, whole or not at all."""
        from headwise.io.atomic import write_text
        from headwise.lab.render import csv_text

        path = Path(path)
        write_text(path, csv_text(self))
        return path

    def verdict_lines(self) -> list[str]:
        """One plain sentence a variant, in the order of the lines."""
        from headwise.lab.render import sentence

        return [sentence(self, variant) for variant in self.variants[1:]]

    def _repr_html_(self) -> str:
        from headwise.lab.render import notebook_html

        return notebook_html(self)


def render_table(result: CompareResult) -> Table:
    """The result as a rich table for the terminal."""
    from headwise.lab.render import rich_table

    return rich_table(result)
