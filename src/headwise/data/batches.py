"""Batches: which tokens are seen at which step, as a pure function of (seed, step).

Training goes through the split in epochs. In each, the tokens are cut into windows of `seq_len` inputs, one behind
the other; a window's targets are the same tokens one place on, so an epoch predicts every token once (up to 2·seq_len
at the ends of the split fall outside the cuts). A random offset moves the cuts from epoch to epoch, and a keyed
bijection of the window numbers gives their order. Nothing is remembered between batches and no permutation is stored,
however large the corpus: resuming at any step is asking for that step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headwise.data.pack import Tokens
from headwise.errors import DataError, SettingsError

if TYPE_CHECKING:
    import torch

IGNORE = -100  # the target that torch.nn.functional.cross_entropy leaves out
_ROUNDS = 6


@dataclass(frozen=True)
class Batch:
    """`ids`, `targets`: int64 [B, T]; targets[b, t] is the token after ids[b, t], −100 where none is to be predicted.

    `segments`: int64 [B, T], the number of each token's document within its row; None if the split is one document.

    Of batches of examples (`data.examples`) alone:

    `parts`, `target_parts`: int64 [B, T], the part (prompt, answer, …) of the token in `ids` and of the one to be
    predicted, as its place in the split's `part_names`; −1 at padding.
    `rows`: int64 [B], the numbers of the windows.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor | None = None
    parts: torch.Tensor | None = None
    target_parts: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        tensors = {each.name: getattr(self, each.name) for each in fields(self)}
        there = {name: t.to(device, non_blocking=non_blocking) for name, t in tensors.items() if t is not None}
        return Batch(**there)


class Batches:
    """The training batches of one split, [batch_size, seq_len] each, in an order fixed by `seed` (any integer).

    Raises DataError if the split is shorter than seq_len + 1 tokens, SettingsError for sizes below 1.
    """

    def __init__(self, tokens: Tokens, batch_size: int, seq_len: int, seed: int = 0) -> None:
        _check(tokens, batch_size, seq_len)
        self.tokens, self.batch_size, self.seq_len, self.seed = tokens, batch_size, seq_len, seed
        # As many windows as fit at every offset below seq_len, so that all epochs are equally long.
        self.windows_per_epoch = max((len(tokens) - seq_len) // seq_len, 1)
        self._slack = len(tokens) - 1 - self.windows_per_epoch * seq_len

    def batch(self, step: int) -> Batch:
        """The batch of `step`, counted from 0. It runs on into the next epoch where one ends within it."""
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        first = step * self.batch_size
        numbers = np.arange(first, first + self.batch_size)
        epochs = numbers // self.windows_per_epoch
        starts = np.empty_like(numbers)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            keys = epoch_keys(self.seed, epoch)
            here = epochs == epoch
            windows = shuffled(numbers[here] % self.windows_per_epoch, self.windows_per_epoch, keys)
            starts[here] = int(keys[_ROUNDS]) % (self._slack + 1) + windows * self.seq_len
        return _gather(self.tokens, starts, self.seq_len)


def eval_batches(tokens: Tokens, batch_size: int, seq_len: int) -> Iterator[Batch]:
    """The whole split in order: over all batches, `tokens.n_targets` targets, each once.

    All batches have one shape, [min(batch_size, windows), seq_len]. The last window is the last seq_len + 1 tokens
    of the split, with −100 for targets that the window before had; rows beyond it repeat it with no targets at all.
    Raises DataError and SettingsError as `Batches` does.
    """
    _check(tokens, batch_size, seq_len)
    n_windows = math.ceil((len(tokens) - 1) / seq_len)
    last = len(tokens) - 1 - seq_len
    rows = min(batch_size, n_windows)
    for first in range(0, n_windows, rows):
        wanted = np.arange(first, first + rows) * seq_len
        starts = np.minimum(wanted, last)
        batch = _gather(tokens, starts, seq_len)
        for row in np.flatnonzero(starts < wanted):
            batch.targets[row, : wanted[row] - starts[row]] = IGNORE
        yield batch


def shuffled(numbers: NDArray[np.int64], n: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a keyed bijection of range(n) takes `numbers`, in constant memory.

    An unbalanced Feistel network on pairs (x, y) in Z_a × Z_b, a·b ≥ n, each round adding to one half a hash of the
    other, which is a bijection whatever the hash; numbers thrown beyond n go round again ("cycle walking", Black and
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). With a = ⌈√n⌉ few do.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    values = numbers.astype(np.uint64)
    astray = np.ones(len(values), dtype=bool)
    while astray.any():
        x, y = np.divmod(values[astray], np.uint64(b))
        for i in range(0, _ROUNDS, 2):
            x = (x + _mixed(y, keys[i]) % np.uint64(a)) % np.uint64(a)
            y = (y + _mixed(x, keys[i + 1]) % np.uint64(b)) % np.uint64(b)
        values[astray] = x * np.uint64(b) + y
        astray = values >= n
    return values.astype(np.int64)


def epoch_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    """Eight independent 64-bit keys: one a round, one for the offset."""
    digest = hashlib.blake2b(f"headwise batches {seed} {epoch}".encode(), digest_size=64).digest()
    return np.frombuffer(digest, dtype="<u8")


def _mixed(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): each bit of the input moves every bit of the output."""
    z = values + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _check(tokens: Tokens, batch_size: int, seq_len: int) -> None:
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise SettingsError(f"{name} is {value}; it must be 1 or more")
    if len(tokens) <= seq_len:
        raise DataError(
            f"seq_len {seq_len} needs {seq_len + 1:,} tokens in a row, but {tokens.name} has {len(tokens):,}; "
            f"give more text or a seq_len of at most {max(len(tokens) - 1, 1):,}"
        )


def _gather(tokens: Tokens, starts: NDArray[np.int64], seq_len: int) -> Batch:
    """The batch of windows that begin at `starts`."""
    import torch

    windows = tokens.array[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    ids, targets = windows[:, :-1].copy(), windows[:, 1:].copy()
    if tokens.starts is None:
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets))
    segments = _segments(tokens.starts, starts, seq_len + 1)
    if not tokens.separated:  # nothing in a document tells how the next begins
        targets[segments[:, 1:] != segments[:, :-1]] = IGNORE
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(segments[:, :-1].copy()))


def _segments(boundaries: NDArray[Any], starts: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """For each window, the number of document boundaries after its first token, up to each of its tokens."""
    marks = np.zeros((len(starts), width), dtype=np.int64)
    low = np.searchsorted(boundaries, starts, side="right")
    high = np.searchsorted(boundaries, starts + width, side="left")
    for row, start in enumerate(starts):
        marks[row, boundaries[low[row] : high[row]] - start] = 1
    return np.cumsum(marks, axis=1)
