"""Small models whose likeliest token is not the same everywhere, with a tokenizer of as many letters."""

from __future__ import annotations

from typing import Any

from headwise.data.tokenizers import CharTokenizer
from headwise.model import build
from headwise.model.base import LanguageModel
from headwise.spec import parse

LETTERS = "".join(sorted("abcdefghijklmnop .,\n"))
FIELDS = {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64, "init": "normal", "init_std": 0.5}
LINES = [
    "llama",
    "gpt2",
    "llama(attention=window(4))",
    "llama(attention=gla)",
    "bloom",
    "transformer",
    "llama(ffn=moe(n_experts=4))",
]


def small(
    line: str = "llama", letters: str = LETTERS, *, eos: bool = False, seed: int = 3, **fields: Any
) -> LanguageModel:
    """Fields of the line win over the small ones only where they are given here."""
    return build(parse(line).replace(**{**FIELDS, "vocab_size": len(letters) + eos, **fields}), seed=seed).eval()


def tokenizer_of(letters: str = LETTERS, *, eos: bool = False) -> CharTokenizer:
    """The tokenizer of `small`; with `eos` its last id ends a text."""
    return CharTokenizer(letters, eos=eos)
