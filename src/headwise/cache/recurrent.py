"""The cache of a recurrence: a state of one size, whatever the number of tokens (document 002, linear attention)."""

from __future__ import annotations

from torch import Tensor

from headwise.errors import HeadwiseError


class RecurrentCache:
    """The state one layer's recurrence has reached after `length` tokens.

    Attributes:
        state: the mechanism's own tensors, None before the first token.
        length: tokens seen.
    """

    def __init__(self) -> None:
        self.length = 0
        self.state: tuple[Tensor, ...] | None = None

    def keep(self, n_new: int, *state: Tensor) -> None:
        """Replace the state by the one reached `n_new` tokens later."""
        self.state = state
        self.length += n_new

    def crop(self, length: int) -> None:
        """Forget everything, or nothing: a state cannot go back to an earlier token.

        Raises:
            HeadwiseError: `length` lies between.
        """
        if length >= self.length:
            return
        if length > 0:
            raise HeadwiseError(
                f"a recurrent state of {self.length} tokens cannot be cropped to {length}: it keeps no single tokens; "
                "crop to 0 and feed the tokens again"
            )
        self.length, self.state = 0, None

    def reorder(self, rows: Tensor) -> None:
        """Keep the rows int64 [B'] of the batch, in this order; a row may come several times or never."""
        if self.state is not None:
            self.state = tuple(t[rows.to(t.device)] for t in self.state)

    @property
    def n_bytes(self) -> int:
        """Bytes of the state."""
        return sum(t.numel() * t.element_size() for t in self.state or ())
