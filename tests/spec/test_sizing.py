"""The sizing rule: a number of parameters becomes depth and width, near the number, in the shape asked for."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headwise.errors import SpecError
from headwise.registry import Pattern
from headwise.spec import count, list_presets, parse
from headwise.spec.model import parse_size
from headwise.spec.sizing import fill_widths

SIZES = ["300k", "500k", "1m", "2m", "5m", "10m", "30m", "124m", "350m", "1b"]
# The rule counts 12·C² weights a layer (28·C² for encoder and decoder): ungated feed-forward, as many key heads as
# query heads, no embeddings. Presets that save there come out smaller, those that add larger (latent attention the
# most, at small widths); within these ratios.
RATIO = (0.75, 1.4)


def weights(line: str, size: str) -> int:
    """Parameters of the layers, which is what the size is about: a vocabulary is not the architecture's. The experts of
    a mixture count as one feed-forward."""
    spec = parse(line).resolve(size)
    if any(each.kind == "moe" for each in spec.ffn.each()):
        spec = spec.replace(ffn="swiglu")
    parts = count(spec).params_by_part
    return parts["attention"] + parts["ffn"] + parts["norm"]


@pytest.mark.parametrize("preset", list_presets())
@pytest.mark.parametrize("size", SIZES)
def test_presets_come_near_every_size(preset: str, size: str) -> None:
    assert RATIO[0] < weights(preset, size) / parse_size(size) < RATIO[1]


def test_the_documented_sizes() -> None:
    """What the default sizes are is written in the documentation: 1m is 5 layers of 128, 10m is 8 of 320."""
    for preset in set(list_presets()) - {"transformer"}:
        small, large = parse(preset).resolve("1m"), parse(preset).resolve("10m")
        assert (small.n_layers, small.d_model, small.n_heads) == (5, 128, 4)
        assert (large.n_layers, large.d_model, large.n_heads) == (8, 320, 10)
        assert parse(preset).resolve() == small


def test_an_encoder_decoder_counts_both_sides() -> None:
    spec = parse("transformer").resolve("10m")
    assert spec.n_encoder_layers == spec.n_layers
    assert 0.9 < weights("transformer", "10m") / weights("gpt2", "10m") < 1.2


@settings(max_examples=300)
@given(st.integers(300_000, 10**9), st.sampled_from([1, 2, 3, 4, 6, 8]), st.sampled_from([12, 28]))
def test_open_widths_are_near_the_size_and_in_shape(n_params: int, kv_heads: int, per_layer: int) -> None:
    widths = fill_widths(None, None, None, kv_heads, n_params, per_layer=per_layer)
    d_model, n_layers, n_heads = widths["d_model"], widths["n_layers"], widths["n_heads"]
    assert 0.75 < per_layer * n_layers * d_model**2 / n_params < 1.33
    assert 1 / 4 < d_model / (32 * n_layers) < 4
    assert n_heads % kv_heads == 0
    assert d_model % (2 * n_heads) == 0
    if 64 % (2 * kv_heads) == 0:
        assert d_model % (128 if d_model >= 512 else 64) == 0
    if kv_heads <= 2:
        assert d_model // n_heads == (64 if d_model >= 512 else 32)


@settings(max_examples=200)
@given(
    st.none() | st.integers(1, 4000),
    st.none() | st.integers(1, 60),
    st.none() | st.integers(1, 40),
    st.integers(1, 8),
    st.integers(300_000, 10**9),
)
def test_given_widths_stay(d: int | None, layers: int | None, heads: int | None, kv_heads: int, n_params: int) -> None:
    try:
        widths = fill_widths(d, layers, heads, kv_heads, n_params)
    except SpecError:
        # Only a width that is given can fit no heads.
        assert d is not None
        assert heads is None
        assert not any(d % n == 0 and d // n % 2 == 0 for n in range(kv_heads, d + 1, kv_heads))
        return
    assert all(v >= 1 for v in widths.values())
    for name, value in (("d_model", d), ("n_layers", layers), ("n_heads", heads)):
        assert value is None or widths[name] == value
    if d is None:
        assert widths["d_model"] % (2 * widths["n_heads"]) == 0
    if d is None and layers is not None and heads is None:
        assume(12 * layers * (8 * max(8, kv_heads)) ** 2 < n_params)  # else no width is narrow enough
        assert 0.4 < 12 * layers * widths["d_model"] ** 2 / n_params < 2.5


@settings(max_examples=100)
@given(
    st.sampled_from(list_presets()),
    st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3),
    st.none() | st.sampled_from([6, 9, 12, 24]),
    st.integers(300_000, 10**8),
)
def test_any_mix_of_key_heads_can_be_sized(
    preset: str, kv_heads: list[int], n_heads: int | None, n_params: int
) -> None:
    """In a pattern the number of heads suits all its items: once 2 and 3 key heads asked for 3 heads."""
    attention = {"kind": "pattern", "items": [{"kind": "gqa", "kv_heads": k} for k in kv_heads]}
    assume(n_heads is None or all(n_heads % k == 0 for k in kv_heads))
    spec = parse({"preset": preset, "attention": attention, "n_heads": n_heads})
    resolved = spec.resolve(str(n_params))
    assert isinstance(resolved.attention, Pattern)
    assert n_heads is None or resolved.n_heads == n_heads
    assert resolved.n_heads is not None
    assert all(resolved.n_heads % k == 0 for k in kv_heads)
    assert resolved.resolve() == resolved


def test_resolve_fills_and_keeps() -> None:
    spec = parse("llama(n_layers=3, vocab_size=7)").resolve("2m", vocab_size=99, max_seq_len=50)
    assert (spec.n_layers, spec.vocab_size, spec.max_seq_len) == (3, 7, 50)
    assert spec.d_model == 256
    assert parse("llama").resolve(vocab_size=99).vocab_size == 99
    assert parse("llama(size='7b')").resolve("1m") == parse("llama(size='7b')")
    assert not parse("llama").is_resolved
    assert not parse("transformer(d_model=64, n_layers=2, n_heads=2, vocab_size=9, max_seq_len=9)").is_resolved


def test_more_parameters_are_never_fewer() -> None:
    found = [weights("gpt2", str(round(1e5 * 1.3**n))) for n in range(35)]
    assert all(a <= b for a, b in itertools.pairwise(found))
    assert math.log(found[-1] / found[0]) == pytest.approx(34 * math.log(1.3), abs=0.6)


READ = {"1m": 10**6, "500k": 500_000, "1.5b": 1_500_000_000, " 10 M ": 10**7, "12345": 12345, ".5m": 500_000}
READ |= {"0.29m": 290_000, "10000b": 10**13}


@pytest.mark.parametrize(("text", "n"), READ.items())
def test_sizes_are_read(text: str, n: int) -> None:
    assert parse_size(text) == n


@pytest.mark.parametrize(
    "text", ["", "m", "1x", "-1m", "1e6", "0", "0k", "one", "1 2", "nan", "inf", "10001b", "9" * 400]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(SpecError, match=r"^size: "):
        parse_size(text)
