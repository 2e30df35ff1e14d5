"""The line grammar: what is printed is read back equal, and what is read wrongly is refused in words."""

from __future__ import annotations

import builtins
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_specs import LOOSE, specs

from headwise.errors import SpecError
from headwise.registry import FAMILIES, Pattern
from headwise.spec import ModelSpec, list_presets, parse, to_line
from headwise.spec.grammar import MAX_CHARACTERS, MAX_DEPTH, from_yaml, to_yaml
from headwise.spec.presets import PRESETS

PROPERTY = settings(LOOSE, max_examples=150)
PUBLISHED = [
    name if size is None else f"{name}(size={size!r})" for name in PRESETS for size in (None, *PRESETS[name].sizes)
]


def assert_round_trips(spec: ModelSpec) -> None:
    assert parse(str(spec)) == spec
    assert parse(to_line(spec)) == spec
    assert from_yaml(to_yaml(spec)) == spec
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec
    assert ModelSpec.model_validate(spec.model_dump()) == spec
    assert hash(parse(str(spec))) == hash(spec)


# ---- what is printed is read back equal ----


@PROPERTY
@given(specs())
def test_any_spec_is_read_back_equal(spec: ModelSpec) -> None:
    assert_round_trips(spec)


@PROPERTY
@given(specs(), st.sampled_from(["300k", "1m", "2.5m", "10m"]), st.integers(1, 50_000), st.integers(1, 4096))
def test_resolved_specs_are_read_back_equal(spec: ModelSpec, size: str, vocab: int, length: int) -> None:
    try:
        resolved = spec.resolve(size, vocab, length)
    except SpecError:
        return  # widths that fit no head are refused, in words
    assert resolved.is_resolved
    assert_round_trips(resolved)
    assert resolved.resolve("77m", 3, 3) == resolved  # nothing is left to fill


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_models_print_as_their_name(line: str) -> None:
    spec = parse(line)
    assert str(spec) in (line, line.replace("'", ""))
    assert_round_trips(spec)
    assert_round_trips(spec.resolve())


@pytest.mark.parametrize(
    "line",
    [
        "llama(d_model=384, n_layers=6, attention=gqa(kv_heads=2), ffn=swiglu)",
        "gpt2(position=rope, norm=rmsnorm)",
        "llama(attention=pattern(window(256), window(256), softmax))",
        "gpt2(position=pattern(rope, none, alibi), norm=pattern(rmsnorm, layernorm(bias=False)), ffn=mlp(relu2))",
        "llama(position=rope(scaling=linear(2)))",
        "llama(position=rope(scaling=yarn(4, original_max_position_embeddings=128, beta_fast=16)))",
        "llama(d_model=8, n_heads=2, position=rope(scaling=longrope(2, original_max_position_embeddings=9, "
        "short_factor=[1, 2], long_factor=[1.5, 3])))",
        "transformer(n_encoder_layers=3, init_std=1e-05)",
        "llama(n_layers=61, ffn=pattern(swiglu, swiglu, swiglu, 58 * moe(64, top_k=6)))",
    ],
)
def test_lines_of_the_documentation(line: str) -> None:
    spec = parse(line)
    assert_round_trips(spec)
    assert_round_trips(spec.resolve())


def test_a_number_repeats_a_patterns_component() -> None:
    long = parse("llama(attention=pattern(2 * window(8), 5 * softmax, window(8)))")
    items = ["window(8)"] * 2 + ["softmax"] * 5 + ["window(8)"]
    assert long == parse(f"llama(attention=pattern({', '.join(items)}))")
    assert str(long) == "llama(attention=pattern(window(8), window(8), 5 * softmax, window(8)))"
    published = parse("deepseek_v3(size='671b')")
    assert parse(str(published.replace(size=None, ffn=published.ffn))).ffn == published.ffn


def test_a_line_says_only_what_differs_from_its_preset() -> None:
    assert str(parse("llama(bias=False, ffn=swiglu(), dropout=0)")) == "llama"
    assert (
        str(parse("llama(size='7B', n_layers=32, d_model=64, n_heads=4)")) == "llama(size='7b', d_model=64, n_heads=4)"
    )
    assert str(parse("mistral(attention=window(window=4096))")) == "mistral(attention=window(4096))"
    assert str(parse("llama(position=rope(scaling=linear(2)))")) == "llama(position=rope(scaling=linear(factor=2.0)))"


