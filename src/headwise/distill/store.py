"""What a teacher makes of each window, computed once and kept on disk.

    FOLDER/header.json            what it was made of: teacher, data, seq_len, and how its numbers are kept
           shard-00000.safetensors, …   some windows each: "17.keys", "17.values", …, [*, n, D] of a window of n tokens

Shards are written whole or not at all, and mapped into memory when they are read: a store may be larger than the
memory, several processes share it, and an interrupted filling goes on after its last whole shard. In float32 training
from a store is bit-identical to training beside the teacher; int8 keeps a scale for each token and head, its largest
magnitude / 127, and so differs by at most half of that.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.data.pack import default_cache_dir
from headwise.errors import DataError
from headwise.io.atomic import atomic_file, write_error, write_json
from headwise.io.checkpoint import read_json
from headwise.io.tensors import read_tensors, write_tensors
from headwise.train.progress import wanted

Dtype = Literal["float32", "bfloat16", "int8"]
Signals = Mapping[str, Tensor]

_FORMAT, _VERSION = "headwise-teacher-cache", 1
_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_SHARD = 1 << 26  # bytes, about
_SCALE = ".scale"
_WORDS = {"teacher": "teacher", "data": "data set", "seq_len": "seq_len", "dtype": "dtype"}


@dataclass(frozen=True)
class StoreKey:
    """What a store is made of. `teacher`, `data`: fingerprints, the latter of data, split and tokenizer."""

    teacher: str
    data: str
    seq_len: int
    dtype: Dtype = "float32"

    def folder(self) -> Path:
        """Where such a store lies if nobody says otherwise, in Headwise's cache folder."""
        name = f"{self.teacher[:12]}-{self.data[:12]}-{self.seq_len}-{self.dtype}"
        return default_cache_dir() / "teachers" / name


