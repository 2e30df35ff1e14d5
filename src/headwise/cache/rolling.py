"""The rolling cache of a window: what no later token can see is dropped (document 002; Mistral, StreamingLLM).

A token sees the `window` nearest keys, its own included, and the first `first` ones of its document (attention sinks).
So `window` tokens and the sinks are kept, whatever the length. While tokens come singly they lie in a buffer that has
room for a quarter more: new tokens are written into that, and only when it is full what is still needed is moved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headwise.cache.base import TokenCache
from headwise.errors import HeadwiseError
from headwise.kernels.segments import segment_positions


class RollingCache(TokenCache):
    """Keys and values of the last `window` tokens and of the first `first` of the document at hand.

    Args:
        window: how far back a token sees, its own place included.
        first: tokens at the start of a document that stay in sight.
        slack: tokens that `crop` may take back.
    """

    kind = "rolling"

    def __init__(self, window: int, first: int = 0, slack: int = 0) -> None:
        super().__init__()
        self.window, self.first, self.slack = window, first, slack
        self._buffers: list[Tensor] = []
        self._at = torch.empty(0, dtype=torch.int64)  # where the tokens in the buffers lie among all seen
        self._oldest = 0  # to what length `crop` may go, but for 0

    def append(self, *new: Tensor, segments_BS: Tensor | None = None) -> tuple[Tensor, ...]:
        """Store tensors [B,K,T,·] and return them after what of those held they may see, each [B,K,S',·]."""
        device, held, T = new[0].device, len(self._at), new[0].shape[2]
        at = torch.cat([self._at.to(device), torch.arange(self.length, self.length + T, device=device)])
        self.length += T
        if self._buffers and held + T <= self._buffers[0].shape[2]:
            for buffer, t in zip(self._buffers, new):
                buffer[:, :, held : held + T] = t
            everything = [buffer[:, :, : held + T] for buffer in self._buffers]
            self._at = at
        else:
            olds = [buffer[:, :, :held] for buffer in self._buffers] or [t[:, :, :0] for t in new]
            everything = [torch.cat([old, t], 2) for old, t in zip(olds, new)]
            self._move(everything, at, segments_BS)
        # Without sinks what is held is one stretch, of which the first new token may not see the beginning.
        unseen = 0 if self.first else max(0, held - (self.window - 1))
        self.places = None if len(at) - unseen == self.length else at[unseen:]
        return tuple(t[:, :, unseen:] for t in everything)

    def _move(self, everything: list[Tensor], at: Tensor, segments_BS: Tensor | None) -> None:
        """Into new buffers, what later tokens may still see."""
        oldest = max(self.length - self.slack, 0)
        needed = at >= oldest - self.window
        if self.first:
            starts = torch.zeros(1, dtype=torch.int64, device=at.device)
            if segments_BS is not None:
                index = torch.arange(self.length, device=at.device)
                starts = (index - segment_positions(segments_BS))[:, max(oldest - 1, 0) :].unique()
            after = at[:, None] - starts
            needed |= ((after >= 0) & (after < self.first)).any(1)
        if not needed.all():
            self._oldest = oldest
        self._at = at[needed]
        kept = len(self._at)
        room = kept + max(16, kept // 4) if self._buffers else kept  # none beside the prompt's
        self._buffers = [t.new_empty(*t.shape[:2], room, t.shape[3]) for t in everything]
        for buffer, t in zip(self._buffers, everything):
            buffer[:, :, :kept] = t[:, :, needed]

    def check_crop(self, length: int) -> None:
        if 0 < length < min(self.length, self._oldest):
            raise HeadwiseError(
                f"a rolling cache of window {self.window} after {self.length} tokens cannot be cropped to {length}: "
                f"the tokens before are dropped; crop to {self._oldest} at least or to 0, or make it with more slack"
            )

    def crop(self, length: int) -> None:
        self.check_crop(length)
        if length < self.length:
            self.length = max(length, 0)
            self._at = self._at[self._at < length]
        if self.length == 0:
            self._oldest = 0

    def tensors(self) -> list[Tensor]:
        return self._buffers

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        self._buffers = [change(t) for t in self._buffers]

    @property
    def used_bytes(self) -> int:
        return self.n_bytes * len(self._at) // self._buffers[0].shape[2] if self._buffers else 0
