"""Conversations with a model that was trained on them: its own template makes the text of each turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headwise.data.chat import render_chat
from headwise.errors import SettingsError
from headwise.generate.decode import complete, new_session
from headwise.generate.request import Generation, Request
from headwise.generate.writer import Writer

if TYPE_CHECKING:
    from headwise.data import Tokenizer


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids of a conversation up to where the assistant speaks.

    Raises:
        SettingsError: the tokenizer knows no conversations, or the messages are none; see `data.chat.render_chat`.
    """
    if tokenizer.chat_template is None:
        raise SettingsError("this model has no chat template: it was not trained on conversations; give it a prompt")
    bos, eos = (tokenizer.special_tokens.get(name, "") for name in ("bos_token", "eos_token"))
    text = render_chat(tokenizer.chat_template, messages, bos_token=bos, eos_token=eos)
    return [int(i) for i in tokenizer.encode(text, special=True)]


class Chat:
    """A conversation. What was said stays in the cache, so that a turn costs its own tokens only.

    Args:
        writer: a model trained on conversations and how it writes; not by beam search.
        request: how answers are chosen; its prompt does not matter. Every turn draws anew.
        system: what the model is told before the first turn.

    Attributes:
        messages: what was said so far, {"role", "content"} each.
    """

    def __init__(self, writer: Writer, request: Request, *, system: str | None = None) -> None:
        if writer.beams is not None:
            raise SettingsError("beams does not go with chat")
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self._writer, self._request = writer, request
        self._session = new_session(writer.model, writer.cache, writer.draft, writer.compile)

    def say(self, text: str, on_text: Callable[[str], None] | None = None) -> Generation:
        """The answer to one turn of the user's. Raises as `complete` and `chat_ids`; the turn is then forgotten."""
        writer, asked = self._writer, [*self.messages, {"role": "user", "content": text}]
        index = self._request.index + sum(message["role"] == "assistant" for message in asked)
        request = replace(self._request, prompt=chat_ids(writer.tokenizer, asked), index=index)
        found = complete(
            writer.model, writer.tokenizer, request, on_text=on_text, draft=writer.draft, session=self._session
        )
        self.messages = [*asked, {"role": "assistant", "content": found.text}]
        return found