def test_a_component_in_a_line_is_complete() -> None:
    """What a component leaves out is its kind's default, not what the preset had there."""
    assert parse("qwen3").attention.qk_norm is True
    assert parse("qwen3(attention=softmax(kv_heads=2))").attention.qk_norm is False


def test_aliases_stand_for_a_kind_with_fields_set() -> None:
    assert parse("llama(attention=mqa)") == parse("llama(attention=softmax(kv_heads=1))")
    assert parse("llama(attention=gqa(kv_heads=2))") == parse("llama(attention=softmax(kv_heads=2))")
    assert parse("llama(attention=mha)") == parse("llama(attention=standard)") == parse("llama")


def test_words_numbers_and_spacing() -> None:
    assert parse("gpt2(bias=true, tie_embeddings=FALSE)") == parse("gpt2(bias=True, tie_embeddings=False)")
    assert parse("  gpt2 ( \n dropout = 1e-1 ,\n d_model=1_024 ) ") == parse("gpt2(dropout=0.1, d_model=1024)")
    assert parse("gpt2(order='pre')") == parse("gpt2()") == parse("gpt2") == parse("'gpt2'")


def test_a_spec_a_mapping_and_a_file_are_read_too(tmp_path: Path) -> None:
    spec = parse("llama(attention=pattern(window(8), gqa(kv_heads=2)), n_layers=4)")
    assert parse(spec) is spec
    mapping = {"preset": "llama", "n_layers": 4}
    mapping["attention"] = {
        "kind": "pattern",
        "items": [{"kind": "window", "window": 8}, {"kind": "gqa", "kv_heads": 2}],
    }
    assert parse(mapping) == spec
    path = tmp_path / "model.yaml"
    path.write_text(to_yaml(spec), encoding="utf-8")
    assert parse(path) == parse(str(path)) == spec
    assert from_yaml("preset: gpt2\nposition: rope\nnorm: rmsnorm\n") == parse("gpt2(position=rope, norm=rmsnorm)")


def test_components_made_in_python_are_read_back() -> None:
    rope, softmax = FAMILIES["position"].get("rope").spec, FAMILIES["attention"].get("softmax").spec
    spec = parse("llama").replace(
        position=Pattern(items=(rope(base=5e5), rope(scaling={"kind": "ntk", "factor": 2}))),
        attention=Pattern(items=(softmax(kv_heads=2), softmax())),
    )
    assert_round_trips(spec)


# ---- what cannot be read ----


def problems_of(source: Any, read: Callable[[Any], Any] = parse) -> list[str]:
    """The problems of something unreadable, one text each."""
    with pytest.raises(SpecError) as caught:
        read(source)
    assert caught.value.problems
    return [str(p) for p in caught.value.problems]


