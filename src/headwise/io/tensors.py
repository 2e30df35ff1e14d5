"""Named tensors to and from safetensors files, and into modules; every way a file can be wrong is a `FormatError`."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from headwise.errors import FormatError, short
from headwise.io.safetensors_header import check_header

if TYPE_CHECKING:
    from torch import Tensor, nn


MOST_COPIED = 1 << 16  # bytes of a tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file (any dtype, any device; copied to contiguous memory). `OSError` where the disk fails."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)
        path.chmod(mode)  # the library leaves its files to their owner alone, whatever the umask allows
    except SafetensorError as error:  # how safetensors reports a full or failing disk: "… (os error 28)"
        code = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error))) from error


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file; `FormatError` if it is missing, cut short or something else.

    On the CPU they are views of the mapped file: a page is read when it is first looked at, and copied when written to.
    """
    check_header(path)
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path} is damaged or no safetensors file ({error})") from None


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters and persistent buffers by name; one that several names share (tied) appears once."""
    return {names[0]: tensor for names, tensor in _shared(module)}


def _shared(module: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Each tensor of the module with all its names."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ([], tensor.detach()))[0].append(name)
    return list(found.values())


def check_fits(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: Path) -> None:
    """Refuse tensors whose names and shapes are not exactly those wanted; the `FormatError` names them."""
    problems = [f"{name!r} is missing" for name in wanted if name not in tensors]
    problems += [f"{short(name)} is not part of the model" for name in tensors if name not in wanted]
    problems += [
        f"{name!r} has shape {tuple(tensors[name].shape)}, the model needs {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise FormatError(f"{where} does not fit its model: {'; '.join(problems[:4])}{more}")


@torch.no_grad()
def fill_module(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Copy tensors into the module. Names and shapes must be exactly the module's own, or `FormatError` names them."""
    own = module_tensors(module)
    check_fits(own, tensors, where)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def assign(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Make tensors the parameters of a module built on the meta device, without a copy where device and dtype allow.

    Args:
        module: gets all its tensors; shared ones stay shared.
        tensors: (name as in `module_tensors`, tensor), each fetched, converted and let go before the next.
        device, dtype: where and in what precision they are kept; None: as they come. Buffers keep the precision they
            come in.
    """
    names = {shared[0]: shared for shared, _ in _shared(module)}
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        if leaf in module.get_submodule(owner)._buffers:
            setattr(module.get_submodule(owner), leaf, _aligned(tensor.to(device)))
            continue
        made = torch.nn.Parameter(_aligned(tensor.to(device, dtype if tensor.is_floating_point() else None)))
        for each in names[name]:
            owner, _, leaf = each.rpartition(".")
            setattr(module.get_submodule(owner), leaf, made)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied where it is small and lies across cache lines, as it may in a file: kernels then round other
    sums than in memory of torch's own, and a model saved and loaded should compute the same to the bit."""
    astray = tensor.device.type == "cpu" and tensor.data_ptr() % 64 and tensor.nbytes <= MOST_COPIED
    return tensor.clone() if astray else tensor


def common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype | None:
    """The floating dtype that most of the numbers have; None where there is none."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            numbers[tensor.dtype] += tensor.numel()
    return max(numbers, key=lambda dtype: numbers[dtype], default=None)
