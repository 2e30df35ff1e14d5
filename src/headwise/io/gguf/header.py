"""The header of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): what is said of the model, and
where its tensors lie.

    "GGUF" version:u32 n_tensors:u64 n_values:u64   then the values, then the tensors' table, padding, the tensors

Everything a header says is held against the file's size and the limits below *before* anything is allocated or walked,
so that a lying header costs neither time nor memory. The `gguf` library knows the types and takes quantised blocks
apart; its own reader is not used, since it trusts the header, and makes two arrays of every string of a vocabulary.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from headwise.errors import FormatError, short

# Far above any model that there is (values ~60, tensors ~1,700, merges ~600,000, chat templates ~30,000 bytes).
MOST_VALUES = 1024
MOST_TENSORS = 4096
MOST_STRINGS = 1 << 21  # in all arrays together
MOST_TEXT = 1 << 18  # bytes of a value that is one string
MOST_NAME = 256  # bytes
MOST_DIMS = 4
ALIGNMENT = 32  # of the tensors, unless general.alignment says otherwise
VERSIONS = (2, 3)

_STRING, _ARRAY, _BOOL = 8, 9, 7
# The other types of values: their number in the file → how numpy reads them.
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its shape as torch has it (the file says it backwards), and its bytes' place in the file."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    n_bytes: int


class Strings:
    """An array of strings in the file, made into strings when it is iterated over."""

    def __init__(self, file: Bytes, at: int, count: int) -> None:
        self._file, self._at, self._count = file, at, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        cursor = Cursor(self._file, self._at)
        for _ in range(self._count):
            yield cursor.string()


Value = int | float | bool | str | NDArray[Any] | Strings


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its tensors' values begin; arrays are views of the file, made when asked for."""

    path: Path
    bytes: Bytes
    values: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]


