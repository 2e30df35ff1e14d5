"""A teacher: a trained model that is read and never changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwise.data.spans import same_vocabulary
from headwise.data.tokenizers import load_tokenizer
from headwise.distill.capture import capture
from headwise.errors import DataError, SettingsError
from headwise.io.pretrained import load
from headwise.io.tensors import module_tensors
from headwise.model import build
from headwise.spec import parse

if TYPE_CHECKING:
    from headwise.data.spans import TeacherWindows
    from headwise.data.tokenizers import Tokenizer
    from headwise.distill.store import TeacherStore
    from headwise.model.base import LanguageModel
    from headwise.position import Encoding
    from headwise.spec import ModelSpec


def is_saved(text: str) -> bool:
    """Whether a teacher or student is given as what stands on disk, not as a line."""
    path = Path(text)
    return path.is_dir() or path.suffix == ".gguf" or (os.sep in text and "(" not in text)


@dataclass
class Teacher:
    """A frozen model in eval mode, without gradients.

    Attributes:
        name: as it was given.
        tokenizer: what its ids mean; None for a line, which reads whatever ids it is given.
        store: what it made of the training split, kept on disk; None: it is asked anew.
        windows: the splits as its own tokenizer reads them, by name; none where it reads the student's ids.
    """

    name: str
    model: LanguageModel
    tokenizer: Tokenizer | None
    store: TeacherStore | None = None
    windows: dict[str, TeacherWindows] = field(default_factory=dict, repr=False)
    _fingerprint: str = field(default="", repr=False)
    _encodings: dict[int, list[Encoding]] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls, source: str, device: torch.device | str = "cpu", *, vocab_size: int | None = None, seq_len: int = 256
    ) -> Teacher:
        """The model at a path, or an untrained one of a line (seed 0), for which vocabulary and length are given.

        Raises:
            FormatError: no model there, or one of a form that is not read.
            SpecError: the line is none.
            SettingsError: no causal decoder.
        """
        if is_saved(source):
            model = load(source, device, torch.float32)
            try:
                tokenizer = load_tokenizer(source)
            except DataError:  # weights alone; whoever needs to know what the ids mean will say so
                tokenizer = None
        else:
            spec = parse(source).resolve(vocab_size=vocab_size, max_seq_len=seq_len)
            model, tokenizer = build(spec, seed=0, device=device), None
        if model.spec.architecture != "decoder":
            raise SettingsError(f"teacher: {source} is an {model.spec.architecture}; a causal decoder is wanted")
        return cls(source, model.eval().requires_grad_(False), tokenizer)

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    @property
    def fingerprint(self) -> str:
        """Of its line and all its weights: what a cache made by it is known by."""
        if not self._fingerprint:
            digest = hashlib.blake2b(str(self.spec).encode(), digest_size=16)
            for name, tensor in sorted(module_tensors(self.model).items()):
                digest.update(name.encode() + str(tensor.dtype).encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def reads(self, tokenizer: Tokenizer) -> bool:
        """Whether a tokenizer's ids mean to this teacher what they mean to the student."""
        return self.tokenizer is None or same_vocabulary(self.tokenizer, tokenizer)

    def shapes(self, wanted: Collection[str]) -> dict[str, tuple[int, ...]]:
        """The dimensions of its signals, tokens left out, as {"keys": (L, H, D)}."""
        made = self.read(torch.zeros(1, 1, dtype=torch.int64, device=self.device), wanted)
        return {name: (*tensor.shape[1:-2], tensor.shape[-1]) for name, tensor in made.items()}

    def signals(
        self, ids_BT: Tensor, lengths_B: Tensor, wanted: Collection[str], rows_B: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What `capture` sees, stacked: keys, values, queries, outputs [B,L,H,T,D], inputs, hidden [B,L,T,C], final
        [B,T,C], float32; zeros behind each row's length.

        From the store where `rows_B` are given and it holds all that is wanted, else from the model, which on a CPU
        reads one row at a time: what it makes of a text must not depend on what else is in the batch.
        """
        if not wanted:
            return {}
        if self.store is not None and rows_B is not None:
            held = self.store.get(rows_B.tolist(), sorted(wanted))
            return {name: tensor.to(self.device) for name, tensor in held.items()}
        ids_BT = ids_BT.to(self.device)
        if self.device.type != "cpu":
            return self.read(ids_BT, wanted)
        each = [self.read(ids_BT[row : row + 1, :n], wanted) for row, n in enumerate(lengths_B.tolist())]
        return {name: torch.cat([_padded(one[name], ids_BT.shape[1]) for one in each]) for name in wanted}

    @torch.no_grad()
    def read(self, ids_BT: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """One forward pass. The tokens stand at the rows' beginnings, so that padding behind them changes nothing."""
        with capture(self.model, wanted) as signals:
            self.model(ids_BT, last=True)
        made = {}
        for name in sorted(wanted):
            found = getattr(signals, name)
            made[name] = (found if name == "final" else torch.stack(found, dim=1)).float()
        return made

    def encodings(self, seq_len: int) -> list[Encoding]:
        """Its layers' position codes for tokens 0 … seq_len − 1."""
        if seq_len not in self._encodings:
            with capture(self.model, ()) as signals, torch.no_grad():
                self.model(torch.zeros(1, seq_len, dtype=torch.int64, device=self.device), last=True)
            self._encodings[seq_len] = signals.encodings
        return self._encodings[seq_len]

    @torch.no_grad()
    def logits(self, final_BTC: Tensor) -> Tensor:
        """Its predictions [B,T,V] from what its head reads."""
        return self.model.logits(final_BTC)


def _padded(x: Tensor, seq_len: int) -> Tensor:
    """Zeros behind the tokens, up to `seq_len`; they lie in the last dimension but one."""
    return torch.nn.functional.pad(x, (0, 0, 0, seq_len - x.shape[-2]))
