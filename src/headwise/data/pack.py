"""Packed tokens on disk: one flat array a split, memory-mapped, built once and shared by every process that asks.

The cache folder of a data set is named by a fingerprint of the data's bytes, the split and the tokenizer, so it
never goes stale, and it is renamed into place whole, so it is never half there:

    packed/<name>-<fingerprint>/header.json                  sizes and checksums; what does not fit is built again
                                train.bin, val.bin           token ids, little-endian uint16 or uint32
                                train.starts.bin, …          where each document begins, int64; only for several
                                tokenizer/                   what `load_tokenizer` reads

A split of one document is its tokens and nothing else. Several documents lie one behind the other; where the tokenizer
has an end-of-document id E they lie as `E doc E doc E`. Each document's segment begins with the E before it: that E is
the start from which the document's first token is predicted, and the E after it is predicted at the document's end.
Every token of every document is thus predicted exactly once, and always from its own document.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from headwise.data.corpora import Corpus, Source, open_source, split, utf8
from headwise.data.tokenizers import Tokenizer, TokenizerPlan, load_tokenizer, plan_tokenizer
from headwise.errors import DataError
from headwise.io.atomic import WriteError, atomic_dir, write_json

_FORMAT = 1  # of the cache folder; a new one leaves old folders unread
_SPLITS = ("train", "val")
_CHECKED_BYTES = 1 << 26  # files up to this size are verified by checksum on every opening, larger ones by their size


@dataclass(frozen=True)
class Tokens:
    """The packed tokens of one split.

    `array`: token ids, shape [n], uint16 or uint32, memory-mapped and read-only.
    `starts`: where each document's segment begins, int64, ascending; None for a single document.
    `separated`: whether each segment begins with the tokenizer's eos (see this module's docstring).
    `n_bytes`: length of the split's text in UTF-8, separators not counted.
    """

    array: NDArray[Any]
    n_bytes: int
    n_documents: int = 1
    starts: NDArray[np.int64] | None = None
    separated: bool = False
    name: str = "text"

    def __len__(self) -> int:
        return len(self.array)

    @property
    def n_targets(self) -> int:
        """Tokens that `eval_batches` predicts: all but the first or, without separators, all but documents' firsts."""
        return len(self) - (1 if self.separated else self.n_documents)

    def bits_per_byte(self, nats: float) -> float:
        """Bits a byte of text, from the summed negative log-likelihood (nats) of all this split's targets.

        Independent of the tokenizer, so it compares across vocabularies.
        """
        return nats / math.log(2) / self.n_bytes


@dataclass(frozen=True)
class Dataset:
    """A corpus tokenized and split. `fingerprint` is the same wherever data, split and tokenizer are the same."""

    name: str
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    fingerprint: str
    folder: Path

    @property
    def bits_per_byte_factor(self) -> float:
        """What a mean loss over the validation targets (nats a token) is multiplied with to give bits a byte."""
        return self.val.bits_per_byte(self.val.n_targets)


def load_dataset(
    data: str | Path = "shakespeare",
    tokenizer: str | Path | Tokenizer = "char",
    *,
    cache_dir: Path | str | None = None,
    text_column: str = "text",
    val_fraction: float = 0.1,
    progress: bool = False,
) -> Dataset:
    """Reads, splits and tokenizes `data`, or opens the cache of an earlier call; safe from many processes at once.

    `data`: see `corpora.open_source`. `tokenizer`: "char", "byte", "bpe" (4096 ids), "bpe:VOCAB", the path of a
    tokenizer.json or of a folder with one, or a Tokenizer. `cache_dir`: see `default_cache_dir`. `val_fraction`: the
    share that validates, where the data is not split already. `progress` shows a counter on stderr while packing.

    Raises DataError for data that cannot be read, split or encoded and for a cache that cannot be written.
    """
    source = open_source(data, text_column)
    plan = plan_tokenizer(tokenizer)
    facts = json.dumps([_FORMAT, source.fingerprint, sorted(source.parts), repr(float(val_fraction)), plan.key])
    fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:32]
    root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    folder = root / "packed" / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', source.name)[:40]}-{fingerprint}"

    dataset = _open(folder, source.name, fingerprint)
    if dataset is None:
        try:
            _build(folder, source, plan, fingerprint, val_fraction, progress)
        except WriteError as error:
            raise DataError(f"{error} (packed tokens go there; set HEADWISE_CACHE to another folder)") from error
        dataset = _open(folder, source.name, fingerprint)
        if dataset is None:
            raise DataError(f"the packed tokens in {str(folder)!r} cannot be read back; check the disk")
    for part, tokens in (("training", dataset.train), ("validation", dataset.val)):
        if tokens.n_targets < 1:
            raise DataError(
                f"{source.name!r} is too short: its {part} split has {len(tokens)} tokens and nothing to predict; "
                f"give more text or another share for validation (val_fraction is {val_fraction})"
            )
    return dataset


