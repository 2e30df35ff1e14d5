"""A batch as a student reads it beside its teachers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwise.distill.router import prompts
from headwise.train.objective import Example

if TYPE_CHECKING:
    from headwise.data import Batch


@dataclass(frozen=True, slots=True)
class Lesson(Example):
    """What one forward pass reads: windows of examples, their numbers [B], lengths [B], and which tokens are prompt."""

    rows_B: Tensor | None = None
    lengths_B: Tensor | None = None
    prompt_BT: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, parts: tuple[str, ...]) -> Lesson:
        """A batch of windows; `parts` are the names of its parts. Padding stands behind the tokens, where a causal
        model does not see it, so that no segments are needed."""
        assert batch.parts is not None
        prompt_BT = prompts(batch.parts, parts.index("prompt") if "prompt" in parts else None)
        lengths_B = (batch.parts >= 0).sum(1)
        return cls(batch.ids, batch.targets, rows_B=batch.rows, lengths_B=lengths_B, prompt_BT=prompt_BT)

    @property
    def mask_BT(self) -> Tensor:
        """True where a token stands, False at the padding behind."""
        assert self.lengths_B is not None
        return torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device) < self.lengths_B[:, None]
