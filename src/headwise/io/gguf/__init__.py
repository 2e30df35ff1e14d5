"""GGUF files, llama.cpp's form of models: read whole (line, weights, tokenizer, chat template) and written."""

from __future__ import annotations

from headwise.errors import FormatError

try:
    import gguf as _library  # noqa: F401
except ImportError as error:
    raise FormatError("GGUF files need the package gguf; install it with: pip install 'headwise[hf]'") from error

from headwise.io.gguf.model import gguf_spec, load_gguf
from headwise.io.gguf.tokenizer import gguf_tokenizer

__all__ = ["gguf_spec", "gguf_tokenizer", "load_gguf"]
