"""The tokenizer inside a GGUF file, rebuilt as one of the `tokenizers` library.

A file holds the vocabulary, and the merges or scores, but only the *name* of the rule that cuts text into words before
they are merged. The rules are those that the models' own tokenizer.json files have; a name that is not known here is
refused, since a wrong rule gives other tokens than the model was trained on and nothing would show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from headwise.errors import FormatError, one_of
from headwise.io.gguf.header import Header, Strings, read_header
from headwise.io.hf.config import Config

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
SPACE = "▁"  # how SentencePiece writes a space
ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
)
MOST_TOKENS = 1 << 19
LONGEST_PIECE = 256  # characters; longer ones come about by no merge

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str, letters: str = r"[^\r\n\p{L}\p{N}]?\p{L}+", ends: str = r"[\r\n]*", first: str = "") -> str:
    """A rule in the form of OpenAI's cl100k: words with what stands before them, digits, signs with line ends."""
    return rf"{first}{letters}|{digits}| ?[^\s\p{{L}}\p{{N}}]+{ends}|{_TAIL}"


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_LLAMA3 = _words(r"\p{N}{1,3}", first=f"{_CONTRACTIONS}|")
_QWEN2 = _words(r"\p{N}", first=f"{_CONTRACTIONS}|")
_TEKKEN = _words(r"\p{N}", f"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*", r"[\r\n/]*")
_GPT4O = _words(
    r"\p{N}{1,3}",
    f"{_HEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_HEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?",
    r"[\r\n/]*",
)
# tokenizer.ggml.pre → the rule; None is GPT-2's own, "digits" is that with each digit by itself.
RULES: dict[str, str | None] = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "olmo", "mpt"), None),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), "digits"),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "tekken": _TEKKEN,
}
# A word that is a token is taken whole, whether or not merges lead to it.
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken", "gpt-4o", "llama4")
BEGINS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")  # with the begin-of-text token


def gguf_tokenizer(path: Path | str) -> tuple[Tokenizer, dict[str, Any], list[int]]:
    """The tokenizer of a GGUF file; what a tokenizer_config.json would say beside it (special tokens by name, whether a
    text begins with one, the chat template); and the ids that end what the model writes, beside eos_token.

    Raises:
        FormatError: the file is damaged, holds no tokenizer, or one of a kind that is not known here.
    """
    header = read_header(path)
    values = Config(header.values, str(path))
    build = values.choice("tokenizer.ggml.model", {"gpt2": _byte_level, "llama": _sentencepiece})
    tokens = _tokens(header, values)
    named = _special(values, tokens)
    try:
        rust = build(header, values, tokens)
    except FormatError:
        raise
    except Exception as error:  # the library raises bare Exceptions: a merge of what is no token
        raise FormatError(f"{path}: its tokenizer does not fit together: {' '.join(str(error).split())}") from None
    _add_special(rust, header, values, tokens, named)
    begins = named.get("bos_token") if _adds(values, "bos") else None
    ends = named.get("eos_token") if _adds(values, "eos") else None
    if begins or ends:
        pieces = [*([begins] if begins else []), "$A", *([ends] if ends else [])]
        ids = [(token, rust.token_to_id(token)) for token in dict.fromkeys((begins, ends)) if token]
        rust.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=ids)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {**named, "add_bos_token": bool(begins), "add_eos_token": bool(ends)}
    if template := values.get("tokenizer.chat_template", str, None):
        config["chat_template"] = template
    return rust, config, _ends(header, values, tokens)


def _tokens(header: Header, values: Config) -> list[str]:
    listed = header.values.get("tokenizer.ggml.tokens")
    if not isinstance(listed, Strings) or not 0 < len(listed) <= MOST_TOKENS:
        raise FormatError(f"{values.where} holds no tokenizer: tokenizer.ggml.tokens is no list of tokens")
    for name in ("token_type", "scores"):  # before a string is made
        _numbers(header, name, len(listed))
    tokens = list(listed)
    if len(set(tokens)) < len(tokens):
        raise FormatError(f"{values.where}: its tokenizer has a token twice")
    return tokens


def _numbers(header: Header, name: str, length: int) -> NDArray[Any] | None:
    """One number a token, such as its type or score; None where the file has none."""
    found = header.values.get(f"tokenizer.ggml.{name}")
    if found is not None and (not isinstance(found, np.ndarray) or len(found) != length):
        raise FormatError(f"{header.path}: tokenizer.ggml.{name} should have a number for each of {length:,} tokens")
    return found


def _special(values: Config, tokens: list[str]) -> dict[str, str]:
    """bos_token, eos_token, unk_token and pad_token, as far as the file names them."""
    named = {}
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        number = values.get(f"tokenizer.ggml.{key}_token_id", int, None)
        if number is not None and number < len(tokens):  # converters write 2³²−1 where there is none
            named[f"{name}_token"] = tokens[number]
    return named