@pytest.mark.parametrize(
    "line",
    [
        "__import__('os').system('touch {marker}')",
        "llama(d_model=__import__('os').system('touch {marker}'))",
        "llama(d_model=(lambda: open('{marker}', 'w'))())",
        "llama(d_model=[open('{marker}', 'w') for _ in (1,)])",
        "llama(d_model={{open('{marker}', 'w') for _ in (1,)}})",
        "llama(d_model=f'{{open(chr(47))}}')",
        "llama(d_model=(x := 3))",
        "llama(d_model=1 if True else 2)",
        "llama(d_model=2 ** 9)",
        "llama(d_model=not 1)",
        "llama(d_model=[1][0])",
        "llama(d_model=(1).real)",
        "llama(d_model=b'64')",
        "llama(d_model=...)",
        "llama(d_model=1j)",
        "llama(d_model={{'a': 1}})",
        "llama(*[1])",
        "llama(**{{'d_model': 64}})",
        "llama(d_model=await x)",
        "llama(d_model=~1)",
        "llama.cls(d_model=1)",
        "llama()()",
        "(llama)(d_model=1) + 1",
        "import os",
        "llama(d_model=1); llama",
        "llama(d_model=1) # ok\nllama",
    ],
)
def test_nothing_but_names_calls_and_literals_is_read(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "evaluated"
    for name in ("eval", "exec"):
        monkeypatch.setattr(builtins, name, lambda *a, **k: pytest.fail("evaluated"))
    message = " ".join(problems_of(line.format(marker=marker)))
    assert "is not read" in message or "not a call expression" in message, message
    assert not marker.exists()


def test_a_call_to_an_unknown_name_is_a_value_and_never_made() -> None:
    assert problems_of("llama(d_model=exit(3))") == ["d_model: input should be a valid integer, not exit(…)"]
    assert problems_of("llama(d_model=exit())")[0].endswith("not exit()")
    assert problems_of("llama(d_model=exit)")[0].endswith("not 'exit'")


def test_length_and_nesting_are_bounded() -> None:
    long = "llama(" + " " * (MAX_CHARACTERS - 7) + ")"
    assert len(long) == MAX_CHARACTERS
    assert parse(long) == parse("llama")
    assert "at most 10,000" in problems_of(long + " x")[0]
    deep = "llama(d_model=" + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + ")"
    assert "valid integer" in problems_of(deep)[0]
    assert "nested" in problems_of(deep.replace("[]", "[[]]"))[0]
    assert "nested" in problems_of("(" * 4000 + ")" * 4000)[0]
    for chain in (
        "-" * 9000 + "1",
        "not " * 2000 + "1",
        "1" + "+1" * 4000,
        "a" + ".a" * 4000,
        "a" + "[0]" * 3000,
        "x:=" * 999,
    ):
        assert problems_of(f"llama(d_model={chain})")


def test_yaml_is_bounded_too() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for one, two in zip("abcdefgh", "bcdefghi"):
        bomb += f"{two}: &{two} [{', '.join([f'*{one}'] * 9)}]\n"
    assert "aliases" in problems_of(f"preset: llama\n{bomb}d_model: *i\n", from_yaml)[0]
    assert "aliases" in problems_of("preset: llama\nattention: &a {kind: pattern, items: [*a]}", from_yaml)[0]
    assert "nested" in problems_of("preset: llama\nattention: " + "[" * 40 + "]" * 40, from_yaml)[0]
    loop: dict[str, Any] = {"preset": "llama"}
    loop["attention"] = {"kind": "pattern", "items": [loop]}
    assert "nested" in problems_of(loop)[0]


NOT_YAML = ["", "[1]", "3", "a: b: c", "%", "\x00", "? [a]\n: b", "!!python/object/apply:os.getcwd []", "d_model: 64"]
NOT_YAML += ["preset: [a]", "preset: 3", "preset: llama\n1: 2", "preset: llama\nattention: {1: 2}"]
NOT_YAML += ["preset: llama\nd_model: 2020-01-01", "preset: llama\nd_model: 1\nd_model: x"]


@pytest.mark.parametrize("text", NOT_YAML)
def test_yaml_that_is_no_architecture(text: str) -> None:
    assert problems_of(text, from_yaml)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    assert "no such file" in problems_of(tmp_path / "none.yaml")[0]
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    assert "cannot read" in problems_of(folder)[0]
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"preset: \xe9")
    assert "cannot read" in problems_of(latin)[0]
    assert "cannot read" in problems_of("nul\0.yaml")[0]


@pytest.mark.parametrize("source", [3, None, 1.5, ["llama"], b"llama", object()])
def test_a_source_of_another_type(source: Any) -> None:
    assert "a line of text" in problems_of(source)[0]


# ---- all problems at once, each with field, value, what is allowed, nearest spelling ----


def test_all_problems_of_a_line_come_at_once() -> None:
    line = (
        "lama(d_modl=3, n_layers=-1, attention=gqa(kv_head=2), ffn=swiglux, norm=layernorm(eps=0), "
        "position=rope(scaling=yarn(2, betafast=1)), order=prre, dropout=lambda: 1, bias=3, n_heads=2, n_heads=2)"
    )
    problems = problems_of(line)
    wanted = {
        "preset": ["'lama'", "did you mean 'llama'?", "gpt2, gpt_neox"],
        "d_modl": ["did you mean 'd_model'?", "max_seq_len"],
        "n_layers": ["-1", "greater than 0"],
        "attention.kv_heads": ["missing", "gqa needs it"],
        "attention.kv_head": ["did you mean 'kv_heads'?", "head_dim"],
        "ffn": ["'swiglux'", "did you mean 'swiglu'?", "geglu"],
        "norm.eps": ["0", "greater than 0"],
        "position.scaling.betafast": ["did you mean 'beta_fast'?", "beta_slow"],
        "position.scaling.original_max_position_embeddings": ["missing"],
        "order": ["'prre'", "did you mean 'pre'?", "parallel, parallel_two_norms, post, pre, reordered, sandwich"],
        "dropout": ["lambda", "not read"],
        "bias": ["3"],
        "n_heads": ["given twice"],
    }
    for field, pieces in wanted.items():
        text = next(p for p in problems if p.startswith(f"{field}: "))
        assert all(piece in text for piece in pieces), text
    assert len(problems) == len(wanted)