class TeacherStore:
    """The store in `folder`, which need not be there yet.

    Args:
        folder: of its own.
        key: what it must have been made of.
        lengths: int64 [n], tokens of each window (`Windows.lengths`).
        names: the fields that will be asked for.

    Attributes:
        shapes: of each field, its dimensions without the tokens', as {"keys": (L, H, D)}; empty before it is filled.

    Raises:
        DataError: the folder holds a store made of something else, of other windows, or without some of the fields.
        FormatError: it is damaged, or holds something else.
    """

    def __init__(
        self, folder: Path | str, key: StoreKey, lengths: NDArray[np.int64], names: Collection[str] = ()
    ) -> None:
        self.folder, self.key, self.lengths = Path(folder), key, lengths
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._rows: dict[int, dict[str, Tensor]] = {}
        self._shards: set[Path] = set()
        self._look()
        if self.shapes:
            self._check_held(names)

    def __len__(self) -> int:
        """How many windows it holds."""
        return len(self._rows)

    def missing(self, rows: Iterable[int]) -> list[int]:
        """Those of the windows that it does not hold yet, ascending."""
        return sorted(set(map(int, rows)).difference(self._rows))

    def size_of(self, rows: Iterable[int], shapes: Mapping[str, Sequence[int]]) -> int:
        """Bytes that windows take in the files, names aside; `shapes` as the attribute."""
        a_token = sum(_token_bytes(shape, self.key.dtype) for shape in shapes.values())
        return int(self.lengths[list(rows)].sum()) * a_token

    def fill(
        self,
        rows: Iterable[int],
        read: Callable[[int], Signals],
        *,
        say: Callable[[str], None] = lambda text: None,
        progress: bool | None = None,
    ) -> None:
        """Compute and keep the windows that are missing.

        Args:
            rows: numbers of windows, those of the training batches say (`WindowBatches.rows_of`).
            read: what the teacher makes of one window of n tokens, every field [*, n, D] float.
            say: told once, before anything but the first window is computed, how much is to come.
            progress: draw a bar on stderr; None: where it is a terminal.

        Raises:
            DataError: the disk has not the space for it, or the store holds other fields than `read` gives.
            WriteError: the disk fails; whole shards are kept.
        """
        if not self.missing(rows):
            return
        with self._claimed():
            self._look()  # another process may just have done it
            if not (todo := self.missing(rows)):
                return
            first = read(todo[0])
            shapes = {name: (*tensor.shape[:-2], tensor.shape[-1]) for name, tensor in first.items()}
            self._check_fields(shapes)
            say(self._room(todo, shapes))
            if not self.shapes:
                about = {"format": _FORMAT, "version": _VERSION, **asdict(self.key), "windows": len(self.lengths)}
                write_json(self.folder / "header.json", {**about, "fields": shapes})
            with _bar(len(todo), progress) as advance:
                shard: dict[str, Tensor] = {}
                for number, row in enumerate(todo):
                    signals = first if number == 0 else read(row)
                    shard |= {f"{row}.{name}": tensor for name, tensor in _packed(signals, self.key.dtype).items()}
                    advance()
                    if row == todo[-1] or sum(tensor.nbytes for tensor in shard.values()) >= _SHARD:
                        with atomic_file(self.folder / f"shard-{len(self._shards):05d}.safetensors") as file:
                            write_tensors(file, shard)
                        shard = {}
                        self._look()

    def get(self, rows: Iterable[int], names: Iterable[str]) -> dict[str, Tensor]:
        """The fields of these windows, float32 [B, *, seq_len, D], zeros behind the tokens of each.

        Raises DataError for a field or a window that it does not hold.
        """
        rows, names = [int(row) for row in rows], list(names)
        self._check_held(names)
        if absent := self.missing(rows):
            raise DataError(f"the teacher cache in {self.folder} does not hold window {absent[0]:,}; fill it first")
        return {name: self._stacked(rows, name) for name in names}

    def _stacked(self, rows: list[int], name: str) -> Tensor:
        *outer, width = self.shapes[name]
        out = torch.zeros(len(rows), *outer, self.key.seq_len, width)
        for place, row in enumerate(rows):
            held = self._rows[row]
            target = out[place, ..., : int(self.lengths[row]), :]
            target.copy_(held[name])
            if (scale := held.get(name + _SCALE)) is not None:
                target.mul_(scale.unsqueeze(-1))
        return out

    def _look(self) -> None:
        """Open what has come into the folder since the last look."""
        header = self.folder / "header.json"
        if not header.exists():
            if self.folder.is_dir() and any(self.folder.glob("[!.]*")):
                raise DataError(f"{self.folder} holds something else than a teacher cache; choose another folder")
            return
        if not self.shapes:
            self._check_header(read_json(header, _FORMAT, _VERSION))
        for shard in sorted(set(self.folder.glob("shard-*.safetensors")).difference(self._shards)):
            for name, tensor in read_tensors(shard).items():
                row, _, field = name.partition(".")
                self._rows.setdefault(int(row), {})[field] = tensor
            self._shards.add(shard)

    def _check_header(self, about: dict[str, Any]) -> None:
        own = asdict(self.key)
        other = [each.name for each in fields(StoreKey) if about.get(each.name) != own[each.name]]
        if not other and about.get("windows") != len(self.lengths):
            other = ["data"]
        if other:
            name = other[0]
            found = "" if name in ("teacher", "data") else f" ({about.get(name)}, wanted is {own[name]})"
            raise DataError(
                f"the teacher cache in {self.folder} was made with another {_WORDS[name]}{found}; "
                "choose another folder for this one, or delete it"
            )
        self.shapes = {name: tuple(shape) for name, shape in about["fields"].items()}

    def _check_held(self, names: Collection[str]) -> None:
        if unknown := sorted(set(names).difference(self.shapes)):
            raise DataError(
                f"the teacher cache in {self.folder} holds {', '.join(self.shapes) or 'nothing yet'}, "
                f"not {', '.join(unknown)}; choose another folder for these"
            )

    def _check_fields(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if self.shapes and self.shapes != shapes:
            raise DataError(
                f"the teacher cache in {self.folder} holds {_named(self.shapes)}, and wanted are {_named(shapes)}; "
                "choose another folder for these, or delete it"
            )

    def _room(self, rows: list[int], shapes: Mapping[str, tuple[int, ...]]) -> str:
        """In words, what the rows take; DataError where the disk has not that much."""
        size, free = self.size_of(rows, shapes), shutil.disk_usage(self.folder).free
        text = f"the teacher's {', '.join(shapes)} of {len(rows):,} windows take {_gb(size)} in {self.key.dtype}"
        if size > free:
            raise DataError(
                f"{text}, and the disk of {self.folder} has {_gb(free)} free; use bfloat16 or int8, fewer steps, "
                "a folder on another disk, or no cache"
            )
        return f"{text}; {self.folder} has {_gb(free)} free"

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """One process fills at a time, the others wait; the lock goes with the process, however it ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("wb")
        except OSError as error:
            raise write_error(self.folder, error) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _packed(signals: Signals, dtype: Dtype) -> dict[str, Tensor]:
    """The tensors as they are kept."""
    if dtype != "int8":
        return {name: tensor.to("cpu", getattr(torch, dtype)) for name, tensor in signals.items()}
    packed = {}
    for name, tensor in signals.items():
        x = tensor.to("cpu", torch.float32)
        scale = x.abs().amax(-1, keepdim=True) / 127
        packed[name] = (x / scale.clamp_min(torch.finfo(x.dtype).tiny)).round().to(torch.int8)
        packed[name + _SCALE] = scale.squeeze(-1)
    return packed


def _token_bytes(shape: Sequence[int], dtype: Dtype) -> int:
    """Of one field; int8 with its scales."""
    return prod(shape) * _BYTES[dtype] + (prod(shape[:-1]) * 4 if dtype == "int8" else 0)


def _named(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.3f} MB"


@contextmanager
def _bar(total: int, progress: bool | None) -> Iterator[Callable[[], None]]:
    """A function to call for each window; they are counted on stderr if that is wanted."""
    if not wanted(progress):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("teacher cache", total=total)
        yield lambda: bar.advance(task)
