"""Conversations into the text a chat model was trained on, by the Jinja template that comes with the model.

The template is part of a model's files and so written by others: it runs in Jinja's immutable sandbox, with the
extensions, filters and functions that Hugging Face's `apply_chat_template` gives it, and sees plain values only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from headwise.errors import DataError, FormatError, SettingsError, short

# Names that a message's reasoning goes by; most templates read the first, gpt-oss's the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
_EXAMPLE = "{'role': 'user', 'content': 'Hello'}"


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
) -> str:
    """The text of a conversation, special tokens written out by name: encode it with `special=True`.

    Args:
        template: the model's chat template (Jinja).
        messages: one mapping a turn, with `role` and `content`, and whatever else the template reads.
        add_generation_prompt: end with what opens the assistant's turn.
        bos_token, eos_token: what the template's variables of these names stand for.

    Raises:
        SettingsError: the messages are no conversation.
        DataError: the template refuses these messages (roles that do not take turns, say).
        FormatError: the template is no Jinja, or does what the sandbox forbids.
    """
    chat = [_message(number, message) for number, message in enumerate(messages)]
    if not chat:
        raise SettingsError(f"messages: is empty; give at least one, such as {_EXAMPLE}")
    try:
        return _compiled(template).render(
            messages=chat,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
        )
    except _Refusal as error:
        raise DataError(f"the model's chat template refuses these messages: {_line(error)}") from None
    except TemplateSyntaxError as error:
        raise FormatError(f"the chat template is no Jinja: {_line(error)} (line {error.lineno} of it)") from None
    except (
        TemplateError,
        ArithmeticError,
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise FormatError(f"the chat template fails on these messages: {_line(error)}") from None


def _message(number: int, message: Any) -> dict[str, Any]:
    """One turn made of plain values, its reasoning under the names that templates read."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
        raise SettingsError(f"messages: number {number} is {short(message)}; wanted is a mapping such as {_EXAMPLE}")
    plain = _plain(message)
    reasoning = next((plain[name] for name in REASONING if plain.get(name) is not None), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """The value made of JSON's types alone: the methods of others are beyond what the sandbox guards."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise SettingsError(f"messages: {short(value)} is a {type(value).__name__}; a message holds JSON's values only")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---- what a template finds in its sandbox ----


class _Refusal(Exception):
    """A template called `raise_exception`."""


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter writes it for HTML, with < as \\u003c."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what training learns; the text within stays as it is."""

    tags = {"generation"}  # noqa: RUF012 (the form that Jinja asks for)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(Namespace):
    """A namespace without underscored names, which lead into Python's insides."""

    def __init__(*args: Any, **values: Any) -> None:  # as Jinja's own, so that self=… is a value like others
        self, *given = args
        attributes = dict(*given, **values)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name that begins with an underscore, as {name!r} does")


class _Dict:
    """`dict(…)` and `dict.fromkeys(…)` without the class behind them."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals |= {"dict": _Dict(), "namespace": _Namespace}
    return environment.from_string(source)