def default_cache_dir() -> Path:
    """$HEADWISE_CACHE, else $XDG_CACHE_HOME/headwise, else ~/.cache/headwise."""
    if own := os.environ.get("HEADWISE_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path("~/.cache").expanduser()) / "headwise"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id below `vocab_size`. Raises DataError beyond 32 bits."""
    for name in ("<u2", "<u4"):
        dtype = np.dtype(name)
        if vocab_size <= np.iinfo(dtype).max + 1:
            return dtype
    raise DataError(
        f"a vocabulary of {vocab_size:,} ids does not fit the largest token type, uint32 (4,294,967,296 ids)"
    )


def _open(folder: Path, name: str, fingerprint: str) -> Dataset | None:
    """The data set in `folder`, or None if it is not there or is not what its header says."""
    try:
        header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
        if header["format"] != _FORMAT or header["fingerprint"] != fingerprint or header["files"] != _describe(folder):
            return None
        splits = [_open_split(folder, part, header, f"{name} ({part})") for part in _SPLITS]
        return Dataset(name, load_tokenizer(folder / "tokenizer"), splits[0], splits[1], fingerprint, folder)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, DataError):
        return None
    except OSError as error:
        raise DataError(f"cannot read the cache {str(folder)!r}: {error.strerror or error}") from error


def _open_split(folder: Path, part: str, header: dict[str, Any], name: str) -> Tokens:
    facts = header["splits"][part]
    file, starts = folder / f"{part}.bin", folder / f"{part}.starts.bin"
    dtype = np.dtype(header["dtype"])
    return Tokens(
        # An empty file cannot be mapped; the caller reports it.
        array=np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype),
        n_bytes=facts["bytes"],
        n_documents=facts["documents"],
        starts=np.memmap(starts, dtype="<i8", mode="r") if starts.exists() else None,
        separated=facts["separated"],
        name=name,
    )


def _describe(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 (0 for large files) of everything in a cache folder but the header, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "header.json":
            size = path.stat().st_size
            checksum = zlib.crc32(path.read_bytes()) if size <= _CHECKED_BYTES else 0
            found[path.relative_to(folder).as_posix()] = [size, checksum]
    return found


def _build(
    folder: Path, source: Source, plan: TokenizerPlan, fingerprint: str, val_fraction: float, progress: bool
) -> None:
    """Splits, tokenizes and packs into `folder`. Of processes that build at once, the first to finish puts it there."""
    corpus = split(source, val_fraction)
    broken = folder.exists()
    tokenizer = plan.fit(corpus)
    dtype = token_dtype(tokenizer.vocab_size)
    with atomic_dir(folder, replace=broken) as temporary:
        tokenizer.save(temporary / "tokenizer")
        with ExitStack() as files, _counter(source.name, progress) as report:
            packers = {
                part: _Packer(files.enter_context(open(temporary / f"{part}.bin", "wb")), tokenizer, dtype, corpus)
                for part in _SPLITS
            }
            for part, text in corpus.documents():
                packers[part].add(text, report)
        for part, packer in packers.items():
            if len(packer.starts) > 1:
                starts = np.array(packer.starts, dtype="<i8")
                (temporary / f"{part}.starts.bin").write_bytes(starts.tobytes())
        header = {
            "format": _FORMAT,
            "fingerprint": fingerprint,
            "dtype": dtype.str,
            "splits": {part: packer.facts() for part, packer in packers.items()},
            "files": _describe(temporary),
        }
        write_json(temporary / "header.json", header)


class _Packer:
    """Appends the documents of one split to its token file."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer, dtype: np.dtype[Any], corpus: Corpus) -> None:
        self.file, self.tokenizer, self.dtype = file, tokenizer, dtype
        self.separator = tokenizer.eos_id if corpus.has_boundaries else None
        self.n_tokens = self.n_bytes = 0
        self.starts: list[int] = []
        if self.separator is not None:
            self._write(np.array([self.separator]))

    def add(self, text: str, report: Callable[[int], None]) -> None:
        start, n_bytes = self.n_tokens, 0
        for piece in self.tokenizer.pieces(text):
            n_bytes += len(utf8(piece))
            ids = self.tokenizer.encode(piece)
            if ids.size and int(ids.max()) >= self.tokenizer.vocab_size:
                raise DataError(f"the tokenizer gave id {ids.max()}, beyond its {self.tokenizer.vocab_size:,} ids")
            self._write(ids)
            report(len(ids))
        if self.n_tokens == start:  # a tokenizer may drop all of a text
            return
        self.n_bytes += n_bytes
        self.starts.append(start - (self.separator is not None))
        if self.separator is not None:
            self._write(np.array([self.separator]))

    def facts(self) -> dict[str, int | bool]:
        separated = self.separator is not None
        return {"documents": len(self.starts), "bytes": self.n_bytes, "separated": separated}

    def _write(self, ids: NDArray[np.int64]) -> None:
        self.file.write(ids.astype(self.dtype).tobytes())
        self.n_tokens += len(ids)


@contextmanager
def _counter(name: str, visible: bool) -> Iterator[Callable[[int], None]]:
    """A function to report written tokens to; they are counted on stderr if `visible`."""
    if not visible:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("packing {task.description}: {task.completed:,} tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda n: bar.update(task, advance=n)
