"""Tokenizers that come with published models: a Hugging Face folder's files, or what a GGUF file holds.

Which tokens begin and end a text, and pad it, stands in up to five files. Here the tokenizer's own come first, then the
model's; a model may have several tokens that end a text (one a document, another a turn), and all are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.data.tokenizers import EOS, RustBackedTokenizer
from headwise.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

ROLES = ("bos", "eos", "pad")
_END_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")


def folder_tokenizer(file: Path) -> RustBackedTokenizer:
    """The tokenizer of a tokenizer.json, with what the files beside it say. Raises DataError where they are damaged."""
    from tokenizers import Tokenizer as Rust

    if not file.is_file():
        raise DataError(f"no tokenizer in {str(file.parent)!r}: it holds no tokenizer.json")
    try:
        rust = Rust.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{str(file)!r} is not a readable tokenizer.json: {error}") from error
    folder = file.parent
    config = json_file(folder / "tokenizer_config.json")
    map_file = json_file(folder / "special_tokens_map.json")
    model = [json_file(folder / name) for name in ("generation_config.json", "config.json")]
    for role in ROLES:
        name = next(_named(rust, f"{role}_token", config, map_file), None)
        if name is None and (found := _ids(rust, role, *model)):
            name = rust.id_to_token(found[0])
        if name is not None:
            config[f"{role}_token"] = name
    if (template := folder / "chat_template.jinja").is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    return tokenizer_of(rust, config, _ids(rust, "eos", *model))


def gguf_file_tokenizer(path: Path) -> RustBackedTokenizer:
    """The tokenizer inside a GGUF file. Raises FormatError."""
    from headwise.io.gguf.tokenizer import gguf_tokenizer

    return tokenizer_of(*gguf_tokenizer(path))


def tokenizer_of(rust: RustTokenizer, config: dict[str, Any], more_ends: Sequence[int] = ()) -> RustBackedTokenizer:
    """A published tokenizer whose special tokens stand in `config` by name; `more_ends` end a text too."""
    eos = config.get("eos_token")
    eos_id = rust.token_to_id(eos) if isinstance(eos, str) else None
    if eos_id is None and not more_ends:
        eos_id = next((i for name in _END_NAMES if (i := rust.token_to_id(name)) is not None), None)
    ends = dict.fromkeys([*([] if eos_id is None else [eos_id]), *more_ends])
    return RustBackedTokenizer(rust, "hf", next(iter(ends), None), config, tuple(ends))


def _named(rust: RustTokenizer, key: str, *files: dict[str, Any]) -> Iterator[str]:
    """A special token as the tokenizer's files name it, where it is one of its tokens."""
    for facts in files:
        token = facts.get(key)
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str) and rust.token_to_id(name) is not None:
            yield name


def _ids(rust: RustTokenizer, role: str, *files: dict[str, Any]) -> list[int]:
    """A special token's ids, as the model's files number them."""
    values = [facts.get(f"{role}_token_id") for facts in files]
    flat = [i for value in values for i in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(i for i in flat if type(i) is int and i >= 0 and rust.id_to_token(i) is not None))


def json_file(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{str(path)!r} holds no JSON object")
    return value
