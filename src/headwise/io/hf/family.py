"""What one family of published models is to us: how its config.json reads as a line, and where its tensors go.

A family is one file with one `Family`. Its entries say which tensors of a file are which parameters of ours, and how
they are rearranged; every rearrangement can be taken back to the bit, so the same list serves reading and writing.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headwise.io.hf.config import Config
from headwise.spec import ModelSpec


class Rearrangement:
    """How the tensors of a file become ours, and back; here, one for one as they are."""

    def read(self, theirs: Sequence[Tensor]) -> list[Tensor]:
        """Our tensors from those of the file; views where possible, so that a mapped file is not copied."""
        return list(theirs)

    def write(self, ours: Sequence[Tensor]) -> list[Tensor]:
        """The file's tensors from ours: `read` taken back to the bit."""
        return list(ours)


AS_IS = Rearrangement()


class Transposed(Rearrangement):
    """Each matrix stands as [in, out] in the file (GPT-2's Conv1D); vectors stay as they are."""

    def read(self, theirs: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.t().contiguous() for tensor in theirs]

    def write(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return self.read(ours)


@dataclass(frozen=True)
class Rows(Rearrangement):
    """One tensor of the file holds several of ours below one another, with `sizes` rows each (q|k|v, gate|up)."""

    sizes: tuple[int, ...]

    def read(self, theirs: Sequence[Tensor]) -> list[Tensor]:
        return list(theirs[0].split(list(self.sizes)))

    def write(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(ours))]


@dataclass(frozen=True)
class Grouped(Rearrangement):
    """One tensor of the file holds several of ours in `groups`, each with `sizes` rows of each (the queries of one key
    head, its key, its value)."""

    groups: int
    sizes: tuple[int, ...]

    def read(self, theirs: Sequence[Tensor]) -> list[Tensor]:
        parts = theirs[0].unflatten(0, (self.groups, -1)).split(list(self.sizes), dim=1)
        return [part.flatten(0, 1).contiguous() for part in parts]

    def write(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat([tensor.unflatten(0, (self.groups, -1)) for tensor in ours], dim=1).flatten(0, 1)]


@dataclass(frozen=True)
class Then(Rearrangement):
    """Two rearrangements, `first` next to the file."""

    first: Rearrangement
    second: Rearrangement

    def read(self, theirs: Sequence[Tensor]) -> list[Tensor]:
        return self.second.read(self.first.read(theirs))

    def write(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return self.first.write(self.second.write(ours))


@dataclass(frozen=True)
class Entry:
    """Tensors of the file `theirs` are our parameters `ours`.

    An entry none of whose parameters the model has (the bias of a map without one) is passed over.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    way: Rearrangement = AS_IS


def same(ours: str, theirs: str) -> Iterator[Entry]:
    """One parameter as it stands in the file."""
    yield Entry((theirs,), (ours,))


def module(ours: str | Iterable[str], theirs: str, way: Rearrangement = AS_IS) -> Iterator[Entry]:
    """Weight and bias of a map or norm, or of several that one module of theirs holds together."""
    names = (ours,) if isinstance(ours, str) else tuple(ours)
    for part in ("weight", "bias"):
        yield Entry((f"{theirs}.{part}",), tuple(f"{name}.{part}" for name in names), way)


class Family(ABC):
    """A family of models, known by the `model_type` of its config.json.

    Attributes:
        model_type: as config.json has it.
        architecture: the class of transformers with the language-model head.
        base: what the names of all tensors but the head's begin with; a file of the bare model leaves it out.
        unused: names (a pattern) of tensors in some files that are no weights: masks, tables of angles.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    base: ClassVar[str] = "model."
    unused: ClassVar[re.Pattern[str]] = re.compile(r"\.rotary_emb\.inv_freq$")

    @abstractmethod
    def fields(self, config: Config) -> dict[str, Any]:
        """The fields of the ModelSpec that a config describes. Raises FormatError for what we lack, by name."""

    @abstractmethod
    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """The config of a line that may or may not be of this family. The caller reads it again with `fields` and
        refuses a line that does not come back as it was, so only what the config is made of need be looked at
        (`common.part`). Raises FormatError."""

    @abstractmethod
    def entries(self, spec: ModelSpec) -> Iterator[Entry]:
        """Every parameter of a line of this family, with its place in the file."""
