"""The header of a safetensors file, checked against the file before anything is made of it.

    8 bytes   N, the header's length, little-endian
    N bytes   JSON: {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …, "__metadata__": {text: text}}
    the rest  the tensors, one after another without gaps

The library checks most of this too. Here it is done first and with bounds: a header that promises more than the file
holds costs no memory, and each fault is one clear line.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, TypeGuard

from headwise.errors import FormatError, short
from headwise.io.json_file import parse_object

MOST_HEADER = 100_000_000  # bytes; the format's own limit
MOST_DIMS = 16
# A tensor's entry has 11 signs (see `json_file`), and a tensor some bytes.
FREE_SIGNS, BYTES_A_SIGN = 1 << 14, 50
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
}


def check_header(path: Path) -> None:
    """Refuse a file whose header is malformed, or describes other data than the file holds. Raises FormatError."""
    header, size = _header(path)
    entries = parse_object(header, f"{path}: its header", FREE_SIGNS + size // BYTES_A_SIGN)
    if not _is_metadata(entries.pop("__metadata__", {})):
        raise damaged(path, "its __metadata__ is no object of texts")
    end = 0
    for start, stop, name in sorted(_place(path, name, entry) for name, entry in entries.items()):
        if start != end:
            fault = "overlaps the tensor before it" if start < end else "leaves a gap before it"
            raise damaged(path, f"{short(name)}, at byte {start:,}, {fault}")
        end = stop
    if (held := size - 8 - len(header)) != end:
        raise damaged(path, f"its header describes {end:,} bytes of tensors, and it holds {held:,}")


def damaged(path: Path, fault: str) -> FormatError:
    """The error of a file that is not what it should be."""
    return FormatError(f"{path} is damaged or no safetensors file: {fault}")


def _header(path: Path) -> tuple[bytes, int]:
    """The header's bytes, and the size of the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8:
                raise damaged(path, f"it has {size} bytes")
            if length > min(size - 8, MOST_HEADER):
                raise damaged(path, f"{size:,} bytes cannot hold a header of {length:,} bytes")
            return file.read(length), size
    except FileNotFoundError:
        raise FormatError(f"{path} is missing") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from None


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _place(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """Where a tensor's bytes start and stop, and its name."""
    if not isinstance(entry, dict):
        raise damaged(path, f"what its header says of {short(name)} is no object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (_are_sizes(shape) and len(shape) <= MOST_DIMS and _are_sizes(offsets) and len(offsets) == 2):
        raise damaged(path, f"shape or data_offsets of {short(name)} is missing or malformed")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FormatError(f"{path}: {short(name)} is of dtype {short(dtype)}; allowed: {', '.join(BITS)}")
    start, stop = offsets
    if math.prod(shape) * BITS[dtype] != (stop - start) * 8:
        raise damaged(path, f"{short(name)} of shape {short(shape)} in {dtype} cannot lie in bytes {start} to {stop}")
    return start, stop, name


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
