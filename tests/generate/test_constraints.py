"""Constrained text: whatever the model would say, what ends has the form, and what is cut begins one that has."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from small_models import small, tokenizer_of

from headwise.data.tokenizers import ByteTokenizer, Tokenizer, train_bpe
from headwise.errors import HeadwiseError, SettingsError
from headwise.generate import Request, Sampling, complete
from headwise.generate.constraints import Constraint, json_schema, regex
from headwise.model.base import LanguageModel

PRINTABLE = "".join(map(chr, range(32, 127))) + "éΩ\n"
TOKENIZERS: dict[str, Tokenizer] = {
    "char": tokenizer_of(PRINTABLE),
    "char with eos": tokenizer_of(PRINTABLE, eos=True),
    "byte": ByteTokenizer(eos=True),
    "byte without eos": ByteTokenizer(),
    "bpe": train_bpe(['{"name": "Ωé", "ab": [12, true, null]} the cat sat on the mat'] * 20, 320),
}
MODELS: dict[str, LanguageModel] = {}


def asked(kind: str, constraint: Constraint, prompt: str, *, max_new_tokens: int, seed: int = 0, **options: Any) -> Any:
    """A random model that knows nothing of the form; it has more rows than its tokenizer has ids."""
    tokenizer = TOKENIZERS[kind]
    if kind not in MODELS:
        MODELS[kind] = small("llama", vocab_size=tokenizer.vocab_size + 3, n_layers=1, max_seq_len=4096)
    request = Request(prompt, Sampling(seed=seed, **options), max_new_tokens=max_new_tokens, constraint=constraint)
    return complete(MODELS[kind], tokenizer, request)


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of finite things, so that texts end."""
    leaf: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
        [
            {"type": "integer", "minimum": -20, "maximum": 130},
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["red", "Ω", 3, None]},
            {"const": {"a": [1, "é"]}},
            {"type": "string", "maxLength": 5},
            {"type": "string", "pattern": "^[a-c]{2}x?$"},
        ]
    )

    def bigger(each: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        fields = st.dictionaries(st.sampled_from(["a", "bb", "Ω"]), each, max_size=3)
        return (
            st.builds(lambda items, n: {"type": "array", "items": items, "maxItems": n}, each, st.integers(0, 3))
            | st.builds(lambda a, b: {"anyOf": [a, b]}, each, each)
            | fields.map(
                lambda p: {"type": "object", "properties": p, "required": list(p)[:1], "additionalProperties": False}
            )
        )

    return st.recursive(leaf, bigger, max_leaves=4)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """The part of JSON schema that is used here, checked apart from the library."""
    if "anyOf" in schema:
        return any(fits(value, each) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    match schema["type"]:
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "boolean":
            return type(value) is bool
        case "null":
            return value is None
        case "string":
            return (
                isinstance(value, str)
                and len(value) <= schema.get("maxLength", 99)
                and ("pattern" not in schema or re.search(schema["pattern"], value) is not None)
            )
        case "array":
            return (
                isinstance(value, list)
                and len(value) <= schema["maxItems"]
                and all(fits(each, schema["items"]) for each in value)
            )
    properties = schema["properties"]
    return (
        isinstance(value, dict)
        and set(schema["required"]) <= set(value) <= set(properties)
        and all(fits(value[name], properties[name]) for name in value)
    )


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(schema=schemas(), seed=st.integers(0, 100), max_new_tokens=st.sampled_from([1, 3, 10, 300]))
@hypothesis_settings(max_examples=25)
def test_text_is_json_of_the_schema_or_its_beginning(
    kind: str, schema: dict[str, Any], seed: int, max_new_tokens: int
) -> None:
    constraint = json_schema(schema, TOKENIZERS[kind])
    found = asked(kind, constraint, "the cat", max_new_tokens=max_new_tokens, seed=seed)
    if found.finish_reason == "stop":
        assert fits(json.loads(found.text), schema)
    else:
        assert len(found.token_ids) == max_new_tokens < 300
        assert constraint.may_begin(found.text.rstrip("\ufffd"))  # a character may be cut in two


PATTERNS = ["[0-9]{3}-[a-f]{2,4}", "(yes|no|Ω+!)", "a*b", "[^a-z]{1,5}", "é?(x|yy){2,6}\\."]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 100), temperature=st.sampled_from([0.0, 1.0]))
@hypothesis_settings(max_examples=15)
def test_text_matches_the_pattern(kind: str, pattern: str, seed: int, temperature: float) -> None:
    constraint = regex(pattern, TOKENIZERS[kind])
    found = asked(kind, constraint, "the", max_new_tokens=24, seed=seed, temperature=temperature)
    whole = re.fullmatch(pattern, found.text)
    assert whole or found.finish_reason == "length"
    assert constraint.may_begin(found.text.rstrip("\ufffd"))
    assert constraint.fits(found.text) == bool(whole)


def test_a_text_may_end_where_the_form_allows_more() -> None:
    """With an end token the model chooses; without one, the text goes on until nothing can follow."""
    ends, goes_on = TOKENIZERS["char with eos"], TOKENIZERS["char"]
    texts = {asked("char with eos", regex("a{1,4}", ends), "a", max_new_tokens=9, seed=seed).text for seed in range(40)}
    assert len(texts) > 1
    assert asked("char", regex("a{1,4}", goes_on), "a", max_new_tokens=9).text == "aaaa"
    found = asked("char", regex("a+", goes_on), "a", max_new_tokens=9)
    assert (found.text, found.finish_reason) == ("a" * 9, "length")


def test_other_end_tokens_end_a_form_too() -> None:
    tokenizer, model = tokenizer_of("ab."), small("llama", "ab.")
    stop = int(tokenizer.encode(".")[0])
    constraint = regex("(ab)+", tokenizer, ends=[stop])
    request = Request("a", Sampling(), max_new_tokens=60, stop_ids=[stop], constraint=constraint)
    found = complete(model, tokenizer, request)
    assert (found.finish_reason, len(found.text) % 2) == ("stop", 0)
    assert constraint.fits(found.text)


@pytest.mark.parametrize(
    ("make", "form", "message"),
    [
        (json_schema, "{", "json_schema: is no JSON: "),
        (json_schema, "[1]", "json_schema: is no JSON object"),
        (json_schema, {"type": "objct"}, "json_schema: Invalid type: objct"),
        (json_schema, {"not": {"type": "null"}}, 'json_schema: Unimplemented keys: ["not"]'),
        (json_schema, {"$ref": "#/nowhere"}, "json_schema: Pointer '/nowhere' does not exist"),
        (json_schema, {"type": "string", "pattern": "("}, "json_schema: unclosed group"),
        (json_schema, {"enum": [{1}]}, "json_schema: "),
        (regex, "(", "regex: unclosed group"),
        (regex, "(?=a)b", "regex: look-around"),
    ],
)
def test_what_is_no_form_is_one_line(make: Any, form: Any, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        make(form, TOKENIZERS["byte"])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_form_that_the_tokenizer_cannot_write() -> None:
    with pytest.raises(HeadwiseError, match="it lacks characters that the form needs"):
        asked("char", regex("ab中", TOKENIZERS["char"]), "a", max_new_tokens=9)


def test_bans_and_a_form_together_may_leave_nothing() -> None:
    tokenizer = TOKENIZERS["byte"]
    with pytest.raises(HeadwiseError, match="no token is left"):
        asked("byte", regex("a", tokenizer), "a", max_new_tokens=9, logit_bias={97: float("-inf")})
