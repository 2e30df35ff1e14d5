"""Memory that is kept: freed blocks stay with the process for as long as anybody is inside."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

from headwise import allocator
from headwise.allocator import kept_memory

MB = 1 << 20
LIBRARY = ctypes.CDLL(None)


class Books(ctypes.Structure):
    """The C library's own account of its memory, mallinfo(3). (Not every system counts the page faults saved.)"""

    # Mapped from the system: hblkhd bytes. On the heap: uordblks in use, fordblks free.
    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_int) for name in NAMES)


LIBRARY.mallinfo.restype = Books
LIBRARY.malloc.argtypes, LIBRARY.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
LIBRARY.free.argtypes = [ctypes.c_void_p]


def is_kept(megabytes: int) -> bool:
    """Whether a block comes from the heap and stays there once freed; else it is of the system and goes back to it."""
    before = LIBRARY.mallinfo()
    block = LIBRARY.malloc(megabytes * MB)
    during = LIBRARY.mallinfo()
    LIBRARY.free(block)
    after = LIBRARY.mallinfo()
    of_the_system = during.hblkhd >= before.hblkhd + megabytes * MB
    of_the_heap = during.uordblks >= before.uordblks + megabytes * MB
    assert of_the_system != of_the_heap
    assert after.hblkhd == before.hblkhd
    if of_the_heap:
        assert after.fordblks >= megabytes * MB
    return of_the_heap


def alone(check: Callable[[], None]) -> None:
    """Run it in a fresh process: after a long life a block may fit into a gap of the heap, whatever was asked for."""
    code = f"import test_allocator; test_allocator.{check.__name__}()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


def test_freed_memory_is_kept_inside_and_goes_back_outside() -> None:
    alone(kept_inside)


def test_who_leaves_does_not_end_it_for_others() -> None:
    """Training evaluates in between, and threads write texts side by side."""
    alone(kept_for_others)


def test_a_library_that_takes_no_high_limit_keeps_memory_too() -> None:
    alone(kept_by_an_older_library)


def test_the_numbers_of_a_tensor_lie_in_such_blocks() -> None:
    import torch

    def given_out() -> int:
        books = LIBRARY.mallinfo()
        return books.hblkhd + books.uordblks

    before = given_out()
    tensor = torch.empty(64 * MB, dtype=torch.uint8)
    assert (given_out() - before) % 2**32 >= tensor.nbytes  # the books' numbers go round after 4 GiB


def kept_inside() -> None:
    assert not is_kept(64)
    with kept_memory():
        assert is_kept(64)
        assert is_kept(128)  # larger than what is there: the heap's end, which is cut off first
    assert not is_kept(256)


def kept_for_others() -> None:
    def come_and_go() -> None:
        for _ in range(300):
            with kept_memory():
                pass

    with kept_memory():
        threads = [Thread(target=come_and_go) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert is_kept(64)
    assert not is_kept(128)


def kept_by_an_older_library() -> None:
    """One that refuses 32 MiB and more."""
    of_this_one = allocator._mallopt()
    assert of_this_one is not None

    def mallopt(parameter: int, value: int) -> int:
        high = parameter == allocator.M_MMAP_THRESHOLD and value > 32 * MB
        return 0 if high else of_this_one(parameter, value)

    setattr(allocator, "_mallopt", lambda: mallopt)  # noqa: B010  (a function in place of a cached one)
    kept_inside()
