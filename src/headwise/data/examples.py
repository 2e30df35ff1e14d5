"""Texts with parts, tokenized: examples one behind the other.

A split is a run of examples: rows whose parts are known (`data.segments`), or documents of plain text, all of one part.

    examples = load_examples("gsm8k", "models/smollm2")
    examples.train.part_names                                   # ("prompt", "reasoning", "answer")
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwise.data.corpora import (
    EMBEDDED,
    Corpus,
    files_of,
    json_rows,
    name_of,
    open_source,
    rank,
    rank_limit,
    split,
    utf8,
)
from headwise.data.pack import Tokens, load_dataset, token_dtype
from headwise.data.segments import PARTS, Example, Format, Span, detect, reader
from headwise.data.tokenizers import Tokenizer, load_tokenizer, plan_tokenizer
from headwise.errors import DataError, SettingsError

_MOST_PARTS = 256
_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class ExampleSet:
    """The tokens of one split, example by example.

    `array`: ids, uint16 or uint32, flat. `parts`: uint8, the part of each as its place in `part_names`; None: all are
    of the first. `starts`, `stops`: int64 [n_examples], where each example lies; those of plain text may share the
    token between them. `n_bytes`: length of the text in UTF-8. `texts`: the examples as they were read, and `places`:
    int64 [n, 2], the characters of its example that each token stands for (as `Tokenizer.encode_places`); () and None
    for plain text, unless it was asked for.
    """

    name: str
    array: NDArray[Any]
    parts: NDArray[np.uint8] | None
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    n_bytes: int
    part_names: tuple[str, ...]
    texts: Sequence[Example] = ()
    places: NDArray[np.int64] | None = None

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
    keep_texts: bool = False,
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
        keep_texts: plain text too is held in memory with the place of each token, so that another tokenizer can read
            it (`data.spans`).

    Raises DataError, in one line with file and row, for what cannot be read, split, cut into parts or encoded.
    """
    if format == "auto":
        format = detected(data)
    if format == "text" and (train_limit is not None or val_limit is not None):
        raise SettingsError("train_limit and val_limit count examples with parts; these data are plain text")
    if format == "text" and not keep_texts:
        dataset = load_dataset(data, tokenizer, text_column=text_column, val_fraction=val_fraction, cache_dir=cache_dir)
        splits = [text_examples(dataset.train), text_examples(dataset.val)]
        fingerprint = _digest(dataset.fingerprint, splits)
        return Examples(dataset.name, dataset.tokenizer, splits[0], splits[1], fingerprint, ("text",), format)

    brought = _brought(tokenizer)
    if format == "text":
        name, by_side = _read_text(data, text_column, val_fraction)
    else:
        name, by_side = _read(data, format, brought, val_fraction)
    by_side = {"train": by_side["train"][:train_limit], "val": by_side["val"][:val_limit]}
    corpus = Corpus(
        name,
        {side: len(examples) for side, examples in by_side.items()},
        lambda: ((side, example.text) for side, examples in by_side.items() for example in examples),
    )
    made = plan_tokenizer(brought or tokenizer).fit(corpus)
    seen = {span.part for examples in by_side.values() for example in examples for span in example.spans}
    parts = (*(part for part in PARTS if part in seen), *sorted(seen.difference(PARTS)))
    if len(parts) > _MOST_PARTS:
        raise DataError(f"{name!r} has {len(parts):,} kinds of parts; at most {_MOST_PARTS} can be told apart")
    train, val = (_encoded(f"{name} ({side})", by_side[side], made, parts) for side in ("train", "val"))
    fingerprint = _digest(f"{made.fingerprint} {parts}", [train, val], contents=True)
    return Examples(name, made, train, val, fingerprint, parts, format)


def detected(data: str | Path) -> Format:
    """What `data` look like by their first row; "text" for all but files of JSON lines."""
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


def _read_text(data: str | Path, text_column: str, val_fraction: float) -> tuple[str, Mapping[str, list[Example]]]:
    """The documents of each split as examples of one part."""
    corpus = split(open_source(data, text_column), val_fraction)
    sides: dict[str, list[Example]] = {"train": [], "val": []}
    for side, text in corpus.documents():
        sides[side].append(Example(text, (Span(0, len(text), "text"),), where=f"a document of {corpus.name!r}"))
    return corpus.name, sides


def _encoded(name: str, examples: Sequence[Example], tokenizer: Tokenizer, parts: tuple[str, ...]) -> ExampleSet:
    """The examples' tokens. Texts without special tokens of their own get what the tokenizer begins and ends one with;
    a token that lies across a cut belongs to the part in which it begins."""
    ids, of_part, where = [], [], []
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
            outside = [np.full((len(added), 2), at) for added, at in ((begin, 0), (end, len(example.text)))]
            places = np.concatenate([outside[0], places, outside[1]])
        ids.append(tokens)
        of_part.append(own)
        where.append(places)
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
        places=np.concatenate([np.empty((0, 2), np.int64), *where]),
    )


def text_examples(tokens: Tokens) -> ExampleSet:
    """Packed text: every document an example. Where separators stand between them (`E doc E doc E`), each begins with
    the one before it, from which its first token is predicted, and ends with the one behind it."""
    starts = np.zeros(1, np.int64) if tokens.starts is None else np.asarray(tokens.starts)
    stops = np.append(starts[1:] + tokens.separated, len(tokens))
    return ExampleSet(tokens.name, tokens.array, None, starts, stops, tokens.n_bytes, part_names=("text",))


def _digest(facts: str, splits: Sequence[ExampleSet], *, contents: bool = False) -> str:
    digest = hashlib.sha256(facts.encode())
    for each in splits:
        digest.update(each.starts.tobytes() + each.stops.tobytes())
        if contents and each.parts is not None:
            digest.update(each.array.tobytes() + each.parts.tobytes())
    return digest.hexdigest()[:32]
