"""Texts whose parts are known: what was asked, the reasoning, the answer.

An *example* is a text cut into parts without gaps: every character belongs to exactly one. Rows of JSON lines become
examples in one of three ways:

gsm8k   {"question": …, "answer": "… #### 72"} (Cobbe et al. 2021, arXiv:2110.14168) reads
        `Question: …\\nAnswer:` (prompt) ` …\\n` (reasoning) `#### 72` (answer).
chat    {"messages": [{"role": …, "content": …}, …]}, written by the tokenizer's chat template. What the assistant says
        is the answer; what comes before its content in `reasoning_content`, or within it up to `</think>`, is
        reasoning; all else is prompt.
marks   {"text": "<|prompt|>…<|reasoning|>…<|answer|>…"}: each mark begins a part and is itself no text. Parts of other
        names begin at `<|part:NAME|>`. Or {"text": …, "spans": [[0, 14, "prompt"], …]}, in characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from headwise.data.corpora import utf8
from headwise.errors import DataError, FormatError, SettingsError, nearest, short

if TYPE_CHECKING:
    from headwise.data.tokenizers import Tokenizer

PARTS = ("prompt", "reasoning", "answer")
Format = Literal["auto", "gsm8k", "chat", "marks", "text"]
FINAL_ANSWER = "####"  # stands before it in GSM8K
_MARK = re.compile(rf"<\|(?:({'|'.join(PARTS)})|part:([A-Za-z0-9_-]+))\|>")
_THOUGHT_ENDS = "</think>"

Row = Mapping[str, Any]


class Span(NamedTuple):
    """Characters `start` to `stop` of a text and the part they are."""

    start: int
    stop: int
    part: str


@dataclass(frozen=True)
class Example:
    """A text and its parts in order.

    Attributes:
        text: never empty.
        spans: cover the text without gap or overlap.
        special: whether names of special tokens in the text stand for these tokens, as a chat template writes them.
        where: file and line, for errors.

    Raises `DataError` for spans that do not cover the text, with the place.
    """

    text: str
    spans: tuple[Span, ...]
    special: bool = False
    where: str = "the example"

    def __post_init__(self) -> None:
        if not self.text:
            raise DataError(f"{self.where}: its text is empty")
        utf8(self.text)
        reached = 0
        for start, stop, part in self.spans:
            if not reached <= start < stop <= len(self.text):
                raise DataError(
                    f"{self.where}: the {part} segment, characters {start:,} to {stop:,}, should begin at {reached:,} "
                    f"and end behind that, within the text's {len(self.text):,} characters"
                )
            if start > reached:
                raise self._gap(reached, start)
            reached = stop
        if reached < len(self.text):
            raise self._gap(reached, len(self.text))

    def _gap(self, start: int, stop: int) -> DataError:
        return DataError(
            f"{self.where}: its segments do not cover the text: characters {start:,} to {stop:,} "
            f"({short(self.text[start:stop])}) belong to none"
        )

    def of_part(self, *parts: str) -> str:
        """The text of these parts, joined."""
        return "".join(self.text[start:stop] for start, stop, part in self.spans if part in parts)

    @property
    def prompt(self) -> str:
        """The text before the first part that is no prompt."""
        return self.text[: next((start for start, _, part in self.spans if part != "prompt"), len(self.text))]


def detect(row: Row) -> Format:
    """The format of rows like this one; "text" for one that has no parts."""
    if isinstance(row.get("question"), str) and FINAL_ANSWER in str(row.get("answer")):
        return "gsm8k"
    if isinstance(row.get("messages"), list):
        return "chat"
    if "spans" in row or _MARK.match(str(row.get("text"))):
        return "marks"
    return "text"


def reader(format: Format, tokenizer: Tokenizer | None = None) -> Callable[[Row, str], Example]:
    """What makes an example of a row and the words for its place; `chat` needs a tokenizer with a chat template.

    Raises DataError where that is missing, and the reader itself for a row it cannot take.
    """
    match format:
        case "gsm8k":
            return _gsm8k
        case "marks":
            return _marks
        case "chat":
            if tokenizer is None or tokenizer.chat_template is None:
                raise DataError(
                    "format chat needs a tokenizer with a chat template; give the folder or GGUF file of a chat model "
                    "as tokenizer"
                )
            return lambda row, where: _chat(row, where, tokenizer)
    raise DataError(f"format {format} has no parts; allowed: gsm8k, chat, marks")


def _gsm8k(row: Row, where: str) -> Example:
    question, answer = _text(row, "question", where), _text(row, "answer", where)
    reasoning, mark, final = answer.rpartition(FINAL_ANSWER)
    if not mark or not final.strip():
        raise DataError(f"{where}: 'answer' has no final answer behind {FINAL_ANSWER!r}")
    pieces = (f"Question: {question.strip()}\nAnswer:", f" {reasoning.strip()}\n", f"{mark} {final.strip()}")
    return Example("".join(pieces), _spans(zip(PARTS, pieces)), where=where)


def _marks(row: Row, where: str) -> Example:
    text = _text(row, "text", where)
    if "spans" in row:
        return Example(text, _given(row["spans"], where), where=where)
    _, *found = _pieces(text)
    if not found or (first := _MARK.search(text)) is None or first.start():
        raise DataError(
            f"{where}: its segments do not cover the text: {short(text[:40])} stands before any mark; begin the text "
            "with <|prompt|>, <|reasoning|>, <|answer|> or <|part:NAME|>"
        )
    return Example("".join(piece for _, piece in found), _spans(found), where=where)


def _pieces(text: str) -> list[tuple[str, str]]:
    """(part, text) in order, what stands before the first mark first."""
    marks = list(_MARK.finditer(text))
    stops = [*(mark.start() for mark in marks), len(text)]
    found = [(mark[1] or mark[2], text[mark.end() : stop]) for mark, stop in zip(marks, stops[1:])]
    return [("", text[: stops[0]]), *found]


def _given(spans: object, where: str) -> tuple[Span, ...]:
    def is_span(span: object) -> bool:
        return isinstance(span, list) and [type(value) for value in span] == [int, int, str]

    if not isinstance(spans, list) or not all(map(is_span, spans)):
        raise DataError(f"{where}: 'spans' is {short(spans)}; wanted is a list such as [[0, 14, 'prompt'], …]")
    return tuple(Span(*span) for span in spans)


def _chat(row: Row, where: str, tokenizer: Tokenizer) -> Example:
    from headwise.data.chat import REASONING, render_chat

    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where} has no list 'messages'{nearest('messages', row)}")
    ends = {f"{role}_token": tokenizer.special_tokens.get(f"{role}_token", "") for role in ("bos", "eos")}

    def rendered(n: int, opened: bool) -> str:
        """The first `n` messages; `opened`: and what opens the assistant's turn."""
        try:
            return render_chat(tokenizer.chat_template or "", messages[:n], add_generation_prompt=opened, **ends)
        except (DataError, SettingsError, FormatError) as error:
            raise DataError(f"{where}: {error}") from None

    text = rendered(len(messages), False)
    spans: list[Span] = []
    for n in (n for n, message in enumerate(messages) if message.get("role") == "assistant"):
        before, turn = rendered(n, True) if n else "", rendered(n + 1, False)
        if not (text.startswith(turn) and turn.startswith(before)):
            raise DataError(
                f"{where}: the chat template writes message {n} another way when more follow, so that its place is "
                "not known; keep only the last turn of the assistant, or mark the parts (format marks)"
            )
        content = str(messages[n].get("content") or "")
        reasons = _THOUGHT_ENDS in content or any(messages[n].get(name) for name in REASONING)
        spans += _turn(turn, len(before), content if reasons else "")
    return Example(text, _filled(spans, len(text)), special=True, where=where)


