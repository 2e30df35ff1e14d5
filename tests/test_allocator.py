"""Memory that is kept: its pages are not asked of the system again as long as anybody is inside."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from threading import Thread

import torch

from headwise.allocator import kept_memory


def alone(check: Callable[[], None]) -> None:
    """Run it in a fresh process: blocks fit into whatever gaps a long life has left, and are then never handed out."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(check).result()


def faults() -> int:
    """Pages that the system hands out for eight blocks of 64 MB, one after another."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_kept_inside_and_goes_back_outside() -> None:
    alone(kept_inside)


def test_who_leaves_does_not_end_it_for_others() -> None:
    """Training evaluates in between, and threads write texts side by side."""
    alone(kept_for_others)


def kept_inside() -> None:
    with kept_memory():
        faults()
        inside = faults()
    assert faults() > 20 * inside


def kept_for_others() -> None:
    def come_and_go() -> None:
        for _ in range(300):
            with kept_memory():
                pass

    outside = faults()
    with kept_memory():
        threads = [Thread(target=come_and_go) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        faults()
        assert outside > 20 * faults()
