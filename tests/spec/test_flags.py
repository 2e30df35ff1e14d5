"""Dotted flags on top of a line, document 000's spellings among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from headwise.attention import Attention, AttentionSpec
from headwise.errors import SpecError
from headwise.ffn import FFNSpec
from headwise.registry import ATTENTION, FFN
from headwise.spec import apply_flags, parse
from headwise.spec.flags import is_model_flag


class VeinSpec(AttentionSpec):
    """An attention with a rank, as document 000's are."""

    kind: Literal["test_vein"] = "test_vein"
    rank: int = Field(4, gt=0)
    tau: float = 0.18


class VeinFFNSpec(FFNSpec):
    """A feed-forward with a rank."""

    kind: Literal["test_vein"] = "test_vein"
    rank: int = Field(4, gt=0)
    r_hidden: int | None = None


@pytest.fixture
def vein() -> Iterator[None]:
    """Both registered for one test."""
    ATTENTION.list(), FFN.list()
    ATTENTION.register(VeinSpec)(Attention)
    FFN.register(VeinFFNSpec)(Attention)
    yield
    del ATTENTION._entries["test_vein"], FFN._entries["test_vein"]


def flagged(line: str, **flags: Any) -> str:
    """The line after flags, given with __ for the dot."""
    return str(apply_flags(parse(line), {name.replace("__", "."): value for name, value in flags.items()}))


def test_fields_of_the_model_and_of_its_components() -> None:
    spec = apply_flags(
        parse("llama"),
        {"model.d_model": "768", "model.attention.kind": "gqa", "model.attention.kv-heads": "4", "model.ffn.d_ff": "99"}
        | {"model.tie-embeddings": "true", "model.norm.eps": "1e-3", "model.order": "sandwich", "norm.eps": "1e-3"},
    )
    assert spec == parse(
        "llama(d_model=768, attention=gqa(kv_heads=4), ffn=swiglu(d_ff=99), tie_embeddings=True, "
        "norm=rmsnorm(eps=1e-3), order=sandwich)"
    )


def test_the_short_roots_are_the_long_ones() -> None:
    for root in ("attn", "attention", "model.attention"):
        assert flagged("llama", **{f"{root}.kv_heads": 2}) == "llama(attention=softmax(kv_heads=2))"
        assert flagged("llama", **{f"{root}.impl": "window", f"{root}.window": "8"}) == "llama(attention=window(8))"
    assert flagged("llama", position__kind="alibi", norm__kind="layernorm") == "llama(position=alibi, norm=layernorm)"


def test_a_new_kind_drops_the_fields_of_the_old_one() -> None:
    line = "llama(attention=window(8, kv_heads=2, qk_norm=True), ffn=mlp(relu, d_ff=64), position=rope(base=5))"
    expected = "llama(position=rope(base=5.0), ffn=mlp(relu, d_ff=64))"
    assert flagged(line, attn__kind="softmax") == flagged(line, model__attention="softmax") == expected
    assert parse(flagged(line, model__ffn__kind="swiglu")).ffn == parse("llama").ffn
    assert parse(flagged(line, position__kind="rope")).position == parse("llama").position
    assert parse(flagged("qwen3", attn__kind="softmax")).attention == parse("llama").attention


def test_a_field_alone_keeps_the_others() -> None:
    line = "llama(attention=window(8, kv_heads=2, qk_norm=True), position=rope(base=5.0, scaling=linear(factor=2.0)))"
    assert flagged(line, attn__window="16") == line.replace("window(8", "window(16")
    assert flagged(line, attn__qk_norm="false") == line.replace(", qk_norm=True", "")
    assert flagged(line, position__base="7") == line.replace("base=5.0", "base=7.0")
    assert flagged(line, position__scaling="yarn(2, original_max_position_embeddings=8)") == line.replace(
        "linear(factor=2.0)", "yarn(factor=2.0, original_max_position_embeddings=8)"
    )
    assert flagged("mistral", attn__window="5") == "mistral(attention=window(5, kv_heads=2))"


def test_components_made_in_python_keep_their_fields() -> None:
    """Fields never set explicitly, such as a scaling's kind, were once lost on the way."""
    rope = parse("llama(position=rope(scaling=ntk(3)))").position
    made = type(rope)(base=9.0, scaling=type(rope.scaling)(factor=3))  # type: ignore[attr-defined, call-arg]
    spec = apply_flags(parse("llama").replace(position=made), {"position.base": "11"})
    assert spec == parse("llama(position=rope(base=11, scaling=ntk(3)))")


def test_calls_and_patterns_as_values() -> None:
    assert flagged("llama", model__attention="pattern(window(8), gqa(kv_heads=2))") == (
        "llama(attention=pattern(window(8), softmax(kv_heads=2)))"
    )
    assert flagged("llama", model__attention="gqa(kv_heads=2)", attn__bias="true") == (
        "llama(attention=softmax(kv_heads=2, bias=True))"
    )
    with pytest.raises(SpecError, match=r"attention.kv_heads: unknown field; pattern\(...\) takes components only"):
        flagged("llama(attention=pattern(window(8), softmax))", attn__kv_heads="2")


def test_values_that_are_not_text_stand_for_themselves() -> None:
    assert flagged("llama", model__d_model=64, model__bias=True) == "llama(d_model=64, bias=True)"
    assert flagged("llama", model__attention={"kind": "window", "window": 3}) == "llama(attention=window(3))"