def test_fields_that_do_not_fit_together_come_with_the_others() -> None:
    problems = problems_of("llama(d_model=100, n_heads=7, n_layers=-1)")
    assert [p.partition(":")[0] for p in problems] == ["n_layers", "attention.head_dim"]
    problems = problems_of("llama(d_model=24, n_heads=6, attention=pattern(gqa(kv_heads=4), gqa(kv_heads=5)))")
    assert [p.partition(":")[0] for p in problems] == ["attention.items.0.kv_heads", "attention.items.1.kv_heads"]
    assert "allowed: [1, 2, 3, 6]" in problems[0]


def test_every_layer_of_a_pattern_is_looked_at() -> None:
    """Attention and position take turns by themselves: here only layer 11 joins heads of 7 with rope."""
    line = (
        "llama(d_model=64, n_heads=4, n_layers={}, attention=pattern(softmax, softmax, softmax, softmax(head_dim=7)), "
    )
    line += "position=pattern(none, none, rope))"
    assert parse(line.format(8)).n_layers == 8
    assert "head_dim=7" in problems_of(line.format(12))[0]
    assert "head_dim=7" in problems_of(line.format(12).replace("n_layers=12, ", ""))[0]


def test_every_unreadable_value_is_named_with_its_field() -> None:
    problems = problems_of("llama(3, d_model=a.b, attention=gqa(kv_heads=1 + 1, head_dim=[{}]), **x)")
    starts = ["write fields", "d_model", "attention.kv_heads", "attention.head_dim.0", "llama(**…)"]
    assert all(any(p.startswith(start) for p in problems) for start in starts)
    assert len(problems) == len(starts)


@pytest.mark.parametrize(
    ("line", "field", "piece"),
    [
        ("llama(size='9b')", "size", "allowed: 13b, 33b, 65b, 70b, 7b, 8b"),
        ("llama(size=7b)", "", "in quotes"),
        ("llama(attention=gqa)", "attention.kv_heads", "gqa(kv_heads=…)"),
        ("llama(attention=window)", "attention.window", "missing"),
        ("llama(attention=window(1, window=2))", "attention.window", "given twice"),
        ("llama(attention=window(1, 2))", "attention", "allowed: window"),
        ("llama(attention=softmax(2))", "attention", "allowed: none"),
        ("llama(attention=pattern())", "attention", "at least one"),
        ("llama(attention=pattern(items=3))", "attention.items", "not 3"),
        ("llama(attention=pattern(items=window))", "attention.items", "'window'"),
        ("llama(attention=pattern(softmax, base=2))", "attention.base", "components only"),
        ("llama(attention=pattern(pattern(softmax)))", "attention.items.0", "flat"),
        ("llama(attention=pattern(softmax, softmx))", "attention.items.1", "did you mean 'softmax'?"),
        ("llama(attention=rope)", "attention", "unknown attention 'rope'"),
        ("llama(attention=softmax(kind=window))", "attention.kind", "before the bracket"),
        ("llama(attention=[softmax])", "attention", "is no attention"),
        ("llama(position=pattern(learned, rope))", "position", "once"),
        ("llama(attention=pattern(0 * softmax, mqa))", "attention", "0 * … given; a pattern has from 1 to 4,096"),
        ("llama(attention=pattern(4000 * mqa, 97 * softmax))", "attention", "97 * … given"),
        ("llama(attention=pattern(softmax * 3))", "attention", "is not read"),
        ("llama(attention=3 * softmax)", "attention", "is not read"),
        ("llama(position=rope(scaling=linaer(2)))", "position.scaling", "did you mean 'linear'?"),
        ("llama(position=rope(scaling=3))", "position.scaling", "allowed: dynamic, linear"),
        ("llama(position=rope(scaling=linear(2, 3)))", "position.scaling", "one value"),
        ("llama(position=rope(scaling=linear(2, factor=3)))", "position.scaling", "one value"),
        ("llama(position=rope(scaling=linear))", "position.scaling.factor", "missing"),
        ("llama(position=rope(base=1e999))", "position.base", "finite"),
        ("llama(d_model=12, n_heads=4)", "position", "turns pairs"),
        ("llama(d_model=16, n_heads=8, position=rope(scaling=ntk(2)))", "position", "at least 4"),
        (
            "llama(d_model=8, n_heads=1, position=rope(scaling=longrope(2, original_max_position_embeddings=9, "
            "short_factor=[1, 2], long_factor=[1, 2, 3, 4])))",
            "position",
            "each of the 4 pairs that turn, but short_factor has 2",
        ),
        ("transformer(order=parallel)", "order", "allowed: pre, post, sandwich"),
        ("llama(preset=gpt2)", "preset", "remove preset"),
        ("llama(n_layers=0x" + "f" * 9000 + ")", "n_layers", "thousands of digits"),
        ("llama(order=0x" + "f" * 9000 + ")", "order", "thousands of digits"),
        ("llama(n_layers=1000000000, d_model=64, n_heads=2)", "n_layers", "100000"),
        ("llama(d_model=1000000000, n_heads=1000000000, attention=gqa(kv_heads=3))", "n_heads", "1000000"),
    ],
)
def test_what_is_wrong_is_said(line: str, field: str, piece: str) -> None:
    text = next(p for p in problems_of(line) if p.startswith(f"{field}: " if field else ""))
    assert piece in text


