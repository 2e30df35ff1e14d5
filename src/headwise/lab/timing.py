"""Measuring a piece of work: seconds in turn with others, the bytes kept for a backward pass, the peak of memory."""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn


def interleaved(
    tasks: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    done: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each task in each round, after one call of each that does not count.

    The tasks take turns, and take turns at going first, so that a slow spell of a shared machine falls on all of them.
    A task on a GPU waits for it by itself. `done` is told the name of each task whenever it was timed.
    """
    for task in tasks.values():
        task()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    names = list(tasks)
    for r in range(rounds):
        first = r % len(names) if names else 0
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            tasks[name]()
            seconds[name].append(time.perf_counter() - start)
            done(name)
    return seconds


def kept_bytes(forward: Callable[[], Tensor], own: nn.Module | None = None) -> int:
    """Bytes of the tensors that autograd keeps until the backward pass; parameters of `own` are not counted."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    for parameter in own.parameters() if own is not None else ():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del result
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(work: Callable[[], object], device: torch.device) -> float | None:
    """Bytes that `work` needs at its peak beyond what was held before it: torch's allocated memory on a GPU, on a CPU
    the process's resident memory (None where the system does not tell it).

    Work done for the first time also brings in code pages and buffers of libraries: call it once before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = float(torch.cuda.memory_allocated(device))
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # freed blocks that the C library kept would hide as many new ones
    before = resident_peak(reset=True)
    work()
    return resident_peak() - before


def resident_peak(*, reset: bool = False) -> float:
    """The largest resident memory of this process so far, in bytes; `reset` makes it what is resident now."""
    status = Path("/proc/self/status")
    if reset and status.exists():
        with suppress(OSError):  # where it is forbidden, the peak includes that of the imports
            Path("/proc/self/clear_refs").write_text("5")
    if status.exists():
        # Not getrusage: across fork and exec Linux hands the parent's peak on to it.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024.0 * int(fields["VmHWM"].split()[0])
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else 1024 * peak)


def free_bytes(device: torch.device) -> float | None:
    """Memory that new work may take: of the GPU, or of this machine and the control group the process is in; None
    where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(1024.0 * int(fields["MemAvailable"].split()[0]))
    with suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        found.append(float(limit - used))
    return min(found, default=None)
