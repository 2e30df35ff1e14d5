"""Named tensors to and from safetensors files, and into modules; every way a file can be wrong is a `FormatError`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from headwise.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor, nn


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file (any dtype, any device; copied to contiguous memory). `OSError` where the disk fails."""
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # how safetensors reports a full or failing disk: "… (os error 28)"
        code = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error))) from error


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file; `FormatError` if it is missing, cut short or something else."""
    if not path.is_file():
        raise FormatError(f"{path} is missing")
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path} is damaged or no safetensors file ({error})") from None


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters and persistent buffers by name; one that several names share (tied) appears once."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


@torch.no_grad()
def fill_module(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Copy tensors into the module. Names and shapes must be exactly the module's own, or `FormatError` names them."""
    own = module_tensors(module)
    problems = [f"{name!r} is missing" for name in own if name not in tensors]
    problems += [f"{name!r} is not part of the model" for name in tensors if name not in own]
    problems += [
        f"{name!r} has shape {tuple(tensors[name].shape)}, the model needs {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise FormatError(f"{where} does not fit its model: {'; '.join(problems[:4])}{more}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
