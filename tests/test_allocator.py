"""Memory that is kept: its pages are not asked of the system again as long as anybody is inside."""

from __future__ import annotations

import resource
from threading import Thread

import torch

from headwise.allocator import kept_memory


def faults() -> int:
    """Pages that the system hands out for eight blocks of 64 MB, one after another."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_kept_inside_and_goes_back_outside() -> None:
    with kept_memory():
        faults()
        inside = faults()
    assert faults() > 20 * inside


def test_who_leaves_does_not_end_it_for_others() -> None:
    """Training evaluates in between, and threads write texts side by side."""

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