def test_size_and_preset_are_put_under_what_the_line_says() -> None:
    assert flagged("llama(n_layers=2)", model__size="7b") == "llama(size='7b', n_layers=2)"
    assert flagged("llama(n_layers=2)", model__size="'7B'") == "llama(size='7b', n_layers=2)"
    assert flagged("gpt2(size='124m', ffn=swiglu)", model__preset="llama", model__size="7b") == (
        "llama(size='7b', ffn=swiglu)"
    )
    assert (
        flagged("mistral", model__size="7b", attn__window="9") == "mistral(size='7b', attention=window(9, kv_heads=8))"
    )
    with pytest.raises(SpecError, match="did you mean 'llama'"):
        flagged("gpt2", model__preset="lama")


@settings(max_examples=60)
@given(st.sampled_from(["attn.kv_heads=2", "model.d_model=96", "norm.eps=0.5", "ffn.kind=reglu"]), st.data())
def test_flags_commute_with_one_another(first: str, data: st.DataObject) -> None:
    others = ["model.n_heads=4", "ffn.d_ff=8", "attn.qk_norm=true", "model.order=post", "position.impl=none"]
    chosen = [first, *data.draw(st.lists(st.sampled_from(others), unique=True))]
    flags = dict(flag.split("=") for flag in chosen)
    shuffled = dict(data.draw(st.permutations(list(flags.items()))))
    together = apply_flags(parse("llama"), flags)
    assert apply_flags(parse("llama"), shuffled) == together
    assert parse(str(together)) == together


def test_no_flags_change_nothing() -> None:
    for line in ("llama", "gpt2(size='124m')", "llama(attention=pattern(window(8), softmax))"):
        assert apply_flags(parse(line), {}) == parse(line)


# ---- document 000's aliases ----


@pytest.mark.usefixtures("vein")
def test_the_aliases_of_document_000() -> None:
    flags = {"attn.impl": "test_vein", "ffn.impl": "test_vein", "vft.rank": "8"}
    expected = "llama(attention=test_vein(rank=8), ffn=test_vein(rank=8))"
    for names in (list(flags), list(reversed(flags))):
        assert str(apply_flags(parse("llama"), {name: flags[name] for name in names})) == expected


@pytest.mark.usefixtures("vein")
def test_vft_fields_go_wherever_the_kind_has_them() -> None:
    assert flagged("llama", attn__impl="test_vein", vft__rank=8) == "llama(attention=test_vein(rank=8))"
    both = "llama(attention=test_vein(kv_heads=2, rank=3), ffn=test_vein(d_ff=5, rank=3))"
    assert flagged(both, vft__rank=6, vft__tau="0.5", vft__r_hidden="7") == (
        "llama(attention=test_vein(kv_heads=2, rank=6, tau=0.5), ffn=test_vein(d_ff=5, rank=6, r_hidden=7))"
    )
    assert flagged("llama(attention=pattern(window(8), softmax), ffn=test_vein)", vft__rank="2") == (
        "llama(attention=pattern(window(8), softmax), ffn=test_vein(rank=2))"
    )
    with pytest.raises(SpecError) as caught:
        flagged("llama(attention=test_vein)", vft__rank="-2")
    assert str(caught.value) == "attention.rank: input should be greater than 0, not -2"


def test_vft_fields_that_nothing_has_are_an_error() -> None:
    with pytest.raises(SpecError) as caught:
        flagged("llama", vft__rank="8", vft__s="1")
    assert [str(p) for p in caught.value.problems] == [
        f"--vft.{name}: neither the attention nor the feed-forward has a field {name!r}" for name in ("rank", "s")
    ]


def test_a_kind_that_is_not_there_is_named_with_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"attention: unknown attention 'windwo' \(did you mean 'window'"):
        flagged("llama", attn__impl="windwo")
    with pytest.raises(SpecError, match="unknown attention 'windwo'"):
        flagged("llama", attn__impl="windwo", vft__rank="3")


# ---- what is wrong, all at once ----


def test_all_wrong_flags_come_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        flagged("llama", modle__d_model="3", model__position__scaling__factor="2", norm__eps="1 +", vft="3", attn__="2")
    problems = [str(p) for p in caught.value.problems]
    assert [p.partition(":")[0] for p in problems] == [
        "--modle.d_model",
        "--model.position.scaling.factor",
        "--norm.eps",
        "--vft",
        "--attn.",
    ]
    assert "did you mean 'model'?" in problems[0]
    assert "too many dots" in problems[1]


def test_fields_that_are_wrong_come_with_what_is_allowed() -> None:
    with pytest.raises(SpecError) as caught:
        flagged("llama", model__d_modl="3", attn__kv_head="2", ffn__kind="swiglux", model__n_layers="-1")
    text = str(caught.value)
    for piece in ("did you mean 'd_model'?", "did you mean 'kv_heads'?", "did you mean 'swiglu'?", "not -1"):
        assert piece in text
    with pytest.raises(SpecError, match="does not divide n_heads=4"):
        flagged("llama(d_model=64, n_heads=4)", attn__kv_heads="3")


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from(["model.d_model", "attn.kind", "model.attention", "position.scaling", "model.size", "vft.rank"])
        | st.text(alphabet="abcmodel.-_", max_size=12),
        st.text(max_size=12) | st.sampled_from(["softmax", "pattern(rope)", "linear(2)", "7b", "[1]"]),
        max_size=3,
    )
)
def test_any_flags_are_worked_in_or_refused(flags: dict[str, str]) -> None:
    try:
        spec = apply_flags(parse("llama"), flags)
    except SpecError:
        return
    assert parse(str(spec)) == spec


def test_which_flags_speak_of_the_model() -> None:
    assert all(map(is_model_flag, ["model.d_model", "attn.impl", "vft.rank", "ffn.impl", "norm.eps", "position.base"]))
    assert not any(map(is_model_flag, ["model", "lr", "seeds", "a.b", ""]))
