"""Text to token ids and back: characters, bytes, byte-level BPE trained here, or a Hugging Face tokenizer from disk.

Encoding never invents or parses special tokens: a document that contains the letters `<|endoftext|>` is encoded as
those letters, and no begin-of-text token is added. Ids that separate documents are put in by `pack`.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headwise.data.corpora import Corpus, readable, utf8
from headwise.errors import DataError, nearest
from headwise.io.atomic import write_json, write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

EOS = "<|endoftext|>"
DEFAULT_BPE_VOCAB = 4096
_LEAST_BPE_VOCAB = 257  # every byte, and the end of a document
_OWN_FILE = "headwise_tokenizer.json"
_PIECE = 1 << 20  # characters encoded at a time: bounds memory for texts of any length
_BATCH = 1 << 16  # characters a thread of the BPE encoder takes at a time
_END_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
# A lone line end between two visible characters: byte-level BPE never joins tokens across it.
_CUT = re.compile(r"(?<=\S)\n(?=\S)")


class Tokenizer(ABC):
    """Encodes text as ids in [0, vocab_size). `eos_id` ends a document, None where there is no such id."""

    kind: str
    vocab_size: int
    eos_id: int | None

    @abstractmethod
    def encode(self, text: str, *, special: bool = False) -> NDArray[np.int64]:
        """The ids of `text`, shape [n], int64. With `special`, names of special tokens in it become their ids
        (Hugging Face tokenizers only). Raises DataError for text that this tokenizer cannot represent."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of `ids`, special tokens left out. Raises DataError for an id outside the vocabulary."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that makes this tokenizer what it is, as JSON values."""

    def pieces(self, text: str) -> Iterator[str]:
        """Cuts `text` so that encoding piece by piece gives the same ids as encoding it whole."""
        yield text

    def save(self, folder: Path | str) -> None:
        """Writes what `load_tokenizer` reads into `folder`. Raises WriteError."""
        write_json(Path(folder) / _OWN_FILE, self.state())

    @property
    def fingerprint(self) -> str:
        """Equal for equal tokenizers, on every machine."""
        return hashlib.sha256(json.dumps(self.state(), sort_keys=True).encode()).hexdigest()

    def _checked(self, ids: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
        values = np.asarray(ids, dtype=np.int64).reshape(-1)
        outside = values[(values < 0) | (values >= self.vocab_size)]
        if outside.size:
            raise DataError(f"token id {outside[0]} is not in the {self.kind} vocabulary of {self.vocab_size} ids")
        return values


class CharTokenizer(Tokenizer):
    """One id a character, the distinct ones in the order of their code points, as in nanoGPT; then eos, if any."""

    kind = "char"

    def __init__(self, characters: Iterable[str], *, eos: bool = False) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self.characters) + eos
        self.eos_id = len(self.characters) if eos else None
        self._codes = np.array([ord(c) for c in self.characters], dtype=np.uint32)
        self._table = [*self.characters, *([""] if eos else [])]

    def encode(self, text: str, *, special: bool = False) -> NDArray[np.int64]:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = np.minimum(np.searchsorted(self._codes, codes), max(len(self._codes) - 1, 0))
        unknown = np.flatnonzero(self._codes[ids] != codes) if len(self._codes) else np.arange(len(codes))
        if unknown.size:
            at = int(unknown[0])
            raise DataError(
                f"the character {ascii(text[at]) if not text[at].isprintable() else repr(text[at])} "
                f"(U+{ord(text[at]):04X}, at position {at:,}) is not among the {len(self.characters)} characters of "
                "this char tokenizer; leave it out, or train with tokenizer byte or bpe, which know every character"
            )
        return ids.astype(np.int64)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        return "".join(self._table[i] for i in self._checked(ids).tolist())

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters, "eos": self.eos_id is not None}

    def pieces(self, text: str) -> Iterator[str]:
        return (text[i : i + _PIECE] for i in range(0, len(text), _PIECE))


class ByteTokenizer(Tokenizer):
    """One id a byte of the UTF-8 text, 0–255; eos, if any, is 256."""

    kind = "byte"

    def __init__(self, *, eos: bool = False) -> None:
        self.vocab_size = 256 + eos
        self.eos_id = 256 if eos else None

    def encode(self, text: str, *, special: bool = False) -> NDArray[np.int64]:
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        values = self._checked(ids)
        return values[values < 256].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "eos": self.eos_id is not None}

    def pieces(self, text: str) -> Iterator[str]:
        return (text[i : i + _PIECE] for i in range(0, len(text), _PIECE))


class RustBackedTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library: kind "bpe" when trained here, "hf" when brought along.

    `config` is the content of its tokenizer_config.json, kept as it is for those who read it (chat templates, …).
    """

    def __init__(self, rust: RustTokenizer, kind: str, eos_id: int | None, config: dict[str, Any]) -> None:
        rust.no_truncation()  # a sentence encoder's tokenizer.json cuts every text at 128 tokens, and pads
        rust.no_padding()
        self.kind = kind
        self.eos_id = eos_id
        self.config = config
        self._rust = rust
        # Ids may have holes, so the number of tokens is not enough.
        self.vocab_size = max(rust.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, special: bool = False) -> NDArray[np.int64]:
        utf8(text)  # lone surrogates would be a TypeError below
        self._rust.encode_special_tokens = not special
        parts = list(self._cut(text, _BATCH)) if not special else [text]
        try:
            if len(parts) == 1:  # no threads for a prompt: a process that forks after they ran is warned about it
                return np.array(self._rust.encode(text, add_special_tokens=False).ids, dtype=np.int64)
            encodings = self._rust.encode_batch_fast(parts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exceptions, for words it has no id for
            raise DataError(f"this {self.kind} tokenizer cannot encode the text: {error}") from error
        return np.array([i for encoding in encodings for i in encoding.ids], dtype=np.int64)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        return str(self._rust.decode(self._checked(ids).tolist(), skip_special_tokens=True))

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "eos_id": self.eos_id, "tokenizer": self._rust.to_str(), "config": self.config}

    def pieces(self, text: str) -> Iterator[str]:
        return self._cut(text, _PIECE)

    def save(self, folder: Path | str) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which Hugging Face's libraries read too."""
        write_text(Path(folder) / "tokenizer.json", self._rust.to_str(pretty=True))
        write_json(Path(folder) / "tokenizer_config.json", self.config)
        write_json(Path(folder) / _OWN_FILE, {"kind": self.kind, "eos_id": self.eos_id})

    def _cut(self, text: str, size: int) -> Iterator[str]:
        if self.kind != "bpe":  # others may join tokens across anything, or mark the beginning of a text
            yield text
            return
        start = 0
        while cut := _CUT.search(text, start + size):
            yield text[start : cut.end()]
            start = cut.end()
        yield text[start:]


