"""Examples in windows that stay the same from epoch to epoch, so that what a teacher makes of each can be kept.

An example of n tokens is cut into windows of `seq_len` inputs one behind the other, so that each of its tokens but the
first is predicted exactly once; one that fits is one window. A window is known by its number.

    batch = WindowBatches(examples.train, batch_size=8, seq_len=256, seed=0).batch(step=0)
    batch.ids, batch.targets, batch.parts, batch.rows           # int64 [8, 256], …, [8]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from headwise.data.batches import IGNORE, Batch, epoch_keys, shuffled
from headwise.data.examples import ExampleSet
from headwise.errors import DataError, SettingsError

LossOn = Literal["all", "completion"]


class Windows:
    """The windows of a split for one `seq_len`.

    Args:
        loss_on: "completion": targets that belong to the prompt are left out.

    Attributes:
        lengths: int64 [n], inputs of each window, at most seq_len.

    Raises DataError where no window has a target, SettingsError for a seq_len below 1.
    """

    def __init__(self, split: ExampleSet, seq_len: int, loss_on: LossOn = "all") -> None:
        if seq_len < 1:
            raise SettingsError(f"seq_len is {seq_len}; it must be 1 or more")
        self.split, self.seq_len, self.loss_on = split, seq_len, loss_on
        n_targets = np.maximum(split.stops - split.starts - 1, 0)
        counts = -(-n_targets // seq_len)
        example = np.repeat(np.arange(split.n_examples), counts)
        nth = np.arange(len(example)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.example, self.starts = example, split.starts[example] + nth * seq_len
        self.lengths = np.minimum(split.stops[example] - self.starts - 1, seq_len)
        if not len(self):
            raise DataError(f"{split.name} has no example of two tokens: nothing to predict; give more text")
        if loss_on == "completion" and (split.parts is None or set(split.part_names) <= {"prompt"}):
            raise DataError(
                f"loss_on completion: the parts of {split.name} are {', '.join(split.part_names)}, and all would be "
                "left out or none; use loss_on all, or data with prompts and answers"
            )

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def n_inputs(self) -> int:
        """Input tokens of all windows together."""
        return int(self.lengths.sum())

    def batch(self, rows: Iterable[int] | NDArray[np.int64]) -> Batch:
        """The windows of these numbers, [B, seq_len], padded at their ends.

        Padding has id 0, is a segment of its own (`segments` is None where there is none), has target −100, part −1.
        """
        import torch

        numbers = np.fromiter(rows, dtype=np.int64)
        split, seq_len = self.split, self.seq_len
        lengths = self.lengths[numbers][:, None]
        offsets = np.arange(seq_len + 1)
        places = self.starts[numbers][:, None] + np.minimum(offsets, lengths)  # beyond the end: the last token again
        tokens, parts = split.array[places].astype(np.int64), split.of_part(places)
        padding = offsets[:-1] >= lengths
        ids, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        here, ahead = parts[:, :-1].copy(), parts[:, 1:].copy()
        ids[padding], targets[padding], here[padding], ahead[padding] = 0, IGNORE, -1, -1
        if self.loss_on == "completion" and "prompt" in split.part_names:
            targets[ahead == split.part_names.index("prompt")] = IGNORE
        made = [ids, targets, padding.astype(np.int64), here, ahead, numbers]
        tensors = [torch.from_numpy(each) for each in made]
        if not padding.any():
            return Batch(tensors[0], tensors[1], None, *tensors[3:])
        return Batch(*tensors)


class WindowBatches:
    """Training batches of one split's windows, [batch_size, seq_len] each, a pure function of (seed, step).

    Every epoch has each window once, in an order of its own; the cuts stay. Raises as `Windows`.
    """

    def __init__(
        self, split: ExampleSet, batch_size: int, seq_len: int, seed: int = 0, loss_on: LossOn = "all"
    ) -> None:
        if batch_size < 1:
            raise SettingsError(f"batch_size is {batch_size}; it must be 1 or more")
        self.windows = Windows(split, seq_len, loss_on)
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed

    def rows(self, step: int) -> NDArray[np.int64]:
        """int64 [batch_size]: the numbers of the windows of `step`, counted from 0."""
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        n = len(self.windows)
        numbers = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = numbers // n
        return np.concatenate(
            [
                shuffled(numbers[epochs == epoch] % n, n, epoch_keys(self.seed, int(epoch)))
                for epoch in np.unique(epochs)
            ]
        )

    def batch(self, step: int) -> Batch:
        """The batch of `step`. It runs on into the next epoch where one ends within it."""
        return self.windows.batch(self.rows(step))

    def rows_of(self, steps: int) -> NDArray[np.int64]:
        """int64, ascending: the windows that the first `steps` batches need."""
        if steps * self.batch_size >= len(self.windows):
            return np.arange(len(self.windows))
        return np.unique(np.concatenate([self.rows(step) for step in range(steps)]))


def eval_windows(split: ExampleSet, batch_size: int, seq_len: int, loss_on: LossOn = "all") -> Iterator[Batch]:
    """All windows of the split once, in order; the last batch may be smaller. Raises as `Windows`."""
    windows = Windows(split, seq_len, loss_on)
    for first in range(0, len(windows), batch_size):
        yield windows.batch(range(first, min(first + batch_size, len(windows))))
