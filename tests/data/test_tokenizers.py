"""Text comes back from its ids, piecewise as well as whole, and after saving and loading."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, pre_tokenizers, processors

from headwise.data import tokenizers
from headwise.data.corpora import Source, split
from headwise.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    RustBackedTokenizer,
    Tokenizer,
    load_tokenizer,
    plan_tokenizer,
    train_bpe,
)
from headwise.errors import DataError

PROSE = ["It was the best of times, it was the worst of times.\nIt was the age; the season.\n\n  'Twas 1859…\n"] * 3
BPE = train_bpe(PROSE, 290)
# Text with what the piecewise encoding must not stumble over: line ends beside every kind of space.
texts = st.text(alphabet=st.sampled_from(list("ab'st1 \n\t\r\x1c\x85\u00a0\u2003é\U0001f600.,")), max_size=200)


def corpus_of(*documents: str) -> tokenizers.Corpus:
    return split(Source("made up", "", {"all": lambda: iter(documents)}))


def word_level(folder: Path, **files: dict[str, object]) -> Path:
    """A Hugging Face folder: words and <s>, </s>, the former put before every text, texts cut after 2 tokens."""
    folder.mkdir(exist_ok=True)
    rust = Rust(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "to": 3, "be": 4, "or": 9}, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.decoder = decoders.Fuse()
    rust.add_special_tokens(["<s>", "</s>", "<unk>"])
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    rust.enable_truncation(2)
    rust.enable_padding(length=8)
    rust.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    "make",
    [lambda: CharTokenizer("ab'st1 \n\t\r\x1c\x85\u00a0\u2003é\U0001f600.,"), ByteTokenizer, lambda: BPE],
    ids=["char", "byte", "bpe"],
)
@given(text=texts)
def test_round_trip_whole_and_in_pieces(make: Callable[[], Tokenizer], text: str) -> None:
    """Small pieces stand for the millions of characters at which the real sizes cut."""
    tokenizer = make()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "_PIECE", 3)
        patch.setattr(tokenizers, "_BATCH", 2)
        pieces = list(tokenizer.pieces(text))
        assert "".join(pieces) == text
        assert np.array_equal(np.concatenate([np.zeros(0, np.int64), *map(tokenizer.encode, pieces)]), ids)


def test_char_ids_are_nanogpts() -> None:
    tokenizer = CharTokenizer("hello\nworld")
    order = sorted(set("hello\nworld"))
    assert tokenizer.encode("world").tolist() == [order.index(c) for c in "world"]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (len(order), None)
    with_eos = CharTokenizer("hello", eos=True)
    assert (with_eos.vocab_size, with_eos.eos_id) == (5, 4)
    assert with_eos.decode([0, 4]) == "e"


def test_unknown_characters_are_named() -> None:
    with pytest.raises(DataError, match=r"the character 'é' \(U\+00E9, at position 1\) is not among the 2 characters"):
        CharTokenizer("ab").encode("aéb")
    with pytest.raises(DataError, match=r"'\\ud800' \(U\+D800"):
        CharTokenizer("ab").encode("\ud800")
    with pytest.raises(DataError, match="'z'"):
        CharTokenizer("").encode("z")
    assert CharTokenizer("").encode("").tolist() == []


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])
def test_half_characters_are_one_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"half a character \(U\+D83D, at position 2\)"):
        tokenizer.encode("ab\ud83d")


@pytest.mark.parametrize("tokenizer", [CharTokenizer("ab"), ByteTokenizer(eos=True), BPE], ids=["char", "byte", "bpe"])
def test_ids_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(DataError, match=rf"token id {bad} is not in the {tokenizer.kind} vocabulary"):
            tokenizer.decode([0, bad])


def test_byte_ids_are_the_bytes() -> None:
    tokenizer = ByteTokenizer(eos=True)
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.decode([0xC3, 0xA9, 256]) == "é"
    assert tokenizer.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"


def test_bpe_is_deterministic_and_of_the_size_asked() -> None:
    assert train_bpe(PROSE, 290).fingerprint == BPE.fingerprint
    assert (BPE.vocab_size, BPE.eos_id) == (290, 0)
    assert len(BPE.encode(PROSE[0])) < len(PROSE[0])


def test_special_tokens_in_a_text_stay_text_unless_asked_for() -> None:
    before = BPE.fingerprint
    assert 0 not in BPE.encode("a<|endoftext|>b")
    assert BPE.decode(BPE.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    assert 0 in BPE.encode("a<|endoftext|>b", special=True)
    assert BPE.fingerprint == before


def test_bpe_sees_the_training_split_only() -> None:
    documents = [f"{a}{b} " * 40 for a in "abcde" for b in "fghij"]  # every document has a pair to merge of its own
    corpus = corpus_of(*documents)
    training = [text for part, text in corpus.documents() if part == "train"]
    trained = plan_tokenizer("bpe:400").fit(corpus).fingerprint
    assert trained == train_bpe(training, 400).fingerprint
    assert trained != train_bpe(documents, 400).fingerprint


def test_eos_exists_where_there_are_documents_to_separate() -> None:
    one, several = corpus_of("abcdefghij"), corpus_of("abc", "de", "a")
    assert [plan_tokenizer(name).fit(one).eos_id for name in ("char", "byte")] == [None, None]
    assert [plan_tokenizer(name).fit(several).eos_id for name in ("char", "byte")] == [5, 256]


@pytest.mark.parametrize(
    "tokenizer",
    [CharTokenizer("ab\n"), CharTokenizer("ab\n", eos=True), ByteTokenizer(), ByteTokenizer(eos=True), BPE],
)
def test_saved_and_loaded_is_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t")
    assert type(again) is type(tokenizer)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.kind, again.vocab_size, again.eos_id) == (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id)
    assert again.encode("ab\nba").tolist() == tokenizer.encode("ab\nba").tolist()
    assert plan_tokenizer(tmp_path / "t").key == plan_tokenizer(again).key


def test_hugging_face_folder(tmp_path: Path) -> None:
    """Whatever its file says of truncation, padding or a beginning token, a text is encoded whole and bare."""
    tokenizer = load_tokenizer(word_level(tmp_path / "t", tokenizer_config={"eos_token": {"content": "</s>"}, "x": 1}))
    assert isinstance(tokenizer, RustBackedTokenizer)
    assert tokenizer.encode("to be or to be").tolist() == [3, 4, 9, 3, 4]
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id) == ("hf", 10, 1)  # ids have holes
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == tokenizer.fingerprint
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["x"] == 1
    assert load_tokenizer(tmp_path / "t" / "tokenizer.json").eos_id == 1


@pytest.mark.parametrize(
    ("files", "eos_id"),
    [
        ({"tokenizer_config": {"eos_token": "<s>"}}, 0),
        ({"special_tokens_map": {"eos_token": {"content": "<s>"}}}, 0),
        ({"config": {"eos_token_id": 4}}, 4),
        ({"generation_config": {"eos_token_id": [9, 3]}, "config": {"eos_token_id": 4}}, 9),
        ({"config": {"eos_token_id": 50_000}}, 1),  # another model's: not an id of this vocabulary
        ({"tokenizer_config": {"eos_token": None}}, 1),
        ({}, 1),
    ],
)
def test_end_of_document_is_found(tmp_path: Path, files: dict[str, dict[str, object]], eos_id: int) -> None:
    assert load_tokenizer(word_level(tmp_path / "t", **files)).eos_id == eos_id


def test_transformers_reads_what_is_saved(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    BPE.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.eos_token_id == BPE.eos_id
    assert theirs(PROSE[0])["input_ids"] == BPE.encode(PROSE[0]).tolist()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("chr", r"unknown tokenizer 'chr' \(did you mean 'char'\?\); allowed: char, byte, bpe"),
        ("char:9", "unknown tokenizer"),
        ("bpe:256", "VOCAB must be a whole number, 257 or more"),
        ("bpe:many", "VOCAB must be"),
        ("bpe:-5", "VOCAB must be"),
        ("bpe:" + "9" * 5000, "VOCAB must be"),
        ("x" * 5000, "cannot read"),
    ],
)
def test_unknown_names(name: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        plan_tokenizer(name)


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("other.txt", "", "holds no tokenizer.json"),
        ("tokenizer.json", "{}", "not a readable tokenizer.json"),
        ("headwise_tokenizer.json", "{", "cannot be read as JSON"),
        ("headwise_tokenizer.json", "[]", "holds no JSON object"),
        ("headwise_tokenizer.json", '{"kind": "char"}', "describes no tokenizer"),
        ("headwise_tokenizer.json", '{"kind": "new"}', "kind that is not known here: 'new'"),
    ],
)
def test_broken_folders(tmp_path: Path, file: str, content: str, complaint: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=re.escape(complaint)):
        load_tokenizer(tmp_path)
