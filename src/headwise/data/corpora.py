"""Where text comes from: the embedded Shakespeare, files, folders, JSON lines, Parquet, Hugging Face data sets.

A *source* is a run of documents (strings) that can be read again and again without being held in memory, and a
fingerprint of the bytes it is made from. `split` assigns every document to the training or the validation split:

- a source that brings its own split (see `open_source`) keeps it;
- a single document is cut as nanoGPT cuts it: the first 90 % of its characters train, the rest validate;
- several documents are ranked by a keyed hash of their text, and the lowest 10 % validate. The order of the
  documents does not matter, and two equal documents land on the same side, so none is ever in both.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwise.errors import DataError, SettingsError, nearest

EMBEDDED = "shakespeare"
_RECORDS = (".jsonl", ".ndjson", ".parquet")
_ROLE = re.compile(r"(train|validation|valid|val|test)([-_.].*)?")
_VALIDATION = ("validation", "valid", "val", "test")  # the first of these that is there is used

Reader = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Source:
    """Documents under a name. `parts` is {"train": …, "val": …} for a source that is split already, else {"all": …}."""

    name: str
    fingerprint: str
    parts: Mapping[str, Reader]


@dataclass(frozen=True)
class Corpus:
    """Documents with their split. `documents()` reads them all anew as (split, text), split being "train" or "val"."""

    name: str
    n_documents: Mapping[str, int]
    documents: Callable[[], Iterator[tuple[str, str]]]

    @property
    def has_boundaries(self) -> bool:
        """Whether any split holds more than one document, so that documents must be told apart."""
        return max(self.n_documents.values()) > 1


def open_source(data: str | Path, text_column: str = "text") -> Source:
    """The text named by `data`, nothing of it split or tokenized yet.

    - `"shakespeare"`: the embedded corpus, one document.
    - a text file (UTF-8): one document. A folder: every file in it or below (not hidden, not empty) is one document.
    - a `.jsonl` (or `.ndjson`) or `.parquet` file: one document a row, from `text_column`; rows without text are left
      out. A folder that holds such files is read as those, and whatever else lies in it is ignored.
    - `"hf:owner/name"` or `"hf:owner/name:config"`: a Hugging Face data set, from `text_column`.

    A folder is split already if it holds files named `train` and `validation`, `valid`, `val` or `test` (`test` is
    used only for want of the others; `train-00000-of-00002.parquet` counts too). In a folder of plain text that
    holds only if all files are so named: a source tree with a `train.py` and a `test.py` is no data set.

    Raises DataError if nothing readable is there.
    """
    if str(data) == EMBEDDED:
        return _embedded()
    if str(data).startswith("hf:"):
        return _hugging_face(str(data).removeprefix("hf:"), text_column)
    files = files_of(data)
    parts = {part: _reader(paths, text_column) for part, paths in files.items()}
    return Source(name_of(data), _fingerprint(files, text_column), parts)


def files_of(data: str | Path) -> dict[str, list[Path]]:
    """The files that `data` names, under "train" and "val" or under "all" (see `open_source`). Raises DataError."""
    path = Path(data).expanduser()
    with readable(path):
        if path.is_file():
            return {"all": [path]}
        elif path.is_dir():
            return _folder(path)
        elif path.exists():
            raise DataError(f"{str(path)!r} is neither a file nor a folder")
        else:
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            hint = nearest(str(data), [EMBEDDED]) or nearest(path.name, siblings)
            raise DataError(
                f"no file or folder {str(path)!r}{hint}; give {EMBEDDED!r}, a text, .jsonl or .parquet file, "
                "a folder of them, or 'hf:owner/name'"
            )


def name_of(data: str | Path) -> str:
    """What a file or folder is called in reports."""
    return Path(data).expanduser().resolve().stem or "text"


def split(source: Source, val_fraction: float = 0.1) -> Corpus:
    """Assigns every document of `source` to "train" or "val" (the rule is in this module's docstring).

    `val_fraction` is the share of characters (one document) or of distinct documents (several) that validates; a
    source that is split already pays it no heed. Reads all documents once. Raises DataError if a split has none.
    """
    if not 0 < val_fraction < 1:
        raise SettingsError(f"val_fraction is {val_fraction}; it must lie between 0 and 1 (0.1 = a tenth validates)")
    if "all" not in source.parts:
        counts = {part: sum(1 for _ in read()) for part, read in source.parts.items()}
        for part, count in counts.items():
            if not count:
                raise DataError(f"the {part} files of {source.name!r} hold no documents with text")
        return Corpus(source.name, counts, lambda: ((p, text) for p, read in source.parts.items() for text in read()))

    read = source.parts["all"]
    ranks = np.fromiter((rank(text) for text in read()), dtype=np.uint64)
    if not len(ranks):
        raise DataError(f"{source.name!r} holds no documents with text")
    if len(ranks) == 1:

        def halves() -> Iterator[tuple[str, str]]:
            for text in read():
                cut = int(len(text) * (1 - val_fraction))
                yield "train", text[:cut]
                yield "val", text[cut:]

        return Corpus(source.name, {"train": 1, "val": 1}, halves)

    limit = rank_limit(ranks, val_fraction, source.name)
    counts = {"train": int((ranks >= limit).sum()), "val": int((ranks < limit).sum())}
    return Corpus(source.name, counts, lambda: (("val" if rank(t) < limit else "train", t) for t in read()))


def rank_limit(ranks: NDArray[np.uint64], val_fraction: float, name: str) -> int:
    """Documents of a lower rank validate. Raises DataError where all are the same."""
    distinct = np.unique(ranks)
    if len(distinct) == 1:
        raise DataError(f"all {len(ranks)} documents of {name!r} are the same: there is nothing to validate on")
    n_val = min(max(round(val_fraction * len(distinct)), 1), len(distinct) - 1)
    return int(distinct[n_val])


def rank(text: str) -> int:
    """A document's place in the order by which documents are held out: a keyed hash of its text, 64 bits."""
    digest = hashlib.blake2b(utf8(text), digest_size=8, key=b"headwise validation split")
    return int.from_bytes(digest.digest(), "little")


def utf8(text: str) -> bytes:
    """The UTF-8 bytes of `text`. DataError for lone surrogates, which JSON escapes and command lines can bring."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(f"the text holds half a character (U+{code:04X}, at position {error.start:,})") from error


class readable:
    """Turns an OSError in its block into a DataError that names `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise DataError(f"cannot read {str(self.path)!r}: {error.strerror or error}") from error


# --- files ---------------------------------------------------------------------------------------------------------


def _embedded() -> Source:
    packed = resources.files("headwise.data").joinpath("shakespeare.txt.bz2").read_bytes()

    def read() -> Iterator[str]:
        yield bz2.decompress(packed).decode("ascii")

    return Source(EMBEDDED, hashlib.sha256(packed).hexdigest(), {"all": read})


def _folder(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by the part they belong to, in the order of their names."""
    paths = sorted(
        (p for p in folder.rglob("*") if p.is_file() and not _hidden(p.relative_to(folder)) and p.stat().st_size),
        key=lambda p: p.relative_to(folder).as_posix(),
    )
    if not paths:
        raise DataError(f"the folder {str(folder)!r} holds no files with text")
    records = [p for p in paths if p.suffix.lower() in _RECORDS]
    chosen = records or paths
    roles: dict[str, list[Path]] = {}
    for path in chosen:
        role = _ROLE.fullmatch(path.stem.lower())
        roles.setdefault(role[1] if role else "", []).append(path)
    held_out = next((role for role in _VALIDATION if role in roles), None)
    if "train" in roles and held_out and (records or "" not in roles):
        return {"train": roles["train"], "val": roles[held_out]}
    return {"all": chosen}


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _fingerprint(files: Mapping[str, list[Path]], text_column: str) -> str:
    """A digest of what is read: the bytes, part and kind of every file, and the column where that matters."""
    facts: list[Any] = []
    for part, paths in files.items():
        for path in paths:
            with readable(path), open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            kind = path.suffix.lower() if path.suffix.lower() in _RECORDS else "text"
            facts.append([part, kind, text_column if kind != "text" else "", digest])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _reader(paths: list[Path], text_column: str) -> Reader:
    def read() -> Iterator[str]:
        for path in paths:
            suffix = path.suffix.lower()
            if suffix == ".parquet":
                yield from _read_parquet(path, text_column)
            elif suffix in _RECORDS:
                yield from _read_jsonl(path, text_column)
            else:
                yield _read_text(path)

    return read


def _read_text(path: Path) -> str:
    with readable(path):
        data = path.read_bytes()
    text = _decode(data, path, 0).removeprefix("\ufeff")  # the byte order mark of Windows editors
    if not text:
        raise DataError(f"{str(path)!r} is empty")
    return text


def _decode(data: bytes, path: Path, offset: int) -> str:
    """UTF-8 text, line ends untouched. `offset` is where `data` begins in the file, for the error's sake."""
    if not offset and data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{str(path)!r} looks like UTF-16; convert it first: iconv -f UTF-16 -t UTF-8")
    if not offset and b"\0" in data[:8192]:
        raise DataError(f"{str(path)!r} is a binary file (it holds zero bytes), not UTF-8 text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise DataError(
            f"{str(path)!r} is not UTF-8: byte 0x{data[error.start]:02x} at byte offset {at:,} ({error.reason}); "
            "convert it first, e.g. iconv -f LATIN1 -t UTF-8"
        ) from error


def _read_jsonl(path: Path, text_column: str) -> Iterator[str]:
    for where, row in json_rows(path):
        if text_column not in row:
            raise _missing_column(where, text_column, list(row))
        yield from _text_of(row[text_column], where, text_column)


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file of JSON lines, each with words for where it stands. Raises DataError."""
    offset = n_lines = 0
    with readable(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{str(path)!r} line {number}"
            text = _decode(line, path, offset).removeprefix("\ufeff")
            offset += len(line)
            if not text.strip():
                continue
            n_lines += 1
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not JSON: {error.msg} at character {error.colno}") from error
            except RecursionError as error:
                raise DataError(f"{where} is not read: its brackets are nested too deeply") from error
            if not isinstance(row, dict):
                raise DataError(f"{where} is not a JSON object but {type(row).__name__}; give one object a line")
            yield where, row
    if not n_lines:
        raise DataError(f"{str(path)!r} is empty")


def _read_parquet(path: Path, text_column: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{str(path)!r} needs pyarrow to be read: pip install headwise[parquet]") from error
    with readable(path):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if text_column not in file.schema_arrow.names:
                    raise _missing_column(repr(str(path)), text_column, file.schema_arrow.names)
                number = 0
                for rows in file.iter_batches(batch_size=1024, columns=[text_column]):
                    for value in rows.column(0).to_pylist():
                        number += 1
                        yield from _text_of(value, f"{str(path)!r} row {number}", text_column)
        except pyarrow.ArrowException as error:
            raise DataError(f"{str(path)!r} is not a readable Parquet file: {_first_line(error)}") from error


def _text_of(value: object, where: str, text_column: str) -> Iterator[str]:
    """The document in one cell, or nothing where the cell holds none."""
    if value is None or value == "":
        return
    if not isinstance(value, str):
        raise DataError(f"{where}: column {text_column!r} holds {type(value).__name__}, not text")
    try:
        utf8(value)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    yield value


def _missing_column(where: str, column: str, columns: list[str]) -> DataError:
    known = ", ".join(columns) or "none"
    return DataError(
        f"{where} has no column {column!r}{nearest(column, columns)}; its columns: {known} (set text_column)"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# --- Hugging Face --------------------------------------------------------------------------------------------------


def _hugging_face(address: str, text_column: str) -> Source:
    name, _, config = address.partition(":")
    if not name:
        raise DataError("'hf:' names no data set; give 'hf:owner/name' or 'hf:owner/name:config'")
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"'hf:{address}' needs the datasets library: pip install headwise[hf]") from error
    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # connection, hub, script and config errors have no common base class
        raise DataError(
            f"cannot load the Hugging Face data set {address!r}: {_first_line(error)}; check the name and the network, "
            "or download it once and give its folder"
        ) from error
    held_out = next((part for part in _VALIDATION if part in loaded), None)
    if "train" in loaded and held_out:
        chosen = {"train": loaded["train"], "val": loaded[held_out]}
    else:
        chosen = {"all": loaded["train" if "train" in loaded else next(iter(loaded))]}
    for table in chosen.values():
        if text_column not in table.column_names:
            raise _missing_column(f"'hf:{address}'", text_column, table.column_names)

    def reader(table: Any) -> Reader:
        def read() -> Iterator[str]:
            number = 0
            for rows in table.select_columns([text_column]).iter(batch_size=1024):
                for value in rows[text_column]:
                    number += 1
                    yield from _text_of(value, f"'hf:{address}' row {number}", text_column)

        return read

    parts = {part: reader(table) for part, table in chosen.items()}
    digest = hashlib.sha256()
    for part, read in parts.items():
        for text in read():
            data = utf8(text)
            digest.update(f"{part} {len(data)} ".encode() + data)
    return Source(name.split("/")[-1], digest.hexdigest(), parts)
