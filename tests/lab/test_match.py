"""Matching: a variant comes within 1 % of the baseline by its feed-forward's width alone, or says why not."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.ffn import FFNSpec
from headwise.lab.match import TOLERANCE, match
from headwise.model import build
from headwise.registry import Pattern
from headwise.spec import ModelSpec, count, parse

BASE = parse("gpt2").resolve(size="1m", max_seq_len=64)


def resolved(line: str) -> ModelSpec:
    return parse(line).resolve(size="1m", max_seq_len=64)


def quantity(spec: ModelSpec, how: str, context: int = 64) -> float:
    return count(spec, context).params if how == "params" else count(spec, context).flops_per_token


def without_widths(spec: ModelSpec) -> dict[str, object]:
    """Everything of a spec but the widths of its feed-forward."""
    items = spec.ffn.items if isinstance(spec.ffn, Pattern) else (spec.ffn,)
    kinds = [item.model_copy(update={"d_ff": None}) if isinstance(item, FFNSpec) else item for item in items]
    return {**dict(spec), "ffn": kinds}


@settings(max_examples=60)
@given(
    preset=st.sampled_from(["gpt2", "llama", "gemma", "falcon", "bloom", "qwen3"]),
    n_layers=st.integers(2, 8),
    ffn=st.sampled_from(["mlp", "swiglu", "geglu(d_ff=96)", "pattern(swiglu, mlp)", "pattern(mlp(d_ff=64), mlp)"]),
    how=st.sampled_from(["params", "flops"]),
)
def test_whatever_says_it_is_matched_is_within_one_percent(preset: str, n_layers: int, ffn: str, how: str) -> None:
    spec = resolved(f"{preset}(n_layers={n_layers}, d_model=128, ffn={ffn})")
    found = match(spec, BASE, how, 64)
    off = quantity(found.spec, how) / quantity(BASE, how) - 1
    assert found.off == pytest.approx(off)
    assert found.reached == (abs(off) <= TOLERANCE)
    assert without_widths(found.spec) == without_widths(spec)
    assert (found.note == "") == (found.spec == spec and found.reached)


def test_the_built_modules_have_the_counted_sizes() -> None:
    found = match(resolved("llama(attention=gqa(kv_heads=2))"), BASE, "params", 64)
    sizes = [sum(p.numel() for p in build(spec, device="meta").parameters()) for spec in (found.spec, BASE)]
    assert found.note
    assert abs(sizes[0] / sizes[1] - 1) <= TOLERANCE


def test_a_variant_that_fits_already_is_left_alone() -> None:
    line = resolved("gpt2(position=sinusoidal, d_model=128)")
    near = match(line, resolved("gpt2(position=alibi, d_model=128)"), "params", 64)
    assert (near.spec, near.note, near.reached) == (line, "", True)


def test_multiples_of_eight_come_first_and_finer_ones_where_needed() -> None:
    found = match(resolved("llama"), BASE, "params", 64)
    assert found.spec.ffn.width(found.spec.dims) % 8 == 0
    base = resolved("gpt2(d_model=32, n_layers=4, n_heads=2)")
    fine = match(resolved("gpt2(d_model=32, n_layers=4, n_heads=2, bias=False, position=rope)"), base, "params", 64)
    assert fine.reached
    assert fine.spec.ffn.width(fine.spec.dims) % 8 != 0


def test_widths_of_a_pattern_keep_their_proportions() -> None:
    found = match(resolved("gpt2(n_layers=4, ffn=pattern(mlp(d_ff=256), mlp(d_ff=1024)))"), BASE, "params", 64)
    narrow, wide = (item.width(found.spec.dims) for item in found.spec.ffn.items)
    assert found.reached
    assert wide / narrow == pytest.approx(4, rel=0.05)
    assert re.match(r"ffn\.d_ff 256/1024 → \d+/\d+ for equal parameters", found.note)


def test_what_cannot_be_matched_stays_as_it_was_and_says_how_far_off() -> None:
    spec = resolved("gpt2(d_model=512)")
    found = match(spec, BASE, "params", 64)
    assert found.spec == spec
    assert not found.reached
    assert found.off == pytest.approx(count(spec).params / count(BASE).params - 1)
    assert f"{100 * found.off:.2f} %" in found.note
    assert "even with ffn.d_ff=1" in found.note


@pytest.mark.parametrize("how", ["tokens", "time", "none"])
def test_other_matches_touch_no_width(how: str) -> None:
    spec = resolved("llama(attention=mqa)")
    found = match(spec, BASE, how, 64)
    assert (found.spec, found.note, found.off, found.reached) == (spec, "", None, True)


def test_flops_are_counted_at_the_context() -> None:
    """A window saves FLOPs at long contexts only: the longer, the wider the feed-forward that it leaves room for."""
    base = parse("gpt2(n_layers=4)").resolve(size="1m", max_seq_len=2048)
    window = parse("gpt2(n_layers=4, attention=window(32))").resolve(size="1m", max_seq_len=2048)
    widths = [(m := match(window, base, "flops", context).spec).ffn.width(m.dims) for context in (32, 512, 2048)]
    assert widths[0] < widths[1] < widths[2]
