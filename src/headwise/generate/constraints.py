"""Text that is sure to have a form: a JSON schema or a regular expression, through the library `llguidance`.

At every step the library says which tokens may follow (arXiv:2403.06988 describes such masks); all others are banned
before anything is chosen. Tokens are compared byte by byte, so that any tokenizer does.

A text that ends by itself (finish_reason "stop") always has the form. One that is cut by `max_new_tokens` ("length") is
the beginning of one that has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from headwise.data.tokenizers import RustBackedTokenizer
from headwise.errors import DataError, HeadwiseError, SettingsError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor

    from headwise.data import Tokenizer

# At most one space where JSON allows any, as json.dumps writes it, so that no model goes on with blanks forever.
_JSON: Any = {"whitespace_flexible": True, "whitespace_pattern": " ?"}


class Constraint:
    """A form, made ready for a tokenizer; `start` follows one text through it.

    Made by `json_schema` and `regex`. Building one costs about a second for a vocabulary of 100,000: share it between
    requests.
    """

    def __init__(self, grammar: str, tokenizer: Tokenizer, ends: Sequence[int] = (), *, what: str) -> None:
        from llguidance import LLMatcher

        self._tokenizer = _ll_tokenizer(tokenizer, tuple(dict.fromkeys((*tokenizer.eos_ids, *ends))))
        self._matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if self._matcher.is_error():
            raise SettingsError(f"{what}: {_reason(self._matcher.get_error())}")

    def start(self) -> Following:
        """The beginning of a text."""
        return Following(self._matcher.deep_copy())

    def fits(self, text: str) -> bool:
        """Whether a whole text has the form."""
        matcher = self._matcher.deep_copy()
        tokens = self._tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    def may_begin(self, text: str) -> bool:
        """Whether some text that has the form begins so."""
        matcher = self._matcher.deep_copy()
        tokens = self._tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens)


class Following:
    """One text on its way through a constraint."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, vocab_size: int) -> Tensor:
        """Boolean [V]: which of the tokenizer's ids may follow; an end token may where the text may end here."""
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return bits.flatten()[:vocab_size].bool()

    def take(self, token: int) -> bool:
        """Go on by a token that was allowed; True where nothing but the end can follow."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def copy(self) -> Following:
        """The same text, to go on with apart."""
        return Following(self._matcher.deep_copy())

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _reason(self._matcher.get_error())
            if reason.startswith("NoExtension") or "forced bytes" in reason:
                reason = "no token of this tokenizer can go on: it lacks characters that the form needs"
            raise HeadwiseError(f"constraint: {reason}")


def json_schema(schema: Mapping[str, Any] | str, tokenizer: Tokenizer, ends: Sequence[int] = ()) -> Constraint:
    """JSON of a schema (https://json-schema.org), with at most one space between its parts.

    Args:
        schema: the schema, or its JSON text.
        tokenizer: what the model reads.
        ends: ids that end a text beside the tokenizer's own.

    Raises:
        SettingsError: no JSON, no schema, or one that asks for what llguidance lacks; `llguidance` is not installed.
    """
    _needed()
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise SettingsError(f"json_schema: is no JSON: {error}") from None
    if not isinstance(schema, Mapping):
        raise SettingsError("json_schema: is no JSON object; give a schema, such as {'type': 'object'}")
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides=_JSON)
    except (ValueError, TypeError) as error:
        raise SettingsError(f"json_schema: {_reason(str(error))}") from None
    return Constraint(grammar, tokenizer, ends, what="json_schema")


def regex(pattern: str, tokenizer: Tokenizer, ends: Sequence[int] = ()) -> Constraint:
    """Text that a regular expression matches from beginning to end: the syntax of Rust's `regex` crate.

    Raises:
        SettingsError: the pattern cannot be read (look-around and back-references are unknown), or `llguidance` is not
            installed.
    """
    _needed()
    from llguidance import LLMatcher

    return Constraint(LLMatcher.grammar_from_regex(pattern), tokenizer, ends, what="regex")


def _needed() -> None:
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise SettingsError(
            "json_schema and regex need the package llguidance; install it with: pip install 'headwise[constraints]'"
        ) from None


def _reason(message: str) -> str:
    """The heart of the library's message, on one line: a parser may draw where the mistake stands and then name it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])


def _ll_tokenizer(tokenizer: Tokenizer, ends: Sequence[int]) -> LLTokenizer:
    """Our tokenizers as llguidance reads them. Without an end token one is added, which the model does not have: such a
    text ends where nothing can follow, or at max_new_tokens."""
    from llguidance import LLTokenizer, TokenizerWrapper

    if isinstance(tokenizer, RustBackedTokenizer):
        if not ends:
            raise SettingsError("constraint: this tokenizer names no end-of-text token; give its id as a stop id")
        return LLTokenizer(tokenizer.state()["tokenizer"], n_vocab=tokenizer.vocab_size, eos_token=list(ends))
    wrapper = _Bytes(tokenizer, ends[0] if ends else tokenizer.vocab_size)
    return LLTokenizer(
        TokenizerWrapper(wrapper), n_vocab=len(wrapper.tokens), eos_token=list(ends) or wrapper.eos_token_id
    )


class _Bytes:
    """A character or byte tokenizer in the form that llguidance asks for: the bytes of every id."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_id: int) -> None:
        ids = range(tokenizer.vocab_size)
        tokens = [bytes([i]) if tokenizer.kind == "byte" and i < 256 else tokenizer.decode([i]).encode() for i in ids]
        self.tokens = [*tokens[:eos_id], b"<end>", *tokens[eos_id + 1 :]]
        self.eos_token_id = eos_id
        self.special_token_ids = [eos_id]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        try:
            return [int(i) for i in self._tokenizer.encode(text)]
        except DataError:  # a character this tokenizer lacks: in the library's own trials, or in a schema
            return []
