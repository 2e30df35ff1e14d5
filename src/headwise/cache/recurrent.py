"""The cache of a recurrence: a state of one size, whatever the number of tokens (document 002, linear attention)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from headwise.cache.base import AnyLayerCache
from headwise.errors import HeadwiseError

State = tuple[Tensor, ...]


class RecurrentCache(AnyLayerCache):
    """The state one layer's recurrence has reached after `length` tokens.

    A state keeps no single tokens, so `crop` goes only to where an earlier pass ended and its state was kept.

    Args:
        checkpoints: how many states of earlier passes to keep.

    Attributes:
        state: the mechanism's own tensors, None before the first token.
    """

    kind = "recurrent"

    def __init__(self, checkpoints: int = 0) -> None:
        super().__init__()
        self.checkpoints = checkpoints
        self.state: State | None = None
        self._earlier: list[tuple[int, State]] = []

    def keep(self, n_new: int, *state: Tensor) -> None:
        """Replace the state by the one reached `n_new` tokens later."""
        if self.checkpoints and self.state is not None:
            self._earlier = [*self._earlier, (self.length, self.state)][-self.checkpoints :]
        self.state = state
        self.length += n_new

    def check_crop(self, length: int) -> None:
        kept = [at for at, _ in self._earlier]
        if 0 < length < self.length and length not in kept:
            also = f"to {', '.join(map(str, kept))} or " if kept else ""
            raise HeadwiseError(
                f"a recurrent state of {self.length} tokens cannot be cropped to {length}: it keeps no single tokens; "
                f"crop {also}to 0 and feed the tokens again"
            )

    def crop(self, length: int) -> None:
        """Go back to the state after `length` tokens, or forget everything. Raises as `check_crop`."""
        self.check_crop(length)
        if length >= self.length:
            return
        self.length = max(length, 0)
        self.state = dict(self._earlier).get(self.length)
        self._earlier = [kept for kept in self._earlier if kept[0] < self.length]

    def tensors(self) -> list[Tensor]:
        return [t for state in (self.state, *(kept for _, kept in self._earlier)) for t in state or ()]

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = tuple(change(t) for t in self.state)
        self._earlier = [(at, tuple(change(t) for t in state)) for at, state in self._earlier]
