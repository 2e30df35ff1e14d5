"""How near a student has come to its teachers, layer by layer, on its validation split, beside the control.

* cosine: of the student's keys and values with their targets, as training compares them, the projector between. With
  `projection="none"` the targets go through the fixed uniform map.
* CKA: with the teacher's own, before any projector.

Each also against the targets of other sequences, `…_shuffled`: what of it is the text's is the gap (`similarity`).
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch

from headwise.data.windows import Windows
from headwise.distill.capture import capture
from headwise.distill.similarity import cosine, linear_cka, shuffled
from headwise.train.evaluation import autocast

if TYPE_CHECKING:
    from torch import Tensor

    from headwise.distill.matching import Matching
    from headwise.distill.trainer import DistillTrainer, Lesson

Likeness = dict[str, list[float | None]]
_SIDES = {"k": "kv", "v": "kv", "output": "recurrent"}


@torch.no_grad()
def measure(trainer: DistillTrainer) -> Likeness:
    """`cosine_k`, `cosine_v`, `cka_k`, `cka_v` (`…_output` of recurrent layers), each and with `_shuffled`: a number a
    layer, None for layers without such a thing; of several teachers the mean. Empty where there are not two
    sequences to measure on. The student's mode is left as it was."""
    settings, data = trainer.job.settings, trainer.job.dataset
    windows = Windows(data.val, settings.seq_len, settings.loss_on)
    rows = np.unique(np.linspace(0, len(windows) - 1, min(settings.measure_rows, len(windows))).astype(np.int64))
    if len(rows) < 2:
        return {}
    training, beside = trainer.model.training, trainer.beside.training
    trainer.model.eval(), trainer.beside.eval()
    try:
        cuts = range(0, len(rows), settings.batch_size)
        parts = [trainer.lesson(windows.batch(rows[at : at + settings.batch_size])) for at in cuts]
        each = [_of_teacher(trainer, n, parts) for n in range(len(trainer.job.teachers))]
    finally:
        trainer.model.train(training), trainer.beside.train(beside)
    shared = [name for name in each[0] if all(name in one for one in each)]
    return {name: _means([one[name] for one in each]) for name in shared}


def _of_teacher(trainer: DistillTrainer, n: int, parts: list[Lesson]) -> Likeness:
    matching: Matching = trainer.matchings[n]
    found: dict[str, list[tuple[Tensor, ...]]] = defaultdict(list)
    with autocast(trainer.job.device, trainer.job.settings.dtype):
        for part in parts:
            part = part.to(trainer.job.device)
            with capture(trainer.model, matching.measured) as signals:
                trainer.model(part.ids_BT, last=True)
            seen = trainer.look(n, part, matching.measured, "val")
            pairs, raw = matching.pairs(signals, seen, matching.measured), matching.raw_pairs(signals, seen)
            for name in pairs:
                found[name].append((*pairs[name], *raw[name], seen.mask_BT))
    made: Likeness = {}
    for name, tensors in found.items():
        student, target, own, teacher, mask_BT = (torch.cat(each) for each in zip(*tensors))
        (other, both_BT), (others, _) = shuffled(target, mask_BT), shuffled(teacher)
        layers, depth = getattr(matching, _SIDES[name]), len(matching.kv) + len(matching.recurrent)
        for measured, values in (
            (f"cosine_{name}", cosine(student, target, mask_BT)),
            (f"cosine_{name}_shuffled", cosine(student, other, both_BT)),
            (f"cka_{name}", linear_cka(own, teacher, mask_BT)),
            (f"cka_{name}_shuffled", linear_cka(own, others, both_BT)),
        ):
            by_layer = dict(zip(layers, values.tolist()))
            # On the student's side of the projector the targets are the teacher's layers, all of them.
            same = len(values) == len(layers)
            made[measured] = [by_layer.get(layer) for layer in range(depth)] if same else values.tolist()
    return made


def _means(lists: list[list[float | None]]) -> list[float | None]:
    """Layer by layer."""
    return [None if None in values else sum(values) / len(values) for values in zip(*lists)]
