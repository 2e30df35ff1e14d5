"""Tokenizers rebuilt from what a GGUF file holds: the tokens of those they were written from, and of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from converted import add_byte_level, add_sentencepiece
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.integrations.gguf import gguf_tokenizer_mapping as peer

from headwise.data import load_tokenizer
from headwise.errors import FormatError
from headwise.io.gguf.tokenizer import RULES, gguf_tokenizer

WORDS = """\
The head that is wise learns all lines; don't WE'LL I've 'tis it's. In 1999 there were 2,102,650 of them — 3.14 each.
    if x != y:\r\n\t\treturn {"key": [1, 22, 333]}   # naïve café, Straße, Ελλάδα, Москва, 東京は日本の首都です。

1234567890 §½²³ ¿qué? 🦙🦙 e\u0301 \u00e9 \ufb01 a\u00a0b\u3000c   trailing   \n\n\n\t\n x\x00y <|im_start|>user
"""
TEXTS = [
    "",
    " ",
    "  two",
    "\n",
    "word",
    " word ",
    *WORDS.splitlines(keepends=True),
    WORDS,
    WORDS.upper(),
    "▁a▁",
    "<0x0A>",
]


def write(path: Path, *parts: Callable[[GGUFWriter], Any], architecture: str = "llama") -> Path:
    """A file that holds a tokenizer and nothing else."""
    writer = GGUFWriter(path, architecture)
    for part in parts:
        part(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def trained(pre: Any, normalizer: Any = None, **options: Any) -> Tokenizer:
    """Byte-level BPE learned from the words above."""
    rust = Tokenizer(models.BPE(**options))
    rust.pre_tokenizer = pre
    if normalizer is not None:
        rust.normalizer = normalizer
    rust.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    rust.train_from_iterator([WORDS * 3, WORDS.lower(), WORDS.title() * 2], trainer)
    return rust


def byte_level(rust: Tokenizer, pre: str, *more: Callable[[GGUFWriter], Any]) -> list[Callable[[GGUFWriter], Any]]:
    """A byte-level tokenizer as the converter writes it."""
    vocab, merges = rust.get_vocab(), _model(rust)["merges"]
    tokens = sorted(vocab, key=lambda token: vocab[token])
    return [
        lambda writer: writer.add_tokenizer_model("gpt2"),
        lambda writer: writer.add_tokenizer_pre(pre),
        lambda writer: writer.add_token_list(tokens),
        lambda writer: writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)]),
        lambda writer: writer.add_token_merges([" ".join(merge) for merge in merges]),
        lambda writer: writer.add_eos_token_id(0),
        *more,
    ]


def _model(rust: Tokenizer) -> Any:
    return json.loads(rust.to_str())["model"]


def split(name: str) -> Any:
    """Words cut by a pattern, as the tokenizer.json files of Llama 3 and Qwen have it."""
    pattern = pre_tokenizers.Split(Regex(peer.GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated")
    return pre_tokenizers.Sequence([pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# tokenizer.ggml.pre → the cutting of words that the models of that name have in their tokenizer.json.
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SOURCES: dict[str, Tokenizer] = {
    "gpt-2": trained(GPT2),
    "smollm": trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])),
    "llama-bpe": trained(split("llama-bpe"), ignore_merges=True),
    "qwen2": trained(split("qwen2"), normalizers.NFC()),
    "tekken": trained(split("tekken"), ignore_merges=True),
    "gpt-4o": trained(split("gpt-4o"), ignore_merges=True),
}


@pytest.mark.parametrize("pre", SOURCES)
def test_byte_level_tokens_are_those_of_the_tokenizer_that_was_written(pre: str, tmp_path: Path) -> None:
    source = SOURCES[pre]
    rust, config, ends = gguf_tokenizer(write(tmp_path / "t.gguf", *byte_level(source, pre)))
    assert rust.get_vocab() == source.get_vocab()
    assert _model(rust)["merges"] == _model(source)["merges"]
    for text in TEXTS:
        wanted = source.encode(text)
        assert rust.encode(text, add_special_tokens=False).tokens == wanted.tokens, text
        assert rust.decode(wanted.ids) == source.decode(wanted.ids)
    assert config["eos_token"] == "<|endoftext|>"
    assert [rust.id_to_token(i) for i in ends] == ["<|endoftext|>", "<|im_end|>"]


@given(st.text(max_size=40))
@settings(max_examples=200)
def test_any_text_has_the_tokens_of_the_tokenizer_that_was_written(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    for pre, source in SOURCES.items():
        if pre not in BUILT:
            BUILT[pre] = gguf_tokenizer(write(tmp_path_factory.mktemp("t") / "t.gguf", *byte_level(source, pre)))[0]
        assert BUILT[pre].encode(text, add_special_tokens=False).ids == source.encode(text).ids


BUILT: dict[str, Tokenizer] = {}


def test_the_rules_of_words_are_those_of_transformers() -> None:
    """As far as it knows them; where it knows none it cuts as GPT-2 does."""
    shared = RULES.keys() & peer.GGUF_PRE_TOKENIZER_SPLITS.keys()
    assert {name: RULES[name] for name in shared} == {name: peer.GGUF_PRE_TOKENIZER_SPLITS[name] for name in shared}
    assert len(shared) >= 10
    assert all(RULES[name] in (None, "digits") for name in RULES.keys() - shared)


def by_transformers(path: Path) -> Tokenizer:
    architecture, values, _ = peer.get_gguf_tokenizer(str(path))
    return peer.convert_gguf_tokenizer(architecture, values)[0]


def sentencepiece(tokens: Iterable[str]) -> Callable[[GGUFWriter], Any]:
    """Pieces with a score each, the likelier first, after the special ones and the bytes."""
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*first, *(token for token in tokens if token not in first)]

    def add(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([*tokens, "<|user|>", "  "])
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259), 3, 4])
        writer.add_token_scores([-float(number) for number in range(len(tokens) + 2)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    return add


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece_tokens_are_those_of_transformers(architecture: str, prefix: bool | None, tmp_path: Path) -> None:
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    learned.train_from_iterator([WORDS * 3], trainer)
    order = learned.get_vocab()
    parts = [sentencepiece(sorted(order, key=lambda token: order[token]))]
    if prefix is not None:
        parts.append(lambda writer: writer.add_add_space_prefix(prefix))
    path = write(tmp_path / "t.gguf", *parts, architecture=architecture)
    rust, config, _ = gguf_tokenizer(path)
    theirs = by_transformers(path)
    # transformers reads no add_space_prefix: it puts one before every text, as files without that value mean.
    if prefix is not False:
        for text in [*TEXTS, "<|user|>hi</s> there", "a  b"]:
            wanted = theirs.encode(text, add_special_tokens=False)
            assert rust.encode(text, add_special_tokens=False).tokens == wanted.tokens, text
            assert rust.decode(wanted.ids) == theirs.decode(wanted.ids)
    else:
        assert rust.encode("word", add_special_tokens=False).tokens[0][0] == "w"
    for text in ("The head, naïve: 東京 🦙\n\tx", "<0x0A>"):
        assert rust.decode(rust.encode(text).ids, skip_special_tokens=False)[len("<s>") :].lstrip() == text
    assert rust.encode("word").tokens[0] == "<s>"
    assert config["add_bos_token"]
    assert {config[f"{role}_token"] for role in ("bos", "eos", "unk")} == {"<s>", "</s>", "<unk>"}


def test_special_tokens_of_other_letters_than_bytes_keep_their_ids(tmp_path: Path) -> None:
    """A byte-level vocabulary spells spaces as Ġ; tokens that are matched whole are spelled as they are."""
    source = SOURCES["gpt-2"]
    parts = byte_level(source, "gpt-2")
    vocab = source.get_vocab()
    tokens = [*sorted(vocab, key=lambda token: vocab[token]), "<｜User｜>", "  two spaces", "<think>"]
    parts[2] = lambda writer: writer.add_token_list(tokens)
    parts[3] = lambda writer: writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 6), 3, 4, 4])
    rust, _, _ = gguf_tokenizer(write(tmp_path / "t.gguf", *parts))
    for token in tokens[-3:]:
        ids = rust.encode(f"a{token}b").ids
        assert ids[1:-1] == [tokens.index(token)]
        assert rust.decode(ids, skip_special_tokens=False) == f"a{token}b"
    assert rust.decode(rust.encode("a<｜User｜><think>b").ids) == "a<think>b"
    assert rust.get_added_tokens_decoder()[tokens.index("<think>")] == AddedToken(
        "<think>", normalized=False, special=False
    )


def test_a_word_that_is_a_token_is_taken_whole_where_the_model_does_so(tmp_path: Path) -> None:
    """Llama 3 takes `and` as one token though no merges lead there; GPT-2 goes by its merges alone."""
    for pre, wanted in {"llama-bpe": ["and"], "gpt-2": ["an", "d"]}.items():

        def part(writer: GGUFWriter, pre: str = pre) -> None:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(pre)
            writer.add_token_list([*"and", "an", "and"])
            writer.add_token_merges(["a n"])
            writer.add_add_bos_token(False)

        rust, _, _ = gguf_tokenizer(write(tmp_path / f"{pre}.gguf", part))
        assert rust.encode("and").tokens == wanted


def test_a_text_begins_and_ends_as_the_file_says(tmp_path: Path) -> None:
    for number, (begin, end) in enumerate([(True, False), (False, True), (True, True), (False, False)]):
        path = write(
            tmp_path / f"{number}.gguf",
            add_byte_level,
            lambda writer, begin=begin: writer.add_add_bos_token(begin),
            lambda writer, end=end: writer.add_add_eos_token(end),
        )
        rust, config, _ = gguf_tokenizer(path)
        wanted = [*(["<|im_start|>"] if begin else []), "the", *(["<|endoftext|>"] if end else [])]
        assert rust.encode("the").tokens == wanted
        assert (config["add_bos_token"], config["add_eos_token"]) == (begin, end)
        assert load_tokenizer(path).begin_ids == ((1,) if begin else ())
    # Llama 3's files say nothing, and its texts begin with a token.
    assert load_tokenizer(write(tmp_path / "3.gguf", add_byte_level)).begin_ids == (1,)


def test_what_is_kept_of_a_file_can_be_saved_and_read_again(tmp_path: Path) -> None:
    for name, part in {"bytes": add_byte_level, "pieces": add_sentencepiece}.items():
        ours = load_tokenizer(write(tmp_path / f"{name}.gguf", part))
        ours.save(tmp_path / name)
        again = load_tokenizer(tmp_path / name)
        assert again.state() == ours.state()
        assert (again.eos_ids, again.begin_ids, again.chat_template) == (
            ours.eos_ids, ours.begin_ids, ours.chat_template)  # fmt: skip
    assert load_tokenizer(tmp_path / "bytes.gguf").chat_template == "{{ bos_token }}{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda writer: writer.add_string("tokenizer.ggml.model", "bert"), "'bert'; allowed: gpt2, llama"),
        (lambda writer: writer.add_string("tokenizer.ggml.pre", "qwen"), "did you mean 'qwen2'"),
        (lambda writer: writer.add_array("tokenizer.ggml.tokens", [1, 2]), "no list of tokens"),
        (lambda writer: writer.add_array("tokenizer.ggml.tokens", ["a"] * 59), "a token twice"),
        (lambda writer: writer.add_array("tokenizer.ggml.tokens", ["a", "b"]), "a number for each of 2 tokens"),
        (lambda writer: writer.add_array("tokenizer.ggml.merges", [1]), "merges is missing or no list"),
        (lambda writer: writer.add_array("tokenizer.ggml.merges", ["t he"]), "does not fit together"),
        (lambda writer: writer.add_array("tokenizer.ggml.merges", ["the"]), "does not fit together"),
        (lambda writer: writer.add_array("tokenizer.ggml.token_type", [1]), "a number for each of"),
        (lambda writer: writer.add_string("tokenizer.ggml.eos_token_id", "x"), "'tokenizer.ggml.eos_token_id' should"),
        (lambda writer: writer.add_uint32("tokenizer.chat_template", 3), "'tokenizer.chat_template' should be a text"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_makes_no_sense_is_one_line(
    wrong: Callable[[GGUFWriter], Any], words: str, tmp_path: Path
) -> None:
    def part(writer: GGUFWriter) -> None:
        add_byte_level(writer)
        before = dict(writer.kv_data[0])
        writer.kv_data[0].clear()
        wrong(writer)
        writer.kv_data[0] = before | writer.kv_data[0]

    path = write(tmp_path / "t.gguf", part)
    with pytest.raises(FormatError) as failure:
        gguf_tokenizer(path)
    assert words in str(failure.value)
    assert "\n" not in str(failure.value)
    assert str(path) in str(failure.value)
