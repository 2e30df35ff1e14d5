"""Memory of the processor that a computation frees is kept for what it does next.

The C library hands large blocks back to the system as soon as they are freed, and the next step pays for every page
again: about a thousand page faults and 3 to 5 % of a small model's training step; 190,000 of them and a fifth of the
time where a model of 135 M reads a prompt of 1,024 tokens. Inside `kept_memory` the library keeps them.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

# glibc's mallopt parameters (malloc.h), where its own adaptation of both limits ends, and how many blocks it maps.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
KEEP = 1 << 30
USUAL = 32 << 20
MAPPED = 65_536

_inside = 0  # how many are in `kept_memory` at this moment
_lock = Lock()


@cache
def _mallopt() -> Callable[[int, int], int] | None:
    mallopt: Callable[[int, int], int] | None = None
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
    return mallopt


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let freed blocks of up to 1 GiB stay with this process; once nobody is inside, those over 32 MiB go back. Glibc
    only."""
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    _enter(1, mallopt)
    try:
        yield
    finally:
        _enter(-1, mallopt)


def _enter(change: int, mallopt: Callable[[int, int], int]) -> None:
    global _inside
    with _lock:
        before, _inside = _inside, _inside + change
        if not before or not _inside:
            mallopt(M_TRIM_THRESHOLD, KEEP if _inside else 2 * USUAL)
            if not mallopt(M_MMAP_THRESHOLD, KEEP if _inside else USUAL):
                mallopt(M_MMAP_MAX, 0)  # an older glibc takes no limit over 32 MiB
            elif not _inside:
                mallopt(M_MMAP_MAX, MAPPED)
