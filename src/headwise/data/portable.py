"""Our character and byte tokenizers as tokenizers of the `tokenizers` library, for tools that read tokenizer.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwise.data.tokenizers import EOS, ByteTokenizer, CharTokenizer, RustBackedTokenizer, Tokenizer
from headwise.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer


def portable(tokenizer: Tokenizer) -> RustBackedTokenizer:
    """The same ids for the same text, in a form whose `save` writes tokenizer.json and tokenizer_config.json.

    A character that a char tokenizer does not know is left out there, where ours refuses the text.

    Raises:
        DataError: a tokenizer of another kind, from another package.
    """
    if isinstance(tokenizer, RustBackedTokenizer):
        return tokenizer
    if isinstance(tokenizer, CharTokenizer):
        rust = _char(tokenizer)
    elif isinstance(tokenizer, ByteTokenizer):
        rust = _byte()
    else:
        raise DataError(f"a tokenizer of kind {tokenizer.kind!r} cannot be written as tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.eos_id is not None:
        rust.add_special_tokens([EOS])  # the next free id, which is ours
        config["eos_token"] = EOS
    return RustBackedTokenizer(rust, "hf", tokenizer.eos_id, config)


def _char(tokenizer: CharTokenizer) -> RustTokenizer:
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models

    # BPE without merges leaves single characters.
    rust = Rust(models.BPE({character: i for i, character in enumerate(tokenizer.characters)}, []))
    rust.decoder = decoders.Fuse()
    return rust


def _byte() -> RustTokenizer:
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, pre_tokenizers

    # The library writes every byte as a printable character: GPT-2's table, which keeps the printable ones of Latin-1
    # and moves the others, in their order, to 256 and up.
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    names = {byte: chr(byte) for byte in kept} | {byte: chr(256 + n) for n, byte in enumerate(moved)}
    rust = Rust(models.BPE({names[byte]: byte for byte in range(256)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    return rust
