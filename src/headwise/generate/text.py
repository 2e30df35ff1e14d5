"""Ids into text as they come, never past the beginning of what might be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decodes(Protocol):
    """A tokenizer, as far as making text of ids goes."""

    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """Text in pieces. They add up to `text`, which ends before the first stop string; nothing of that is given out.

    A token that ends inside a character (bytes, BPE) is held back until the character is whole, and so is text that a
    stop string may begin with. Of several stop strings the one that begins first counts.

    Attributes:
        text: what was given out so far.
        stopped: the stop string that ended the text, None while none did.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._before: list[int] = []
        self._pending: list[int] = []
        self._held = ""  # decoded, but perhaps the beginning of a stop string

    def push(self, token: int) -> str:
        """What one more id lets out, perhaps nothing."""
        self._pending.append(token)
        piece = self._decoded()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._before, self._pending = self._pending, []
        return self._let_out(self._held + piece)

    def finish(self) -> str:
        """What was held back, now that no further id comes."""
        if self.stopped is not None:
            return ""
        piece = self._let_out(self._held + self._decoded())
        rest, self._held, self._pending = self._held, "", []
        self.text += rest
        return piece + rest

    def _decoded(self) -> str:
        """The difference that pending ids make after the ids of the piece before, since some tokenizers decode a token
        differently at the start of a text."""
        decode = self._tokenizer.decode
        return decode(self._before + self._pending)[len(decode(self._before)) :]

    def _let_out(self, text: str) -> str:
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            # Of two that begin together the longer one is named; the text is the same.
            end, self.stopped = min(found, key=lambda each: (each[0], -len(each[1])))
            self._held = ""
        else:
            end = len(text) - max((_begun(text, stop) for stop in self._stop), default=0)
            self._held = text[end:]
        self.text += text[:end]
        return text[:end]


def _begun(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first ones of `stop`, at most."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