def test_the_message_quotes_the_line_in_one_piece() -> None:
    with pytest.raises(SpecError, match=r"^in 'llama\(d_modl=3\)': d_modl: unknown field"):
        parse("llama(d_modl=3)")
    with pytest.raises(SpecError) as caught:
        parse(f"llama(order={'x' * 5000}, {'y' * 3000}={'z' * 900!r})")
    assert max(map(len, str(caught.value).splitlines())) < 4000


# ---- no text gives a traceback ----

PIECES = [
    *string.printable,
    *[
        "llama",
        "gpt2",
        "attention=",
        "softmax",
        "window(",
        "pattern(",
        "rope(scaling=",
        "yarn(",
        "d_model=",
        "n_heads=",
        "size=",
    ],
    *[
        "kv_heads=",
        "items=",
        "kind=",
        "0x",
        "1e999",
        "-",
        "None",
        "true",
        "'7b'",
        "ffn=",
        "mlp(",
        "**",
        "*",
        ":=",
        "lambda:",
    ],
    *[
        "[",
        "]",
        "(",
        ")",
        "{",
        "}",
        ",",
        "=",
        "\n",
        "\\",
        "'",
        '"',
        "é",
        "ﬁ",
        "\ud800",
        "\0",
        "🙂",
        "9" * 5000,
        "f'{x}'",
        "*'",
    ],
]
SEEDS = [*PUBLISHED, "llama(d_model=384, attention=gqa(kv_heads=2), position=rope(scaling=yarn(2, beta_fast=3)))"]
SEEDS += ["gpt2(attention=pattern(window(8), softmax(qk_norm=true)), norm=rmsnorm(eps=1e-6), d_model=64, n_heads=4)"]


HARMLESS = ["", " ", "\n", "0", "1", "8", ", bias=true"]


def mutated(rng: random.Random) -> str:
    text = rng.choice(SEEDS)
    for _ in range(rng.randint(1, 4)):
        at, width = rng.randrange(len(text) + 1), rng.choice([0, 0, 0, 1, 1, 3])
        text = text[:at] + rng.choice(PIECES if rng.random() < 0.5 else HARMLESS) + text[at + width :]
    return text


def test_true_is_no_number() -> None:
    """Pydantic would take it for 1."""
    for line in ("gpt2(n_layers=true)", "gpt2(attention=window(true))", "gpt2(attention=softmax(softcap=true))"):
        with pytest.raises(SpecError, match="a number is wanted, not True"):
            parse(line)
    assert parse("gpt2(attention=softmax(qk_norm=true))").attention.qk_norm is True


def read_or_refused(source: Any, read: Callable[[Any], ModelSpec] = parse) -> ModelSpec | None:
    """The spec, or None where it is refused in words; anything else that is raised fails the test."""
    try:
        return read(source)
    except SpecError as error:
        return None if error.problems and str(error) else pytest.fail("refused without a word")


def test_mutated_lines_are_read_or_refused() -> None:
    rng = random.Random(7)
    read = [spec for _ in range(4000) if (spec := read_or_refused(mutated(rng))) is not None]
    assert 50 < len(read) < 3900
    for spec in read:
        assert parse(str(spec)) == spec


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)))
def test_any_text_is_read_or_refused(text: str) -> None:
    read_or_refused(text)
    read_or_refused(text, from_yaml)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["softmax", "pattern"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "items", "*", "kv_heads"]), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from([*ModelSpec.model_fields, "x"]), VALUES), st.sampled_from(list_presets()))
def test_any_mapping_is_read_or_refused(mapping: dict[str, Any], preset: str) -> None:
    read_or_refused(mapping)
    read_or_refused({**mapping, "preset": preset})
