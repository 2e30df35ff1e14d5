"""JSON objects from files of others: bounded in size before they are read, and every fault a FormatError.

Python needs some 100 bytes for a value that takes two in a file. So the signs that stand before values are counted
first, and a file with more of them than its kind ever has is not read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headwise.errors import FormatError

SIGNS = (b",", b":", b"[", b"{")


def read_object(path: Path, most: int, most_signs: int = 1 << 14) -> dict[str, Any]:
    """The JSON object in `path`, a file of at most `most` bytes and `most_signs` signs. Raises FormatError."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise FormatError(f"{path} is missing") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(data) > most:
        raise FormatError(f"{path} is larger than {most:,} bytes, more than such a file ever has")
    return parse_object(data, str(path), most_signs)


def parse_object(data: bytes, where: str, most_signs: int) -> dict[str, Any]:
    """The JSON object that `data` is, in UTF-8. Raises FormatError."""
    if sum(map(data.count, SIGNS)) > most_signs:
        raise FormatError(f"{where} is damaged: it lists more values than such a file ever has")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_twice)
    except RecursionError:
        raise FormatError(f"{where} is damaged: nested too deep") from None
    except ValueError as error:
        raise FormatError(f"{where} is damaged or no JSON ({error})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{where} holds no JSON object")
    return value


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found
