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
# A lone line end between two visible characters: byte-level BPE never joins tokens across it.
_CUT = re.compile(r"(?<=\S)\n(?=\S)")


class Tokenizer(ABC):
    """Encodes text as ids in [0, vocab_size).

    Attributes:
        eos_id: ends a document, None where there is no such id; `eos_ids` are all ids that end what a model writes.
        begin_ids: what stands before every text, for models that were trained so; `encode` leaves it to its callers.
        special_tokens: names of the tokens with a role (`bos_token`, `eos_token`, `pad_token`), and `special_ids` their
            ids as a model's config has them.
        chat_template: how a conversation becomes text (Jinja), None where the model knows none.
    """

    kind: str
    vocab_size: int
    eos_id: int | None
    begin_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return () if self.eos_id is None else (self.eos_id,)

    @property
    def special_tokens(self) -> dict[str, str]:
        return {}

    @property
    def special_ids(self) -> dict[str, Any]:
        ends = list(self.eos_ids)
        return {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}

    @abstractmethod
    def encode(self, text: str, *, special: bool = False) -> NDArray[np.int64]:
        """The ids of `text`, shape [n], int64. With `special`, names of special tokens in it become their ids
        (Hugging Face tokenizers only). Raises DataError for text that this tokenizer cannot represent."""

    @abstractmethod
    def encode_places(self, text: str, *, special: bool = False) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ids as `encode` gives them, and for each the characters of `text` that it stands for: int64 [n], [n, 2]
        (from, to). Tokens that share a character, as its bytes do, share its place."""

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

    def encode_places(self, text: str, *, special: bool = False) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self.encode(text), np.arange(len(text))[:, None] + np.arange(2)

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

    def encode_places(self, text: str, *, special: bool = False) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ids = self.encode(text)
        place = np.cumsum((ids & 0xC0) != 0x80) - 1  # every byte but those that go on with a character begins one
        return ids, place[:, None] + np.arange(2)

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

    def __init__(
        self,
        rust: RustTokenizer,
        kind: str,
        eos_id: int | None,
        config: dict[str, Any],
        eos_ids: Sequence[int] = (),
    ) -> None:
        rust.no_truncation()  # a sentence encoder's tokenizer.json cuts every text at 128 tokens, and pads
        rust.no_padding()
        self.kind = kind
        self.eos_id = eos_id
        self.config = config
        self._rust = rust
        self._eos_ids = tuple(eos_ids) or super().eos_ids
        # Ids may have holes, so the number of tokens is not enough.
        self.vocab_size = max(rust.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.begin_ids = self._begin_ids()
        template = config.get("chat_template")
        if isinstance(template, list):  # several by name, as [{"name": "default", "template": …}, …]
            named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
            template = named.get("default")
        self.chat_template = template if isinstance(template, str) else None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self._eos_ids

    @property
    def special_tokens(self) -> dict[str, str]:
        named = {f"{role}_token": self.config.get(f"{role}_token") for role in ("bos", "eos", "pad")}
        return {role: name for role, name in named.items() if isinstance(name, str)}

    @property
    def special_ids(self) -> dict[str, Any]:
        ids = {f"{role}_id": self._rust.token_to_id(name) for role, name in self.special_tokens.items()}
        return {role: i for role, i in ids.items() if i is not None} | super().special_ids

    @property
    def rust(self) -> RustTokenizer:
        """The library's object."""
        return self._rust

    def _begin_ids(self) -> tuple[int, ...]:
        """What the library puts before a text, unless the config says otherwise."""
        bos = self.special_ids.get("bos_token_id")
        match self.config.get("add_bos_token"):
            case True if bos is not None:
                return (bos,)
            case False:
                return ()
        try:
            plain, full = (self._rust.encode("a", add_special_tokens=special).ids for special in (False, True))
        except Exception:  # the library raises bare Exceptions, for words it has no id for
            return ()
        starts = (n for n in range(len(full)) if full[n : n + len(plain)] == plain)
        return tuple(full[: next(starts, 0)])

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

    def encode_places(self, text: str, *, special: bool = False) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        utf8(text)
        self._rust.encode_special_tokens = not special
        try:
            encoding = self._rust.encode(text, add_special_tokens=False)
        except Exception as error:  # as in `encode`
            raise DataError(f"this {self.kind} tokenizer cannot encode the text: {error}") from error
        places = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.array(encoding.ids, dtype=np.int64), places

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
        own: dict[str, Any] = {"kind": self.kind, "eos_id": self.eos_id}
        if len(self.eos_ids) > 1:
            own["eos_ids"] = list(self.eos_ids)
        write_json(Path(folder) / _OWN_FILE, own)

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
    """The tokenizer of a model or alone: what `save` wrote, the folder of a model or run with that in tokenizer/, a
    Hugging Face folder with a tokenizer.json (or that file), a GGUF file or a folder with one.

    Raises DataError if there is none or it is malformed, FormatError for a damaged GGUF file.
    """
    from headwise.data.published import folder_tokenizer, gguf_file_tokenizer, json_file

    path = Path(path).expanduser()
    if not path.exists() and path.suffix not in (".json", ".gguf"):
        raise DataError(f"{path} is no folder; give the folder of a model, a run or a tokenizer, or a .gguf file")
    if path.is_dir() and (path / "tokenizer").is_dir():
        path = path / "tokenizer"
    folder = path if path.is_dir() else path.parent
    own = json_file(folder / _OWN_FILE) if path.is_dir() or path.name == _OWN_FILE else {}
    if path.suffix == ".gguf":
        return gguf_file_tokenizer(path)
    if not own and not (folder / "tokenizer.json").is_file() and len(found := list(folder.glob("*.gguf"))) == 1:
        return gguf_file_tokenizer(found[0])
    try:
        match own.get("kind"):
            case "char":
                return CharTokenizer(own["characters"], eos=own["eos"])
            case "byte":
                return ByteTokenizer(eos=own["eos"])
            case None:
                return folder_tokenizer(folder / "tokenizer.json" if path.is_dir() else path)
            case "bpe" | "hf":
                made = folder_tokenizer(folder / "tokenizer.json")
                return RustBackedTokenizer(made.rust, own["kind"], own["eos_id"], made.config, own.get("eos_ids", ()))
    except (KeyError, TypeError) as error:
        raise DataError(f"{str(folder / _OWN_FILE)!r} describes no tokenizer: {error!r}") from error
    raise DataError(f"{str(folder / _OWN_FILE)!r} names a tokenizer kind that is not known here: {own['kind']!r}")


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
