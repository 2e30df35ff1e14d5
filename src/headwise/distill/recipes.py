"""Recipes: which losses train which weights, in which order. All are stages of one run.

* `kv` (document 004): one stage; the text's loss, and beside it that of keys and values.
* `heal`: one stage, after `headwise swap`; hidden states and predictions of the model before the swap.
* `lolcats` (LoLCATs, arXiv:2410.10254): attention transfer, which trains the attention alone, layer by layer, on the
  teacher's states; then low-rank updates of its maps on the text.
* `mohawk` (MOHAWK, arXiv:2408.10189): matrix mixing and hidden states, which train the attention alone, layer by layer;
  then all of the student on the teacher's predictions and the text.

Learning rate and warm-up begin anew with each stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from headwise.distill.mixing import attention_transfer, block_alignment, matrix_mixing
from headwise.train.schedules import Schedule, make_schedule

if TYPE_CHECKING:
    from headwise.distill.settings import DistillSettings
    from headwise.model.base import LanguageModel

Layerwise = Literal["transfer", "mixing", "blocks"]
# What each loss between layers wants of the teacher.
SIGNALS: dict[Layerwise, frozenset[str]] = {
    "transfer": frozenset({"inputs", "outputs"}),
    "mixing": frozenset({"inputs"}),
    "blocks": frozenset({"inputs", "hidden"}),
}
_STAGES: dict[str, tuple[tuple[Layerwise | None, str], ...]] = {
    "kv": ((None, "all"),),
    "heal": ((None, "all"),),
    "lolcats": (("transfer", "attention"), (None, "lora")),
    "mohawk": (("mixing", "attention"), ("blocks", "attention"), (None, "all")),
}


@dataclass(frozen=True)
class Stage:
    """Updates `first` … `last` − 1. `layerwise`: the loss between layers that alone is minimised; None: the settings'
    losses. `trains`: all, attention or lora."""

    layerwise: Layerwise | None
    trains: str
    first: int
    last: int

    def free(self, student: nn.Module) -> None:
        """Give a gradient to the weights that this stage trains, and to no others."""
        for name, parameter in student.named_parameters():
            update = is_update(name)
            wanted = {"all": True, "attention": ".attention." in name and not update, "lora": update}[self.trains]
            parameter.requires_grad_(wanted)


def stages_of(settings: DistillSettings) -> list[Stage]:
    """The recipe's stages, which fill all steps; one that is too short to have a step is left out."""
    kinds = _STAGES[settings.recipe]
    shares = settings.stages or (1.0,) * len(kinds)
    ends = [round(settings.steps * reached / sum(shares)) for reached in accumulate(shares)]
    made = [Stage(*kind, first, last) for kind, first, last in zip(kinds, [0, *ends], ends)]
    return [stage for stage in made if stage.last > stage.first]


def has_updates(settings: DistillSettings) -> bool:
    """Whether the recipe trains low-rank updates."""
    return any(trains == "lora" for _, trains in _STAGES[settings.recipe])


def is_update(name: str) -> bool:
    """Whether a parameter is one of a low-rank update's (`lora.py`)."""
    return name.endswith((".a_rI", ".b_Or"))


def staged_schedule(settings: DistillSettings, stages: Sequence[Stage]) -> Schedule:
    """The learning rate of every update, each stage with a course of its own."""
    rates = []
    for stage in stages:
        steps = stage.last - stage.first
        warmup = None if settings.warmup is None else min(settings.warmup, steps)
        rates.append(make_schedule(settings.model_copy(update={"steps": steps, "warmup": warmup})))

    def rate(step: int) -> float:
        for stage, own in zip(stages, rates):
            if step < stage.last:
                return own(step - stage.first)
        return rates[-1](step - stages[-1].first)

    return rate


def layerwise_loss(
    kind: Layerwise, student: LanguageModel, teacher: LanguageModel, signals: dict[str, Tensor], mask_BT: Tensor
) -> Tensor:
    """The loss of one stage, 0-d: the student's layers read the teacher's states. Raises HeadwiseError for layers that
    cannot be compared."""
    if kind == "mixing":
        return matrix_mixing(student, teacher, signals["inputs"], mask_BT)
    if kind == "transfer":
        return attention_transfer(student, signals["inputs"], signals["outputs"], mask_BT)
    return block_alignment(student, signals["inputs"], signals["hidden"], mask_BT)
