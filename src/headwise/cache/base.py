"""What every layer's cache can do (document 002): the one protocol that attention, decoding and beams rely on."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor


@dataclass(frozen=True)
class CacheReport:
    """What a cache costs.

    Attributes:
        kind: the cache's kind.
        length: tokens seen, of the longest row.
        n_bytes: all its tensors take, spare room included.
        used_bytes: what they would take with room for the tokens still held and no more.
    """

    kind: str
    length: int
    n_bytes: int
    used_bytes: int

    @property
    def waste(self) -> float:
        """The share of `n_bytes` that holds nothing."""
        return 1 - self.used_bytes / self.n_bytes if self.n_bytes else 0.0


class AnyLayerCache(ABC):
    """What one layer keeps of the tokens it has seen.

    Attributes:
        kind: the cache's name in `new_cache(kind)` and reports.
        length: tokens seen.
    """

    kind: str

    def __init__(self) -> None:
        self.length = 0

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Everything held, spare room included; rows of the batch come first."""

    @abstractmethod
    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put `change` of each tensor in its place."""

    @property
    def n_bytes(self) -> int:
        """Bytes of everything held, exactly."""
        return bytes_of(self.tensors())

    @property
    def used_bytes(self) -> int:
        """Bytes without spare room."""
        return self.n_bytes

    def report(self) -> CacheReport:
        """What it costs now."""
        return CacheReport(self.kind, self.length, self.n_bytes, self.used_bytes)

    def reserve(self, n_tokens: int) -> None:
        """Make room for so many more tokens, so that storing them moves nothing; here there is nothing to make."""
        return

    def check_crop(self, length: int) -> None:
        """Refuse, before anything is changed, what `crop` cannot do; here nothing.

        Raises:
            HeadwiseError: what is needed to go on from `length` is no longer held.
        """
        return

    @abstractmethod
    def crop(self, length: int) -> None:
        """Forget every token from `length` on. Raises as `check_crop`."""

    def reorder(self, rows: Tensor) -> None:
        """Make row n of the batch what row `rows[n]` was, int64 [B']: beams that go on, or one prompt made many."""
        self.replace(lambda t: t.index_select(0, rows.to(t.device)))

    def fork(self) -> Self:
        """A second cache with the same tokens; the two go on apart."""
        other = copy.copy(self)
        other.replace(lambda t: t.clone())
        return other


class TokenCache(AnyLayerCache):
    """A cache that keeps something of each token: keys and values, or a latent.

    Attributes:
        attends: whether `attend` may do more than decline.
        places: where the tokens lie that `append` has handed over last, among all seen: int64 [S']. None: all of them.
        padding: segments (new tokens [B,T], tokens handed over [B,S]) that hide what stands before the shorter rows of
            what was handed over. None: rows are of one length.
    """

    attends: bool = False
    places: Tensor | None = None
    padding: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def append(self, *new: Tensor, segments_BS: Tensor | None = None) -> tuple[Tensor, ...]:
        """Store tensors [B,K,T,·] after those held; return what the new tokens may look at, each [B,K,S,·].

        The new tokens are the last T. `segments_BS` are the segments of all tokens seen, the new ones included.
        """

    def attend(self, q_BHTE: Tensor, new: tuple[Tensor, ...], **scores: Any) -> Tensor | None:
        """Store as `append` does and let queries meet everything held, causally, where that is better done here.

        `new` is keys [B,K,T,E] and values [B,K,T,D], or one tensor that serves as both. `scores`: scale, window,
        softcap, sink_H, bias_factors, as `kernels.attention.sdpa` takes them. None, with nothing stored, where `append`
        and that kernel should do it.
        """
        return None


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes that tensors take."""
    return sum(t.numel() * t.element_size() for t in tensors)
