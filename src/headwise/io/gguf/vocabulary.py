"""A tokenizer of the `tokenizers` library written into a GGUF file: the way back of `tokenizer.py`, for byte-level BPE
cut by a rule that llama.cpp has a name for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import GGUFWriter
from tokenizers import Tokenizer

from headwise.errors import FormatError
from headwise.io.gguf.tokenizer import CONTROL, RULES, USER_DEFINED, words

NORMAL, UNUSED = 1, 5
WRITTEN = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o")  # one name for each rule
# GPT-2's spelling of ASCII: what is printed stands for itself, the 33 others and the space for 256 and up.
_ASCII = {chr(byte): chr(256 + byte) for byte in range(33)} | {"\x7f": chr(256 + 33)}


def write_tokenizer(
    writer: GGUFWriter, rust: Tokenizer, config: Mapping[str, Any], ends: Sequence[int], size: int
) -> None:
    """Put a tokenizer's values into a file.

    Args:
        writer: takes them.
        rust: the tokenizer.
        config: its tokenizer_config.json: special tokens by name, add_bos_token, chat_template.
        ends: ids that end what the model writes.
        size: rows of the model's embedding; ids that the tokenizer lacks are filled up.

    Raises:
        FormatError: GGUF, or llama.cpp, has no form for it.
    """
    model = json.loads(rust.to_str())["model"]
    name, spelled = _rule(rust, model)
    added = rust.get_added_tokens_decoder()
    tokens, types = [], []
    for number in range(size):
        token = rust.id_to_token(number)
        if number in added:
            tokens.append(added[number].content)
            types.append(CONTROL if added[number].special else USER_DEFINED)
        else:
            tokens.append(f"[PAD{number}]" if token is None else "".join(spelled.get(c, c) for c in token))
            types.append(UNUSED if token is None else NORMAL)
    if (largest := max(rust.get_vocab().values())) >= size:
        raise FormatError(f"the tokenizer has an id {largest}, and the model {size} tokens")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]] or [_idle_merge(tokens)])
    adders = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}
    for role, add in {**adders, "unk": writer.add_unk_token_id}.items():
        token = config.get(f"{role}_token")
        if isinstance(token, str) and (found := rust.token_to_id(token)) is not None:
            add(found)
    others = [end for end in ends if rust.id_to_token(end) != config.get("eos_token")]
    if others:
        writer.add_eot_token_id(others[0])
    writer.add_add_bos_token(bool(config.get("add_bos_token")))
    writer.add_add_eos_token(bool(config.get("add_eos_token")))
    if isinstance(template := config.get("chat_template"), str):
        writer.add_chat_template(template)


def _idle_merge(tokens: Sequence[str]) -> str:
    """llama.cpp wants merges in every file. This one makes no token, which it takes back: to bytes, so of ASCII."""
    token = next((t for t in tokens if len(t) == 1 and t.isascii() and t + t not in tokens), None)
    if token is None:
        raise FormatError("llama.cpp wants merges, and the tokenizer has neither those nor a letter of ASCII")
    return f"{token} {token}"


def _rule(rust: Tokenizer, model: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """llama.cpp's name of how the tokenizer cuts words, and what its characters are spelled as there."""
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise FormatError(
            f"GGUF is written with byte-level BPE, and the tokenizer is of another kind ({model['type']})"
        )
    if not model["merges"] and rust.pre_tokenizer is None:  # single characters
        wide = next((token for token in model["vocab"] if not token.isascii()), None)
        if wide is not None:
            raise FormatError(f"tokens are made of bytes in llama.cpp, and the character {wide!r} is several of them")
        return "gpt-2", _ASCII
    if not model["merges"] and _form(rust.pre_tokenizer)["type"] == "ByteLevel":
        return "gpt-2", {}  # single bytes, however the text is cut
    for name in WRITTEN:
        normalizer = "NFC" if name == "qwen2" else None
        if _form(rust.pre_tokenizer) == _form(words(RULES[name])) and _form(rust.normalizer).get("type") == normalizer:
            return name, {}
    raise FormatError("llama.cpp has no name for how the tokenizer cuts text into words")


def _form(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as in tokenizer.json, without what changes no token."""

    def token_free(form: Any) -> Any:
        if isinstance(form, dict):
            return {name: token_free(value) for name, value in form.items() if name != "trim_offsets"}
        return [token_free(each) for each in form] if isinstance(form, list) else form

    return {} if part is None else token_free(json.loads(part.__getstate__()))
