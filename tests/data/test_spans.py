"""Two tokenizations of a text cut where both can be cut: same characters, same segment."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Rust

from headwise.data import Tokenizer, Windows, load_examples, load_tokenizer
from headwise.data.spans import TeacherWindows, _begins, align, same_vocabulary
from headwise.data.tokenizers import ByteTokenizer, CharTokenizer, RustBackedTokenizer, train_bpe
from headwise.errors import DataError

TEXTS = [
    "the warden of the tower wanders there, and the other one",
    "then the others went; 12 + 30 = 42\n" * 3,
]
ALPHABET = "the warden,12\né漢"


@cache
def tokenizers() -> list[Tokenizer]:
    return [CharTokenizer(ALPHABET), ByteTokenizer(), train_bpe(TEXTS, 280), train_bpe([TEXTS[1], "é漢 war"], 300)]


def borders(tokenizer: Tokenizer, text: str) -> set[int]:
    """By definition: the places that no token lies across."""
    _, places = tokenizer.encode_places(text)
    return {at for at in range(len(text)) if not any(start < at < stop for start, stop in places.tolist())}


@settings(max_examples=150)
@given(text=st.text(ALPHABET, min_size=1, max_size=40), a=st.integers(0, 3), b=st.integers(0, 3))
def test_segments_end_at_all_common_borders_and_nowhere_else(text: str, a: int, b: int) -> None:
    one, other = tokenizers()[a], tokenizers()[b]
    aligned = align(text, one, other)
    cuts = sorted(borders(one, text) & borders(other, text))
    for tokenizer, ids, segments in (
        (one, aligned.ids_a, aligned.segments_a),
        (other, aligned.ids_b, aligned.segments_b),
    ):
        wanted, places = tokenizer.encode_places(text)
        assert np.array_equal(ids, wanted)
        by_place = [sum(cut <= start for cut in cuts) - 1 for start in places[:, 0].tolist()]
        assert segments.tolist() == by_place
        assert np.array_equal(np.unique(segments), np.arange(len(cuts))), "no segment is empty"


@settings(max_examples=50)
@given(text=st.text(ALPHABET, max_size=40), a=st.integers(0, 3))
def test_places_are_the_characters_that_a_token_decodes_to(text: str, a: int) -> None:
    tokenizer = tokenizers()[a]
    ids, places = tokenizer.encode_places(text)
    assert np.array_equal(ids, tokenizer.encode(text))
    assert [text[start:stop] for start, stop in places] == [
        piece if "�" not in (piece := tokenizer.decode([i])) else text[start:stop]
        for i, (start, stop) in zip(ids, places.tolist())
    ]
    assert "".join(text[start:stop] for start, stop in dict.fromkeys(map(tuple, places.tolist()))) == text


def test_blanks_that_a_tokenizer_leaves_out_belong_to_the_token_behind_them() -> None:
    """Tokenizers that trim their places leave gaps; one may also have tokens without any character."""
    assert _begins(np.array([[0, 2], [3, 5], [5, 5], [5, 7]])).tolist() == [0, 2, 5, 5]
    assert _begins(np.array([[1, 2], [1, 2], [2, 3]])).tolist() == [0, 0, 2]


def test_vocabularies_are_the_same_where_every_text_has_the_same_ids(tmp_path: Path) -> None:
    char, byte, bpe, other = tokenizers()
    bpe.save(tmp_path)
    again = load_tokenizer(tmp_path / "tokenizer.json")  # of another kind, and knows no more than the file says
    assert again.fingerprint != bpe.fingerprint
    assert same_vocabulary(bpe, again)
    assert same_vocabulary(char, CharTokenizer(ALPHABET))
    assert not any(same_vocabulary(bpe, each) for each in (char, byte, other))
    state = json.loads(bpe.state()["tokenizer"])
    merges = state["model"]["merges"]
    state["model"]["merges"] = merges[::-1]  # the same words, put together in another order
    other_ways = RustBackedTokenizer(Rust.from_str(json.dumps(state)), "hf", 0, {})
    more = RustBackedTokenizer(Rust.from_str(bpe.state()["tokenizer"]), "hf", 0, {})
    more.rust.add_special_tokens(["<|more|>"])
    assert not same_vocabulary(bpe, other_ways)
    assert not same_vocabulary(bpe, more)


# ---- windows ----


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
    rows = [f"<|prompt|>the {'warden ' * n}<|answer|>went there {n}" for n in range(1, 9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("student", "teacher"), [("char", 2), (2, 3), (2, 0), (3, 2)])
@pytest.mark.parametrize("seq_len", [7, 64])
def test_teacher_and_student_read_the_same_characters_segment_by_segment(
    file: Path, student: int | str, teacher: int, seq_len: int
) -> None:
    digits = CharTokenizer(ALPHABET + "0123456789")
    theirs = tokenizers()[teacher] if teacher else digits
    examples = load_examples(file, tokenizers()[student] if isinstance(student, int) else student, val_fraction=0.3)
    windows = Windows(examples.train, seq_len)
    both = TeacherWindows(windows, examples.tokenizer, theirs)
    rows = np.arange(len(windows))
    batch, own = both.batch(rows), windows.batch(rows)
    assert batch.ids.shape == batch.segments.shape == (len(rows), both.seq_len)
    assert batch.lengths.tolist() == both.lengths.tolist() == (batch.segments >= 0).sum(1).tolist()
    compared = 0
    for row in rows:
        mine, yours = batch.student_segments[row], batch.segments[row]
        segments = sorted(set(mine.tolist()) - {-1})
        assert segments == sorted(set(yours.tolist()) - {-1})
        for segment in segments:
            words = [
                tokenizer.decode(ids[row][where[row] == segment].tolist())
                for tokenizer, ids, where in (
                    (examples.tokenizer, own.ids, batch.student_segments),
                    (theirs, batch.ids, batch.segments),
                )
            ]
            assert words[0] == words[1] != ""
        compared += int((mine >= 0).sum())
    inputs = windows.n_inputs
    assert compared > inputs * (0.9 if seq_len == 64 else 0.5), "all but what a window's border cuts through"


def test_equal_tokenizers_give_the_same_tokens_one_a_segment(file: Path) -> None:
    bpe = tokenizers()[2]
    examples = load_examples(file, bpe, val_fraction=0.3)
    windows = Windows(examples.train, 9)
    both, rows = TeacherWindows(windows, bpe, bpe), np.arange(len(windows))
    batch, own = both.batch(rows), windows.batch(rows)
    for row in rows:
        n = int(batch.lengths[row])
        assert batch.ids[row, :n].tolist() == own.ids[row][batch.student_segments[row] >= 0].tolist()
        assert len(set(batch.segments[row, :n].tolist())) == n


def test_plain_text_is_read_anew_where_it_was_kept(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the tower and the other warden went there\n" * 20)
    without = load_examples(text, "char", cache_dir=tmp_path)
    with pytest.raises(DataError, match="without the texts nothing aligns them; load the data with keep_texts"):
        TeacherWindows(Windows(without.val, 16), without.tokenizer, tokenizers()[2])
    examples = load_examples(text, "char", keep_texts=True)
    both = TeacherWindows(Windows(examples.val, 16), examples.tokenizer, tokenizers()[2])
    assert np.array_equal(examples.val.array, without.val.array)
    assert 1 < both.seq_len < 16
    assert (
        both.fingerprint != TeacherWindows(Windows(examples.val, 16), examples.tokenizer, tokenizers()[3]).fingerprint
    )


def test_a_text_that_the_teacher_cannot_encode_is_named(file: Path) -> None:
    examples = load_examples(file, "char", val_fraction=0.3)
    with pytest.raises(DataError, match=r"rows.jsonl' line \d: the teacher's tokenizer: the character 't'"):
        TeacherWindows(Windows(examples.train, 64), examples.tokenizer, CharTokenizer("xyz"))
