"""What an A/B of distillation hands back: a comparison whose lines are arms, with what only a distillation has.

`ABResult` is a `CompareResult`: `variants` are the arms, judged by their validation loss, and `result.json` has every
field described in docs/result-schema.md. Beside each variant stands an `ArmResult`: how alike student and projected
teacher are, layer by layer, with the control against shuffled teachers; loss by part; steps to the baseline's loss.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from headwise.lab.result import CompareResult, Diff, Loss, RunRecord, Series

# What is measured of student and teacher: of keys (k), of values (v), and of what recurrent layers put out, which keep
# neither. Cosines are with the projected teacher; CKA is with the teacher's own, before any projector.
COSINES = ("cosine_k", "cosine_v", "cosine_output")
CKAS = ("cka_k", "cka_v", "cka_output")
MEASURES = (*COSINES, *CKAS)
SHUFFLED = "_shuffled"

Collapse = Literal["collapsed", "mostly", "no", "unlike"]
Layers = list[FiniteFloat | None]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Likeness(_Model):
    """One measure of one run: a figure a layer at the end, and its mean over layers at every evaluation."""

    layers: list[float | None] = []
    course: Series = Series()


class DistillRecord(RunRecord):
    """One finished or failed run of an arm. `likeness` holds MEASURES, and each with `_shuffled` behind its name."""

    val_loss_by_part: dict[str, float] = Field(default_factory=dict)
    likeness: dict[str, Likeness] = Field(default_factory=dict)
    aligner_params: int = 0
    tokens_per_s: float | None = None


class Alignment(_Model):
    """One measure over all seeds of an arm, against its own teacher and against shuffled ones.

    `layers`, `shuffled_layers`: means over seeds, one a layer (None where a layer has no such thing). `per_seed`,
    `shuffled_per_seed`: means over layers, in the order of the result's seeds. `course`, `shuffled_course`: means over
    layers and seeds against the step.
    """

    layers: Layers
    shuffled_layers: Layers
    per_seed: Layers
    shuffled_per_seed: Layers
    course: Series = Series()
    shuffled_course: Series = Series()

    @property
    def mean(self) -> float | None:
        return _mean(self.per_seed)

    @property
    def shuffled(self) -> float | None:
        return _mean(self.shuffled_per_seed)

    @property
    def gaps(self) -> list[float | None]:
        """Own minus shuffled, a seed each: what of the likeness depends on the text at all."""
        return [
            None if own is None or other is None else own - other
            for own, other in zip(self.per_seed, self.shuffled_per_seed, strict=True)
        ]

    @property
    def gap(self) -> float | None:
        return _mean(self.gaps)


class Reach(_Model):
    """Steps until an arm's validation loss is down at the baseline's last one of the same seed; None: never."""

    per_seed: list[FiniteFloat | None]
    n_reached: int
    n_pairs: int
    mean: FiniteFloat | None = Field(description="over the seeds that reached it")


class ArmResult(_Model):
    """What only a distillation tells of an arm; its losses stand in the variant of the same place."""

    arm: str
    settings: dict[str, Any] = Field(description="what is set for this arm alone")
    command: str = Field("", description="the shell command that makes this arm's run with the first seed")
    aligner_params: int
    tokens_per_s: FiniteFloat | None
    val_loss_by_part: dict[str, Loss]
    train_loss: Loss = Field(description="the task's loss, mean over the whole training: lower is a faster fall")
    steps_to_baseline: Reach
    alignment: dict[str, Alignment]
    collapse: Collapse | None = Field(
        description="whether the cosine is there with shuffled teachers too; None where it was not measured"
    )


class Contrast(_Model):
    """Two arms that differ in one thing: `arm` minus `against`, paired by seed. `gap` is of the cosine's gap."""

    question: str
    arm: str
    against: str
    diff: Diff
    train_diff: Diff
    gap: Loss | None = Field(None, description="difference of own − shuffled cosine, keys and values; more is better")


class ABResult(CompareResult):
    """A finished A/B. In a notebook it shows itself as a table."""

    teacher: list[str]
    student: str
    arms: list[ArmResult]
    contrasts: list[Contrast]
    conditions: str = Field("", description="what is equal for all arms, as a sentence")
    notes: list[str] = Field([], description="what a reader must know of how the runs came about, as sentences")

    def arm(self, name: str) -> ArmResult:
        """What the arm of this name reached. KeyError: there is none."""
        return {each.arm: each for each in self.arms}[name]


def _mean(values: Layers) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