def train_bpe(texts: Iterable[str], vocab_size: int = DEFAULT_BPE_VOCAB) -> RustBackedTokenizer:
    """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2) with `<|endoftext|>` as id 0.

    Deterministic. The vocabulary is smaller than `vocab_size` where the text has no more pairs to merge.
    """
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, pre_tokenizers, trainers

    rust = Rust(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator((utf8(text).decode() for text in texts), trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "clean_up_tokenization_spaces": False}
    return RustBackedTokenizer(rust, "bpe", rust.token_to_id(EOS), config)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer in a folder: what `save` wrote, or a Hugging Face folder with a tokenizer.json (or that file).

    Raises DataError if there is none or it is malformed.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    own = _json_file(folder / _OWN_FILE) if path.is_dir() or path.name == _OWN_FILE else {}
    try:
        match own.get("kind"):
            case "char":
                return CharTokenizer(own["characters"], eos=own["eos"])
            case "byte":
                return ByteTokenizer(eos=own["eos"])
            case None | "bpe" | "hf":
                file = folder / "tokenizer.json" if path.is_dir() or own else path
                return _load_rust(file, own)
    except (KeyError, TypeError) as error:
        raise DataError(f"{str(folder / _OWN_FILE)!r} describes no tokenizer: {error!r}") from error
    raise DataError(f"{str(folder / _OWN_FILE)!r} names a tokenizer kind that is not known here: {own['kind']!r}")


def _load_rust(file: Path, own: dict[str, Any]) -> RustBackedTokenizer:
    from tokenizers import Tokenizer as Rust

    if not file.is_file():
        raise DataError(f"no tokenizer in {str(file.parent)!r}: it holds no tokenizer.json")
    try:
        rust = Rust.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{str(file)!r} is not a readable tokenizer.json: {error}") from error
    config = _json_file(file.parent / "tokenizer_config.json")
    eos_id = own["eos_id"] if own else _find_eos(rust, file.parent, config)
    return RustBackedTokenizer(rust, own.get("kind", "hf"), eos_id, config)


def _find_eos(rust: RustTokenizer, folder: Path, config: dict[str, Any]) -> int | None:
    """The id that ends a document: as the tokenizer's files name it, else as the model's, else by a usual name."""
    for facts in (config, _json_file(folder / "special_tokens_map.json")):
        token = facts.get("eos_token")
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str) and (found := rust.token_to_id(name)) is not None:
            return int(found)
    for name in ("generation_config.json", "config.json"):
        value = _json_file(folder / name).get("eos_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and rust.id_to_token(value) is not None:
            return value
    return next((int(i) for name in _END_NAMES if (i := rust.token_to_id(name)) is not None), None)


def _json_file(path: Path) -> dict[str, Any]:
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


@dataclass(frozen=True)
class TokenizerPlan:
    """How to come by a tokenizer: `key` says which one before any text is read, `fit` makes it for a corpus."""

    key: str
    fit: Callable[[Corpus], Tokenizer]


def plan_tokenizer(name: str | Path | Tokenizer) -> TokenizerPlan:
    """What `name` stands for: "char", "byte", "bpe", "bpe:VOCAB", a path for `load_tokenizer`, or a tokenizer itself.

    The characters are those of the whole text, as in nanoGPT; BPE is trained on the training split only. Char and
    byte get an eos id where the corpus has documents to separate. Raises DataError for anything else.
    """
    if isinstance(name, Tokenizer):
        return TokenizerPlan(f"{name.kind} {name.fingerprint}", lambda corpus: name)
    word, _, size = str(name).partition(":")
    if word == "char" and not size:
        return TokenizerPlan("char", _fit_char)
    if word == "byte" and not size:
        return TokenizerPlan("byte", lambda corpus: ByteTokenizer(eos=corpus.has_boundaries))
    if word == "bpe":
        if size and not (size.isascii() and size.isdigit() and _LEAST_BPE_VOCAB <= int(size[:12]) <= 1 << 24):
            raise DataError(f"tokenizer {str(name)!r}: VOCAB must be a whole number, {_LEAST_BPE_VOCAB} or more")
        vocab_size = int(size) if size else DEFAULT_BPE_VOCAB
        return TokenizerPlan(f"bpe {vocab_size}", lambda corpus: _fit_bpe(corpus, vocab_size))
    with readable(Path(name)):
        exists = Path(name).expanduser().exists()
    if exists:
        return plan_tokenizer(load_tokenizer(name))
    raise DataError(
        f"unknown tokenizer {str(name)!r}{nearest(word, ['char', 'byte', 'bpe'])}; allowed: char, byte, bpe, "
        "bpe:VOCAB, or the path of a tokenizer.json or of a folder with one"
    )


def _fit_char(corpus: Corpus) -> CharTokenizer:
    characters: set[str] = set()
    for _, text in corpus.documents():
        characters.update(text)
    return CharTokenizer(characters, eos=corpus.has_boundaries)


def _fit_bpe(corpus: Corpus, vocab_size: int) -> RustBackedTokenizer:
    training = (text for part, text in corpus.documents() if part == "train")
    return train_bpe((text[i : i + _PIECE] for text in training for i in range(0, len(text), _PIECE)), vocab_size)
