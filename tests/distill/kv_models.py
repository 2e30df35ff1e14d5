"""Small models and drawn tensors for the tests of distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.attention.recurrence import RecurrenceSpec
from headwise.model import build
from headwise.model.base import LanguageModel
from headwise.registry import ATTENTION
from headwise.spec import parse
from headwise.spec.grammar import read_value

WIDTHS = "d_model=32, n_layers=2, n_heads=4, vocab_size=61, max_seq_len=64"


def attention_lines() -> list[str]:
    """A call of every kind of the registry: each example of its spec, or its bare name."""
    lines = []
    for kind in ATTENTION.list():
        examples = ATTENTION.get(kind).spec.examples
        lines += [call for call in examples if ATTENTION.spec(read_value(call)).kind == kind] or [kind]
    return lines


def kv_lines() -> list[str]:
    """Those that keep keys and values."""
    return [call for call in attention_lines() if not isinstance(ATTENTION.spec(read_value(call)), RecurrenceSpec)]


def small(fields: str = "", *, preset: str = "llama", std: float = 0.2) -> LanguageModel:
    """A small model in evaluation mode, with weights large enough that attention is far from uniform."""
    line = f"{preset}({WIDTHS}{', ' + fields if fields else ''})"
    return build(parse(line).replace(init_std=std), seed=1).eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
