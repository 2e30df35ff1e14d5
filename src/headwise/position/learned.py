"""Learned absolute positions (GPT-2; document 001): row p of a table of `max_seq_len` rows is added to token p."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from headwise.dims import Dims
from headwise.errors import HeadwiseError
from headwise.position.base import Position, PositionSpec
from headwise.registry import register_position


class LearnedSpec(PositionSpec):
    """A learned table of max_seq_len rows, added to the token embeddings (GPT-2)."""

    kind: Literal["learned"] = "learned"
    embeds: ClassVar[bool] = True

    def param_count(self, dims: Dims) -> int:
        return dims.max_seq_len * dims.d_model


@register_position(LearnedSpec)
class LearnedPosition(Position):
    """x_p + table[p]. There is no row past the table's end, so longer input is an error, never a silent wrap."""

    def __init__(self, spec: LearnedSpec, dims: Dims) -> None:
        super().__init__(spec, dims)
        self.table = nn.Embedding(dims.max_seq_len, dims.d_model)

    def embed(self, x_BTC: Tensor, positions: Tensor) -> Tensor:
        """As `Position.embed`.

        Raises:
            HeadwiseError: there are more tokens than rows.
        """
        return x_BTC + F.embedding(positions, self.table.weight)

    def check_length(self, seq_len: int) -> None:
        """Refuse `seq_len` tokens where the table has fewer rows."""
        rows = self.table.num_embeddings
        if seq_len > rows:
            raise HeadwiseError(
                f"{seq_len} tokens, but the learned position table has max_seq_len={rows} rows; "
                f"shorten the input, build with max_seq_len={seq_len}, or use position=rope or alibi, which have none"
            )
