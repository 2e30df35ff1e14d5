"""Char and byte tokenizers as tokenizer.json: the same ids, the same text back, and transformers reads them."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.data.portable import portable
from headwise.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer

CHARACTERS = string.printable + "äöü€漢🙂"


@given(text=st.text(st.sampled_from(CHARACTERS), max_size=60), eos=st.booleans())
def test_a_char_tokenizer_keeps_its_ids(text: str, eos: bool) -> None:
    own = CharTokenizer(CHARACTERS, eos=eos)
    other = portable(own)
    assert other.encode(text).tolist() == own.encode(text).tolist()
    assert other.decode(own.encode(text)) == text
    assert (other.vocab_size, other.eos_id) == (own.vocab_size, own.eos_id)


@given(text=st.text(st.characters(codec="utf-8"), max_size=60), eos=st.booleans())
def test_a_byte_tokenizer_keeps_its_ids(text: str, eos: bool) -> None:
    own = ByteTokenizer(eos=eos)
    ids = own.encode(text).tolist()
    other = portable(own)
    assert other.encode(text).tolist() == ids
    assert other.decode(ids) == text
    assert (other.vocab_size, other.eos_id) == (own.vocab_size, own.eos_id)


@pytest.mark.parametrize("own", [CharTokenizer(CHARACTERS, eos=True), ByteTokenizer(eos=True)], ids=["char", "byte"])
def test_transformers_reads_the_folder(own: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    portable(own).save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "Two  words,\n\n and a\ttab: äöü€漢🙂"
    assert theirs(text, add_special_tokens=False)["input_ids"] == own.encode(text).tolist()
    assert theirs.decode(own.encode(text).tolist()) == text
    assert theirs.eos_token_id == own.eos_id
    assert load_tokenizer(tmp_path).encode(text).tolist() == own.encode(text).tolist()
