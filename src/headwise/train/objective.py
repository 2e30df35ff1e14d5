"""What a model is trained to predict, by its architecture. Everything random is a pure function of (seed, step).

- decoder: the next token, everywhere.
- encoder: masked tokens (Devlin et al. 2019, arXiv:1810.04805): 15 % of the positions, each replaced by the mask id,
  the last id of the model's vocabulary, which stands for no text.
- encoder–decoder: the encoder reads the first half of the window, the decoder predicts the second half; the decoder's
  first input is the encoder's last token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor, nn

    from headwise.data import Batch
    from headwise.spec import ModelSpec

IGNORED = -100
MASKED_FRACTION = 0.15


@dataclass(frozen=True, slots=True)
class Example:
    """What one forward pass reads and must predict; int64, `targets_BT` is −100 where nothing is asked."""

    ids_BT: Tensor
    targets_BT: Tensor
    segments_BT: Tensor | None = None
    encoder_ids_BS: Tensor | None = None
    encoder_segments_BS: Tensor | None = None

    def count(self) -> int:
        """How many targets count."""
        return int((self.targets_BT != IGNORED).sum())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: change(tensor) for name, tensor in tensors.items() if tensor is not None})

    def to(self, device: torch.device) -> Self:
        """The same on another device (itself where it is there already)."""
        return self if self.ids_BT.device == device else self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, parts: int) -> list[Self]:
        """The rows in `parts` equal pieces, for accumulation."""
        if parts == 1:
            return [self]
        rows = self.ids_BT.shape[0] // parts
        return [self._each(itemgetter(slice(first, first + rows))) for first in range(0, rows * parts, rows)]


Objective = Callable[["Batch", int], Example]
"""(batch, step) → example."""


def loss_sum(model: nn.Module, example: Example) -> Tensor:
    """Cross-entropy of all counted targets, added up (nats, 0-d)."""
    read = {}
    if example.encoder_ids_BS is not None:
        read = {"encoder_ids": example.encoder_ids_BS, "encoder_segments": example.encoder_segments_BS}
    logits_BTV = model(example.ids_BT, segments=example.segments_BT, **read)
    return F.cross_entropy(
        logits_BTV.flatten(0, 1), example.targets_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def training_loss(model: nn.Module, example: Example) -> tuple[Tensor, Tensor | None]:
    """`loss_sum`, and what the model's mechanisms add to the mean loss while training (None: nothing)."""
    loss = loss_sum(model, example)
    return loss, model.aux_loss()  # type: ignore[operator]


def next_token(batch: Batch, step: int) -> Example:
    """The decoder's objective: the batch as it comes."""
    return Example(batch.ids, batch.targets, batch.segments)


def second_half(batch: Batch, step: int) -> Example:
    """The encoder–decoder's objective: half the window read, the other half predicted (at least one token each)."""
    half = max(1, batch.ids.shape[1] // 2)
    read, written = slice(0, half), slice(half - 1, -1)
    segments_BT = batch.segments
    return Example(
        batch.ids[:, written],
        batch.targets[:, written],
        None if segments_BT is None else segments_BT[:, written],
        batch.ids[:, read],
        None if segments_BT is None else segments_BT[:, read],
    )


def masked_tokens(mask_id: int, seed: int) -> Objective:
    """The encoder's objective: which 15 % are masked depends on (seed, step) and the batch's shape alone.

    Positions without a target are left out.
    """

    def objective(batch: Batch, step: int) -> Example:
        draw = np.random.default_rng([seed, step, 0x6D61736B]).random(tuple(batch.ids.shape))
        # Evaluation fills its last batch up with tokens that were there before, and marks them so.
        masked_BT = torch.from_numpy(draw < MASKED_FRACTION) & (batch.targets != IGNORED)
        targets_BT = batch.ids.masked_fill(~masked_BT, IGNORED)
        return Example(batch.ids.masked_fill(masked_BT, mask_id), targets_BT, batch.segments)

    return objective


def vocab_needed(architecture: str, tokenizer_vocab: int) -> int:
    """The model's vocabulary for a tokenizer's: an encoder has one id more, its mask."""
    return tokenizer_vocab + (architecture == "encoder")


def make_objective(spec: ModelSpec, seed: int) -> Objective:
    """The objective of `spec.architecture`."""
    if spec.architecture == "encoder":
        return masked_tokens(spec.dims.vocab_size - 1, seed)
    return second_half if spec.architecture == "encoder_decoder" else next_token