def _ends(header: Header, values: Config, tokens: list[str]) -> list[int]:
    """Ids that end a turn or a text: those the file names, and special tokens of the usual names, as in llama.cpp."""
    types = _numbers(header, "token_type", len(tokens))
    named = [values.get(f"tokenizer.ggml.{key}_token_id", int, None) for key in ("eot", "eom")]
    usual = [i for i in np.flatnonzero(types == CONTROL).tolist() if tokens[i] in ENDS] if types is not None else []
    return [i for i in (*named, *usual) if i is not None and i < len(tokens)]


def _adds(values: Config, which: str) -> bool:
    """Whether a text begins (bos) or ends (eos) with a token of its own."""
    name = values.get("tokenizer.ggml.pre", str, "")
    default = which == "bos" and (values.get("tokenizer.ggml.model", str) == "llama" or name in BEGINS)
    return values.get(f"tokenizer.ggml.add_{which}_token", bool, default)


def _add_special(rust: Tokenizer, header: Header, values: Config, tokens: list[str], named: Mapping[str, str]) -> None:
    """Tokens that are matched whole in a text, ids unchanged: special ones (left out of decoded text) and others."""
    types = _numbers(header, "token_type", len(tokens))
    special = set(named.values())
    for number in np.flatnonzero(np.isin(types, (UNKNOWN, CONTROL, USER_DEFINED))) if types is not None else ():
        if types is not None and types[number] == USER_DEFINED and tokens[number] not in special:
            rust.add_tokens([AddedToken(tokens[number], normalized=False, special=False)])
        else:
            special.add(tokens[number])
    ordered = [token for token in tokens if token in special and token]
    rust.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ordered])


def _byte_level(header: Header, values: Config, tokens: list[str]) -> Tokenizer:
    """Byte-level BPE (GPT-2 and most since): merges in the file, words cut by the rule it names."""
    name = values.get("tokenizer.ggml.pre", str, "default")
    if name not in RULES:
        raise FormatError(f"{values.where}: tokenizer.ggml.pre: {one_of(name, RULES, 'rule of words')}")
    listed = header.values.get("tokenizer.ggml.merges")
    if not isinstance(listed, Strings):
        raise FormatError(f"{values.where}: tokenizer.ggml.merges is missing or no list of merges")
    vocab = {token: number for number, token in enumerate(tokens)}
    pairs = (merge.partition(" ") for merge in listed)
    # llama.cpp takes back a merge that makes no token; files without any have one, since it asks for merges.
    merges = [(left, right) for left, _, right in pairs if left + right in vocab]
    rust = Tokenizer(models.BPE(vocab, merges, ignore_merges=name in WHOLE_WORDS))
    rust.decoder = decoders.ByteLevel()
    rust.pre_tokenizer = words(RULES[name])
    if RULES[name] == _QWEN2:
        rust.normalizer = normalizers.NFC()
    return rust


def words(rule: str | None) -> pre_tokenizers.PreTokenizer:
    """What cuts a text into words by one of RULES, and spells them in bytes."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule is None or rule == "digits")
    if rule is None:
        return plain
    if rule == "digits":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), behavior="isolated"), plain])


def _sentencepiece(header: Header, values: Config, tokens: list[str]) -> Tokenizer:
    """SentencePiece's BPE (Llama 1 and 2, Mistral, Phi-3): a score a token, from which the merges follow."""
    scores = _numbers(header, "scores", len(tokens))
    if scores is None:
        raise FormatError(f"{values.where}: tokenizer.ggml.scores is missing")
    vocab = {token: number for number, token in enumerate(tokens)}
    unknown = values.get("tokenizer.ggml.unknown_token_id", int, len(tokens))
    rust = Tokenizer(
        models.BPE(
            vocab,
            _merges(vocab, scores.tolist()),
            unk_token=tokens[unknown] if unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = values.get("tokenizer.ggml.add_space_prefix", bool, True)
    if values.get("general.architecture", str) == "phi3":  # its tokenizer.json marks each text's beginning so
        replaced = normalizers.Replace(" ", SPACE)
        rust.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replaced]) if prefix else replaced
    else:
        scheme = "first" if prefix else "never"
        rust.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(" ", left=1, right=0)] if prefix else []
    rust.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return rust


def _merges(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the token of the highest score first."""
    merges = []
    for (token, _), score in zip(vocab.items(), scores):
        if len(token) > LONGEST_PIECE:
            continue
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        merges += [(score, len(left), len(right), left, right) for left, right in pairs]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in merges]
