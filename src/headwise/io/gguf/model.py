"""A model out of a GGUF file: its line, and the module with the file's weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headwise.io.gguf.config import ROPE_TENSORS, hf_config
from headwise.io.gguf.header import Header, read_header
from headwise.io.gguf.names import gguf_entries
from headwise.io.gguf.tensors import check_types, file_dtype, read_tensor
from headwise.io.hf import family_of
from headwise.io.hf.family import Entry, Family
from headwise.io.hf.folder import as_spec, fits_count
from headwise.io.tensors import assign, check_fits, module_tensors
from headwise.model import build
from headwise.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from headwise.model.base import LanguageModel


def gguf_spec(path: Path | str) -> ModelSpec:
    """The line that the file's model amounts to. Raises FormatError."""
    return _described(read_header(path))[1]


def load_gguf(
    path: Path | str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """The model of a GGUF file in eval mode, quantised weights taken apart to plain numbers.

    Args:
        path: the file.
        device: where the parameters are kept; the CPU by default.
        dtype: in what precision; by default the file's own, and float32 where it is quantised.

    Raises:
        FormatError: the file is no whole GGUF file, its architecture is one that we lack, or its tensors are not those
            of its model. All that is found before a tensor's numbers are read.
    """
    header = read_header(path)
    check_types(header)
    family, spec = _described(header)
    shapes = {
        name: torch.empty(info.shape, device="meta")
        for name, info in header.tensors.items()
        if name not in ROPE_TENSORS
    }
    fits_count(spec, shapes, header.path)
    module = build(spec, device="meta")
    own = module_tensors(module)
    entries = gguf_entries(family, spec, own)
    wanted: dict[str, Tensor] = {}
    for entry in entries:
        wanted |= zip(entry.theirs, entry.way.write([own[name] for name in entry.ours]))
    check_fits(wanted, shapes, header.path)
    assign(module, _parameters(header, entries, dtype or file_dtype(header)), device, dtype)
    return module.eval()


def _described(header: Header) -> tuple[Family, ModelSpec]:
    config = hf_config(header)
    family = family_of(config.values["model_type"], config.where)
    return family, as_spec(family, config)


def _parameters(header: Header, entries: list[Entry], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Our parameters, one entry's tensors read at a time."""
    for entry in entries:
        theirs = [read_tensor(header, header.tensors[name], dtype) for name in entry.theirs]
        yield from zip(entry.ours, entry.way.read(theirs))
