"""Floor 1: tensor functions without modules. A folder an operation; `naive.py` is the readable definition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_naive = False


@contextmanager
def naive() -> Iterator[None]:
    """Inside this context every kernel runs its readable definition; the tests hold the fast forms against it."""
    global _naive
    before, _naive = _naive, True
    try:
        yield
    finally:
        _naive = before


def naive_wanted() -> bool:
    """Whether the readable definitions are asked for."""
    return _naive
