"""Examples in windows that stay the same from epoch to epoch, so that what a teacher makes of each can be kept.

A split is a run of examples: rows with parts (`data.segments`), or documents of plain text, all of one part. An
example of n tokens is cut into windows of `seq_len` inputs one behind the other, so that each of its tokens but the
first is predicted exactly once; one that fits is one window. A window is known by its number.

    examples = load_examples("gsm8k", "models/smollm2")
    batch = WindowBatches(examples.train, batch_size=8, seq_len=256, seed=0).batch(step=0)
    batch.ids, batch.targets, batch.parts, batch.rows           # int64 [8, 256], …, [8]
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headwise.data.batches import IGNORE, Batch, epoch_keys, shuffled
from headwise.data.corpora import EMBEDDED, Corpus, files_of, json_rows, name_of, rank, rank_limit, utf8
from headwise.data.pack import Tokens, load_dataset, token_dtype
from headwise.data.segments import PARTS, Example, Format, detect, reader
from headwise.data.tokenizers import Tokenizer, load_tokenizer, plan_tokenizer
from headwise.errors import DataError, SettingsError

LossOn = Literal["all", "completion"]
_MOST_PARTS = 256
_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class ExampleSet:
    """The tokens of one split, example by example.

    `array`: ids, uint16 or uint32, flat. `parts`: uint8, the part of each as its place in `part_names`; None: all are
    of the first. `starts`, `stops`: int64 [n_examples], where each example lies; those of plain text may share the
    token between them. `n_bytes`: length of the text in UTF-8. `texts`: the examples as they were read; () for text.
    """

    name: str
    array: NDArray[Any]
    parts: NDArray[np.uint8] | None
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    n_bytes: int
    part_names: tuple[str, ...]
    texts: Sequence[Example] = ()

    def __len__(self) -> int:
        return len(self.array)

    @property
    def n_examples(self) -> int:
        return len(self.starts)

    @property
    def n_targets(self) -> int:
        """Tokens that the windows predict: all but each example's first."""
        return int(np.maximum(self.stops - self.starts - 1, 0).sum())

    def bits_per_byte(self, nats: float) -> float:
        """As `Tokens.bits_per_byte`: of the summed nats of all targets."""
        return nats / math.log(2) / self.n_bytes

    def of_part(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The parts of the tokens at these places of `array`."""
        return np.zeros_like(places) if self.parts is None else self.parts[places].astype(np.int64)


@dataclass(frozen=True)
class Examples:
    """A data set of examples. `fingerprint` is the same where the tokens, the parts and the split are; `parts` names
    them in the order of their numbers; `format` is what the data were read as."""

    name: str
    tokenizer: Tokenizer
    train: ExampleSet
    val: ExampleSet
    fingerprint: str
    parts: tuple[str, ...]
    format: Format


def load_examples(
    data: str | Path = EMBEDDED,
    tokenizer: str | Path | Tokenizer = "char",
    *,
    format: Format = "auto",
    text_column: str = "text",
    val_fraction: float = 0.1,
    train_limit: int | None = None,
    val_limit: int | None = None,
    cache_dir: Path | str | None = None,
) -> Examples:
    """Reads, splits and tokenizes `data`.

    Args:
        data: for `text` as `load_dataset` takes it; otherwise a file of JSON lines or a folder of them, which may
            bring its own split (train.jsonl, test.jsonl). Rows that are not split yet are ranked by a keyed hash.
        tokenizer: as `load_dataset` takes it.
        format: see `data.segments`; auto: what the first row looks like, and `text` for all but JSON lines.
        text_column, val_fraction, cache_dir: as in `load_dataset`.
        train_limit, val_limit: at most so many examples of a split, the first ones; not for `text`.

    Raises DataError, in one line with file and row, for what cannot be read, split, cut into parts or encoded.
    """
    if format == "auto":
        format = _detected(data)
    if format == "text":
        if train_limit is not None or val_limit is not None:
            raise SettingsError("train_limit and val_limit count examples with parts; these data are plain text")
        dataset = load_dataset(data, tokenizer, text_column=text_column, val_fraction=val_fraction, cache_dir=cache_dir)
        splits = [text_examples(dataset.train), text_examples(dataset.val)]
        fingerprint = _digest(dataset.fingerprint, splits)
        return Examples(dataset.name, dataset.tokenizer, splits[0], splits[1], fingerprint, ("text",), format)

    brought = _brought(tokenizer)
    name, by_split = _read(data, format, brought, val_fraction)
    by_split = {"train": by_split["train"][:train_limit], "val": by_split["val"][:val_limit]}
    corpus = Corpus(
        name,
        {split: len(examples) for split, examples in by_split.items()},
        lambda: ((split, example.text) for split, examples in by_split.items() for example in examples),
    )
    made = plan_tokenizer(brought or tokenizer).fit(corpus)
    seen = {span.part for examples in by_split.values() for example in examples for span in example.spans}
    parts = (*(part for part in PARTS if part in seen), *sorted(seen.difference(PARTS)))
    if len(parts) > _MOST_PARTS:
        raise DataError(f"{name!r} has {len(parts):,} kinds of parts; at most {_MOST_PARTS} can be told apart")
    train, val = (_encoded(f"{name} ({split})", by_split[split], made, parts) for split in ("train", "val"))
    fingerprint = _digest(f"{made.fingerprint} {parts}", [train, val], contents=True)
    return Examples(name, made, train, val, fingerprint, parts, format)


# ---- windows ----


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


# ---- from files to arrays ----


def _detected(data: str | Path) -> Format:
    if str(data) == EMBEDDED or str(data).startswith("hf:"):
        return "text"
    first = next(iter(files_of(data).values()))[0]
    if first.suffix.lower() not in _LINES:
        return "text"
    return detect(next(json_rows(first))[1])


def _brought(tokenizer: str | Path | Tokenizer) -> Tokenizer | None:
    """The tokenizer that is given, None for the name of one that is made for the text."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    return load_tokenizer(tokenizer) if Path(tokenizer).expanduser().exists() else None


def _read(
    data: str | Path, format: Format, tokenizer: Tokenizer | None, val_fraction: float
) -> tuple[str, Mapping[str, list[Example]]]:
    """The examples of each split, and the data's name."""
    if str(data) == EMBEDDED or str(data).startswith("hf:"):
        raise DataError(f"format {format} is read from files of JSON lines (.jsonl), not from {str(data)!r}")
    read, name, found = reader(format, tokenizer), name_of(data), {}
    for part, paths in files_of(data).items():
        if wrong := [path for path in paths if path.suffix.lower() not in _LINES]:
            raise DataError(f"format {format} is read from files of JSON lines (.jsonl), not from {str(wrong[0])!r}")
        found[part] = [read(row, where) for path in paths for where, row in json_rows(path)]
    if "all" not in found:
        return name, found
    examples = found["all"]
    if not 0 < val_fraction < 1:
        raise SettingsError(f"val_fraction is {val_fraction}; it must lie between 0 and 1 (0.1 = a tenth validates)")
    ranks = np.fromiter((rank(example.text) for example in examples), dtype=np.uint64)
    limit = rank_limit(ranks, val_fraction, name)
    sides: dict[str, list[Example]] = {"train": [], "val": []}
    for example, own in zip(examples, ranks.tolist()):
        sides["val" if own < limit else "train"].append(example)
    return name, sides


def _encoded(name: str, examples: Sequence[Example], tokenizer: Tokenizer, parts: tuple[str, ...]) -> ExampleSet:
    """The examples' tokens. Texts without special tokens of their own get what the tokenizer begins and ends one with;
    a token that lies across a cut belongs to the part in which it begins."""
    ids, of_part = [], []
    for example in examples:
        try:
            tokens, places = tokenizer.encode_places(example.text, special=example.special)
        except DataError as error:
            raise DataError(f"{example.where}: {error}") from None
        cuts = np.array([span.start for span in example.spans])
        numbers = np.array([parts.index(span.part) for span in example.spans])
        own = numbers[np.searchsorted(cuts, places[:, 0], side="right") - 1]
        if not example.special:
            begin, end = tokenizer.begin_ids, () if tokenizer.eos_id is None else (tokenizer.eos_id,)
            tokens = np.concatenate([np.array(begin, np.int64), tokens, np.array(end, np.int64)])
            own = np.concatenate([np.repeat(numbers[:1], len(begin)), own, np.repeat(numbers[-1:], len(end))])
        ids.append(tokens)
        of_part.append(own)
    lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
    stops = np.cumsum(lengths)
    return ExampleSet(
        name=name,
        array=np.concatenate([np.empty(0, np.int64), *ids]).astype(token_dtype(tokenizer.vocab_size)),
        parts=np.concatenate([np.empty(0, np.int64), *of_part]).astype(np.uint8),
        starts=stops - lengths,
        stops=stops,
        n_bytes=sum(len(utf8(example.text)) for example in examples),
        part_names=parts,
        texts=examples,
    )


def text_examples(tokens: Tokens) -> ExampleSet:
    """Packed text: every document an example. Where separators stand between them (`E doc E doc E`), each begins with
    the one before it, from which its first token is predicted, and ends with the one behind it."""
    starts = np.zeros(1, np.int64) if tokens.starts is None else np.asarray(tokens.starts)
    stops = np.append(starts[1:] + tokens.separated, len(tokens))
    return ExampleSet(tokens.name, tokens.array, None, starts, stops, tokens.n_bytes, part_names=("text",))


def _digest(facts: str, splits: Sequence[ExampleSet], *, contents: bool = False) -> str:
    digest = hashlib.sha256(facts.encode())
    for split in splits:
        digest.update(split.starts.tobytes() + split.stops.tobytes())
        if contents and split.parts is not None:
            digest.update(split.array.tobytes() + split.parts.tobytes())
    return digest.hexdigest()[:32]
