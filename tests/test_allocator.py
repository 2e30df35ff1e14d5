"""Memory that is kept: freed blocks stay with the process for as long as anybody is inside."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from threading import Thread

import torch

from headwise import allocator
from headwise.allocator import kept_memory

MB = 1 << 20


class Books(ctypes.Structure):
    """The C library's own account of its memory, mallinfo(3). (Not every system counts the page faults saved.)"""

    # Mapped from the system: hblkhd bytes. On the heap: uordblks in use, fordblks free.
    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_int) for name in NAMES)


def books() -> Books:
    mallinfo = ctypes.CDLL(None).mallinfo
    mallinfo.restype = Books
    account = mallinfo()
    assert isinstance(account, Books)
    return account


def is_kept(megabytes: int) -> bool:
    """Whether a block comes from the heap and stays there once freed; else it is of the system and goes back to it."""
    before = books()
    block = torch.ones(megabytes * MB, dtype=torch.uint8)
    during = books()
    del block
    after = books()
    of_the_system = during.hblkhd >= before.hblkhd + megabytes * MB
    of_the_heap = during.uordblks >= before.uordblks + megabytes * MB
    assert of_the_system != of_the_heap
    assert after.hblkhd == before.hblkhd
    assert of_the_system or after.fordblks >= megabytes * MB
    return of_the_heap


def alone(check: Callable[[], None]) -> None:
    """Run it in a fresh process: after a long life a block may fit into a gap of the heap, whatever was asked for."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(check).result()


def test_freed_memory_is_kept_inside_and_goes_back_outside() -> None:
    alone(kept_inside)


def test_who_leaves_does_not_end_it_for_others() -> None:
    """Training evaluates in between, and threads write texts side by side."""
    alone(kept_for_others)


def test_a_library_that_takes_no_high_limit_keeps_memory_too() -> None:
    alone(kept_by_an_older_library)


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
    mallopt = allocator._mallopt()
    assert mallopt is not None

    def older(parameter: int, value: int) -> int:
        return 0 if parameter == allocator.M_MMAP_THRESHOLD and value > 32 * MB else mallopt(parameter, value)

    allocator._mallopt = lambda: older
    kept_inside()
