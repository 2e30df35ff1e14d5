"""What learns beside a student: one module with it for the optimiser, apart from it in a checkpoint.

A checkpoint's model file is a plain model of the student's line. Its second file has the optimiser's tensors, and under
`beside/…` the projectors and the router, under `updated/…` the student's weights without the low-rank updates that the
model file has added to them, and the updates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from headwise.distill.lora import PARAMETRISED, plain_tensors
from headwise.io.tensors import module_tensors

if TYPE_CHECKING:
    from headwise.io.checkpoint import Checkpoint

BESIDE, UPDATED = "beside/", "updated/"
Tensors = dict[str, Tensor]


class Beside(nn.Module):
    """The student's own children under their own names, and next to them what learns beside it: every parameter of the
    student keeps its name."""

    def __init__(self, student: nn.Module, **others: nn.Module) -> None:
        super().__init__()
        for name, child in [*student.named_children(), *others.items()]:
            self.add_module(name, child)


def parted(student: nn.Module, beside: nn.Module) -> tuple[Tensors, Tensors]:
    """(a plain model's tensors, all the others) of what is to be saved."""
    updated = {name: tensor for name, tensor in module_tensors(student).items() if PARAMETRISED in name}
    others = {f"{BESIDE}{name}": tensor for name, tensor in module_tensors(beside).items()}
    return plain_tensors(student), others | {f"{UPDATED}{name}": tensor for name, tensor in updated.items()}


def joined(checkpoint: Checkpoint) -> tuple[Checkpoint, Tensors]:
    """The checkpoint as plain training would have written it of the student with its updates, and what is beside."""
    own: dict[str, Tensors] = {BESIDE: {}, UPDATED: {}, "": {}}
    for name, tensor in checkpoint.optimizer.items():
        kind = next(prefix for prefix in own if name.startswith(prefix))
        own[kind][name.removeprefix(kind)] = tensor
    merged = {name.partition(PARAMETRISED)[0] + ".weight" for name in own[UPDATED]}
    model = {name: tensor for name, tensor in checkpoint.model.items() if name not in merged} | own[UPDATED]
    return replace(checkpoint, model=model, optimizer=own[""]), own[BESIDE]