class Bytes:
    """A file mapped into memory, read only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise FormatError(f"{path} is missing") from None
        except (OSError, ValueError) as error:  # a folder, no permission; nothing in it
            raise FormatError(f"{path} cannot be read as a GGUF file: {error}") from None
        self.size = len(self.map)

    def array(self, start: int, count: int, dtype: str | type[np.generic]) -> NDArray[Any]:
        """`count` numbers from byte `start` on, not copied."""
        return np.frombuffer(self.map, dtype, count, start)


class Cursor:
    """Reads on from a place in the file, never past its end."""

    def __init__(self, file: Bytes, at: int) -> None:
        self.file, self.at = file, at

    def wrong(self, what: str) -> FormatError:
        return FormatError(f"{self.file.path} is no whole GGUF file: {what}")

    def need(self, n_bytes: int, what: str) -> None:
        """Refuse to go on where fewer than `n_bytes` are left."""
        left = self.file.size - self.at
        if n_bytes > left:
            raise self.wrong(f"{what} takes {n_bytes:,} bytes at byte {self.at:,}, and {left:,} are left")

    def u32(self) -> int:
        self.need(4, "a number")
        self.at += 4
        return int(_U32.unpack_from(self.file.map, self.at - 4)[0])

    def u64(self) -> int:
        self.need(8, "a number")
        self.at += 8
        return int(_U64.unpack_from(self.file.map, self.at - 8)[0])

    def string(self, most: int | None = None) -> str:
        length = self.u64()
        if most is not None and length > most:
            raise self.wrong(f"a text of {length:,} bytes at byte {self.at:,}; at most {most:,} are allowed there")
        self.need(length, "a string")
        self.at += length
        try:
            return self.file.map[self.at - length : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"the string at byte {self.at - length:,} is not UTF-8") from None

    def pass_strings(self, count: int) -> None:
        """Go past `count` strings, checking that all lie in the file."""
        self.need(8 * count, f"an array of {count:,} strings")
        unpack, data, at, last = _U64.unpack_from, self.file.map, self.at, self.file.size - 8
        for number in range(count):
            if at > last:
                raise self.wrong(f"string {number:,} of {count:,} lies past its end")
            at += 8 + unpack(data, at)[0]
        self.at = at
        self.need(0, "an array of strings")


def read_header(path: Path | str) -> Header:
    """The header of a GGUF file, checked.

    Raises:
        FormatError: the file is none, is cut short, or says what cannot be so, in one line.
    """
    file = Bytes(Path(path))
    cursor = Cursor(file, 0)
    if file.map[:4] != b"GGUF":
        raise FormatError(f"{path} is no GGUF file: it begins with {file.map[:4]!r}, not b'GGUF'")
    cursor.at = 4
    version = cursor.u32()
    if version not in VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        reason = "it is big-endian" if big_endian else f"it has version {version}"
        raise FormatError(f"{path}: {reason}; only little-endian files of versions 2 and 3 are read: convert it again")
    n_tensors, n_values = cursor.u64(), cursor.u64()
    for count, most, least, what in ((n_tensors, MOST_TENSORS, 32, "tensors"), (n_values, MOST_VALUES, 13, "values")):
        if count > most:
            raise cursor.wrong(f"it says it holds {count:,} {what}; at most {most:,} are allowed")
        cursor.need(count * least, f"a table of {count:,} {what}")
    values = _values(cursor, n_values)
    return Header(Path(path), file, values, _tensors(cursor, n_tensors, _alignment(cursor, values)))


# ---- values ----


def _values(cursor: Cursor, count: int) -> dict[str, Value]:
    values: dict[str, Value] = {}
    strings_left = MOST_STRINGS
    for _ in range(count):
        name = cursor.string(MOST_NAME)
        if name in values:
            raise cursor.wrong(f"the value {short(name)} is given twice")
        value = _value(cursor, name, strings_left)
        strings_left -= len(value) if isinstance(value, Strings) else 0
        values[name] = value
    return values


def _value(cursor: Cursor, name: str, strings_left: int) -> Value:
    kind = cursor.u32()
    if kind == _STRING:
        return cursor.string(MOST_TEXT)
    if kind != _ARRAY:
        return _numbers(cursor, name, kind, 1)[0].item()
    kind, count = cursor.u32(), cursor.u64()
    if kind == _ARRAY:
        raise cursor.wrong(f"the value {short(name)} is an array of arrays, which no model needs")
    if kind != _STRING:
        return _numbers(cursor, name, kind, count)
    if count > strings_left:
        raise cursor.wrong(f"{short(name)} says it holds {count:,} strings; at most {MOST_STRINGS:,} are allowed")
    strings = Strings(cursor.file, cursor.at, count)
    cursor.pass_strings(count)
    return strings


def _numbers(cursor: Cursor, name: str, kind: int, count: int) -> NDArray[Any]:
    """`count` numbers or truth values as they lie in the file."""
    if kind != _BOOL and kind not in _NUMBERS:
        raise cursor.wrong(f"the value {short(name)} is of type {kind}, which GGUF does not have")
    dtype = np.dtype(_NUMBERS.get(kind, "<u1"))
    cursor.need(count * dtype.itemsize, f"the value {short(name)}")
    numbers = cursor.file.array(cursor.at, count, dtype.str)
    cursor.at += count * dtype.itemsize
    if kind == _BOOL:
        if count and numbers.max() > 1:
            raise cursor.wrong(f"the value {short(name)} is neither true nor false")
        return numbers.view(np.bool_)
    return numbers


def _alignment(cursor: Cursor, values: Mapping[str, Value]) -> int:
    alignment = values.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.wrong(f"general.alignment is {short(alignment)}; a power of two is wanted")
    return alignment


# ---- tensors ----


def _tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    """The table of tensors, their places counted from the file's beginning."""
    table = [_tensor(cursor) for _ in range(count)]
    begin = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, kind, shape, offset, n_bytes in table:
        if name in tensors:
            raise cursor.wrong(f"the tensor {short(name)} is given twice")
        if offset % alignment:
            raise cursor.wrong(f"the tensor {short(name)} begins at {offset:,}, which is no multiple of {alignment}")
        tensors[name] = TensorInfo(name, kind, shape, begin + offset, n_bytes)
    end = 0
    for tensor in sorted(tensors.values(), key=lambda t: t.start):
        if tensor.start < end:
            raise cursor.wrong(f"the tensor {short(tensor.name)} lies over another")
        end = tensor.start + tensor.n_bytes
        if end > cursor.file.size:
            size = cursor.file.size
            raise cursor.wrong(f"the tensor {short(tensor.name)} ends at byte {end:,} of {size:,}; it is cut short")
    return tensors


def _tensor(cursor: Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]:
    name = cursor.string(MOST_NAME)
    n_dims = cursor.u32()
    if not 1 <= n_dims <= MOST_DIMS:
        raise cursor.wrong(f"the tensor {short(name)} has {n_dims} dimensions; 1 to {MOST_DIMS} are allowed")
    shape = tuple(cursor.u64() for _ in range(n_dims))[::-1]
    number = cursor.u32()
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise cursor.wrong(f"the tensor {short(name)} is of type {number}, which is not known here") from None
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % per_block:
        raise cursor.wrong(f"the tensor {short(name)} has shape {short(shape)}, which {kind.name} cannot hold")
    return name, kind, shape, cursor.u64(), prod(shape) // per_block * block_bytes
