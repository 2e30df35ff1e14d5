"""Text as it comes: pieces add up, no character is split, and nothing of a stop string is given out."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from headwise.generate.text import TextStream


class Bytes:
    """UTF-8 bytes, decoded as `headwise.data`'s byte tokenizer does."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class Words:
    """Tokens of several characters."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.words[i] for i in ids)


def streamed(stream: TextStream, ids: Sequence[int]) -> list[str]:
    pieces = []
    for i in ids:
        pieces.append(stream.push(i))
        if stream.stopped is not None:
            break
    return [*pieces, stream.finish()]


@given(st.text(max_size=30))
def test_pieces_add_up_and_never_split_a_character(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode().replace("\ufffd", "")
    stream = TextStream(Bytes())
    pieces = streamed(stream, text.encode())
    assert "".join(pieces) == stream.text == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_bytes_that_are_no_text_come_out_at_the_end_at_the_latest() -> None:
    assert "".join(streamed(TextStream(Bytes()), [0x41, 0xE2, 0x82])).startswith("A\ufffd")


AB = st.text("ab", min_size=1, max_size=4)


@given(st.lists(AB, max_size=12), st.lists(AB, max_size=3))
@example(["aa", "b", "a"], ["abb", "aba"])
def test_text_ends_before_the_first_stop_string_wherever_tokens_end(words: list[str], stop: list[str]) -> None:
    whole = "".join(words)
    ends = [at for each in stop if (at := whole.find(each)) >= 0]
    stream = TextStream(Words(words), stop)
    pieces = streamed(stream, range(len(words)))
    assert "".join(pieces) == stream.text
    assert (stream.stopped is not None) == bool(ends)
    assert not any(each in stream.text for each in stop)
    assert whole.startswith(stream.text + stream.stopped) if stream.stopped else whole == stream.text


def test_one_character_at_a_time_stops_at_the_first_that_is_whole() -> None:
    stream = TextStream(Words("Hello, STOP!"), ["STOP", "TO"])
    assert streamed(stream, range(12)) == [*"Hello, ", "", "", "S", ""]
    assert (stream.text, stream.stopped) == ("Hello, S", "TO")


def test_what_was_held_back_comes_when_it_was_no_stop_string() -> None:
    stream = TextStream(Words(["ST", "AY", "ST"]), ["STOP"])
    assert streamed(stream, range(3)) == ["", "STAY", "", "ST"]
