"""Where the tensors of a GGUF file go: a family's own list, with llama.cpp's names for the Hugging Face ones and what
its converter does to their rows taken back.

The converter reorders the rows of Llama's queries and keys so that RoPE joins neighbours (2n with 2n+1). They are put
back to the order of the published weights, in which n is joined with n + D/2: the line is then the same as that of the
Hugging Face folder (`pairing=half`), and what is exported is, to the bit, what was converted. A quantised row keeps its
blocks, since whole rows move.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map
from torch import Tensor

from headwise.errors import FormatError
from headwise.io.hf.family import Entry, Family, Rearrangement, Then, Transposed
from headwise.io.hf.folder import used_entries
from headwise.spec import ModelSpec

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")


def gguf_entries(family: Family, spec: ModelSpec, own: Mapping[str, Tensor]) -> list[Entry]:
    """The family's entries as a GGUF file has them, for a model with the parameters `own`.

    Raises:
        FormatError: the architecture has no tensor for one of them.
    """
    entries = []
    for entry in used_entries(family, spec, own):
        names = tuple(gguf_name(name, family.model_type) for name in entry.theirs)
        ways = {way for name in entry.theirs if (way := _converted(name, family, spec)) is not None}
        entries.append(Entry(names, entry.ours, Then(ways.pop(), entry.way) if ways else entry.way))
    return entries


def gguf_name(name: str, model_type: str) -> str:
    """llama.cpp's name of a tensor that transformers calls `name`. Raises FormatError where it has none."""
    layer = _LAYER.search(name)
    first = _LAYER.sub("0", name, count=1)  # the library lists the names of each layer; those of one say it all
    found = _names(model_type).get_name(first, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise FormatError(f"GGUF's architecture {model_type} has no tensor for {name!r}")
    return found if layer is None else _LAYER.sub(layer[0], found, count=1)


@cache
def _names(model_type: str) -> TensorNameMap:
    architectures: dict[str, MODEL_ARCH] = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    return get_tensor_name_map(architectures[model_type], 1)


def _converted(name: str, family: Family, spec: ModelSpec) -> Rearrangement | None:
    """What the converter did to a tensor of the Hugging Face folder, to be taken back; None: nothing."""
    if family.model_type == "gpt2" and _CONV1D.search(name):
        return Transposed()
    if family.model_type == "llama" and (found := re.search(r"\.([qk])_proj\.", name)):
        n_heads, kv_heads, _ = spec.attention.heads(spec.dims)
        return Neighbours(n_heads if found[1] == "q" else kv_heads)
    return None


@dataclass(frozen=True)
class Neighbours(Rearrangement):
    """Each head's rows stand as 0, D/2, 1, D/2 + 1, … in the file."""

    n_heads: int

    def read(self, theirs: Sequence[Tensor]) -> list[Tensor]:
        return [rows.view(self.n_heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape) for rows in theirs]

    def write(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [rows.reshape(self.n_heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape) for rows in ours]