def _turn(text: str, start: int, content: str) -> Iterator[Span]:
    """The assistant's turn from `start` to the end of the text; where it reasons (`content` is not empty), what
    precedes the answer's own words is the reasoning."""
    answer = content.rpartition(_THOUGHT_ENDS)[2].strip()
    at = max(text.rfind(answer, start), start) if answer else start
    yield from (Span(*span) for span in ((start, at, "reasoning"), (at, len(text), "answer")) if span[0] < span[1])


def _filled(spans: Sequence[Span], length: int) -> tuple[Span, ...]:
    """The spans, with prompts where there is none."""
    ends = [0, *(span.stop for span in spans)]
    starts = [*(span.start for span in spans), length]
    prompts = [Span(end, start, "prompt") for end, start in zip(ends, starts) if end < start]
    return tuple(sorted([*spans, *prompts]))


def _spans(pieces: Any) -> tuple[Span, ...]:
    """The spans of (part, text) one behind the other; empty ones are left out."""
    spans, reached = [], 0
    for part, piece in pieces:
        if piece:
            spans.append(Span(reached, reached + len(piece), part))
            reached += len(piece)
    return tuple(spans)


def _text(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        known = ", ".join(row) or "none"
        raise DataError(f"{where} has no text {column!r}{nearest(column, row)}; its columns: {known}")
    return value
