"""Closed-form counts against the built module: parameters by part, torch's FLOP counter, bytes really cached.

Torch's counter sees the readable form of attention, which makes every score; ours counts the scores that the mask lets
through. So  torch = ours + 2·H·(D + E)·(T − keys seen) a token and layer,  E and D the widths of keys and values, which
for causal attention is the other half of the square. Everything else is equal to the last FLOP.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_specs import LOOSE, components, specs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from headwise import kernels
from headwise.attention import AttentionSpec
from headwise.errors import SpecError
from headwise.ffn.moe import MoESpec
from headwise.kernels.attention.naive import visible
from headwise.model import build
from headwise.registry import FAMILIES
from headwise.spec import ModelSpec, count, list_presets, parse
from headwise.spec.presets import PRESETS

PARTS = {
    "embedding": "embedding",
    "positions": "position",
    "attention": "attention",
    "cross_attention": "attention",
    "ffn": "ffn",
    "head": "head",
}


def part_of(parameter: str) -> str:
    """Which part a parameter belongs to, by the outermost name that says so."""
    names = parameter.split(".")
    return next((PARTS[n] for n in names if n in PARTS), "norm")


def built_parts(model: nn.Module) -> dict[str, int]:
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts[part_of(name)] += parameter.numel()
    return {part: n for part, n in parts.items() if n}


def assert_counts_parameters(spec: ModelSpec) -> None:
    counts = count(spec)
    model = build(spec, device="meta")
    assert {part: n for part, n in counts.params_by_part.items() if n} == built_parts(model)
    assert counts.params == sum(p.numel() for p in model.parameters())


# ---- parameters ----


@settings(LOOSE, max_examples=150)
@given(specs(small=True))
def test_parameters_of_any_spec(spec: ModelSpec) -> None:
    assert_counts_parameters(spec)


@pytest.mark.parametrize("line", [*list_presets(), *(f"{p}(architecture=encoder)" for p in list_presets())])
def test_parameters_of_presets_at_the_default_size(line: str) -> None:
    assert_counts_parameters(parse(line))


@pytest.mark.parametrize(("family", "kind"), [(f, kind) for f, r in FAMILIES.items() for kind in r.list()])
@settings(LOOSE, max_examples=15)
@given(data=st.data())
def test_parameters_of_every_kind(family: str, kind: str, data: Any) -> None:
    spec = parse("gpt2(d_model=24, n_heads=4, n_layers=3, vocab_size=7, max_seq_len=9)")
    try:
        spec = spec.replace(**{family: data.draw(components(family, small=True, kinds=[kind]))})
    except SpecError:
        return
    for bias in (False, True):
        assert_counts_parameters(spec.replace(bias=bias))


ENCODER_DECODERS = [
    "transformer",
    "transformer(position=learned)",
    "transformer(d_model=32, n_layers=2, n_heads=2, vocab_size=65, max_seq_len=64)",
    "transformer(n_layers=1, n_encoder_layers=4, order=sandwich, norm=pattern(layernorm, rmsnorm))",
    "transformer(n_layers=4, n_encoder_layers=1, order=pre, norm=pattern(rmsnorm, layernorm), ffn=pattern(mlp, glu))",
    "transformer(attention=pattern(gqa(kv_heads=2), window(3), mqa), n_layers=4, position=rope, bias=false)",
]


@pytest.mark.parametrize("line", ENCODER_DECODERS)
def test_parameters_of_encoder_decoders(line: str) -> None:
    """Both stacks have positions, norms and a final norm of their own.

    Once an encoder depth left open was counted as no encoder, a second position table not at all, and the encoder's
    final norm as the decoder's, which a pattern of norms need not share.
    """
    assert_counts_parameters(parse(line))


# ---- FLOPs ----


def measured_flops(spec: ModelSpec, T: int, *, train: bool) -> int:
    model = build(spec).eval()
    ids = torch.arange(T)[None] % model.spec.dims.vocab_size
    extra = {"encoder_ids": ids} if spec.architecture == "encoder_decoder" else {}
    with kernels.naive(), FlopCounterMode(display=False) as counter:
        logits = model(ids, **extra)
        if train:
            logits.sum().backward()
    return counter.get_total_flops()


def masked_flops(spec: ModelSpec, T: int) -> float:
    """FLOPs of what the readable forms compute and throw away, which torch counts and we do not: the scores that no
    mask lets through, and the experts that a token did not choose.

    A count is a + b·(keys seen), with b the cost of one score; what it is without the causal mask tells b. Recurrences
    form no scores.
    """
    total = 0.0
    stacks = [(spec.n_layers or 0, spec.causal)]
    if spec.architecture == "encoder_decoder":
        stacks.append((spec.n_encoder_layers or 0, False))
    for n_layers, causal in stacks:
        for layer in range(n_layers):
            attention = spec.attention.at(layer)
            assert isinstance(attention, AttentionSpec)
            seen = [attention.keys_seen(T, causal=c) for c in (False, True)]
            flops = [attention.flops_per_token(spec.dims, T, causal=c) for c in (False, True)]
            if seen[0] != seen[1]:
                total += T * (flops[0] - flops[1]) / (seen[0] - seen[1]) * (T - seen[causal])
            ffn = spec.ffn.at(layer)
            if isinstance(ffn, MoESpec):
                everyone = ffn.model_copy(update={"top_k": ffn.n_experts})
                chosen = ffn.flops_per_token(spec.dims, T, causal=causal)
                total += T * (everyone.flops_per_token(spec.dims, T, causal=causal) - chosen)
    return total


def assert_counts_flops(spec: ModelSpec, T: int) -> None:
    spec = spec if spec.is_resolved else spec.resolve()
    counts = count(spec, context=T)
    assert counts.context == T
    assert counts.flops_per_token * T + masked_flops(spec, T) == pytest.approx(measured_flops(spec, T, train=False))
    assert counts.train_flops_per_token == 3 * counts.flops_per_token


@settings(LOOSE, max_examples=40)
@given(specs(small=True))
def test_flops_of_any_spec(spec: ModelSpec) -> None:
    assert_counts_flops(spec, min(spec.dims.max_seq_len, 11))


@pytest.mark.parametrize("preset", list_presets())
@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
def test_flops_of_presets(preset: str, architecture: str) -> None:
    spec = parse(f"{preset}(d_model=64, n_heads=4, n_layers=2, vocab_size=29, max_seq_len=16)")
    if preset != "transformer":
        spec = spec.replace(architecture=architecture)
    assert_counts_flops(spec, 13)


@pytest.mark.parametrize("line", ["gpt2", "llama", "gptj", "transformer", "llama(attention=window(5, kv_heads=2))"])
def test_training_flops_are_three_times_the_forward_pass(line: str) -> None:
    """Each matrix product has two of its size in the backward pass."""
    spec = parse(line).replace(d_model=64, n_heads=4, n_layers=2, vocab_size=29, max_seq_len=16).resolve()
    assert measured_flops(spec, 13, train=True) == 3 * measured_flops(spec, 13, train=False)
    assert count(spec).train_flops_per_token == 3 * count(spec).flops_per_token


@pytest.mark.parametrize("kind", ["softmax", "window(1)", "window(5)", "window(12)", "window(13)", "window(500)"])
@pytest.mark.parametrize("causal", [False, True])
def test_keys_seen_are_those_the_mask_lets_through(kind: str, causal: bool) -> None:
    """The causal triangle, T(T+1)/2 pairs, counts as half the square T²/2, as is usual: half the diagonal less.

    A causal window is cut likewise, so that one as long as the context costs what softmax does.
    """
    T = 13
    attention = parse(f"llama(attention={kind})").attention
    assert isinstance(attention, AttentionSpec)
    x = torch.zeros(1, 1, T, 1)
    window = getattr(attention, "window", T)
    pairs = visible(x, x, causal, window, None, None).expand(T, T).sum().item()
    assert T * attention.keys_seen(T, causal=causal) == pytest.approx(pairs - (min(window, T) / 2 if causal else 0))


def test_flops_grow_with_the_context_as_the_mask_says() -> None:
    short, long, longer = (count("llama", context=T).flops_per_token for T in (256, 1024, 4096))
    assert longer - long == 4 * (long - short)
    windowed = [count("llama(attention=window(128))", context=T).flops_per_token for T in (256, 1024, 10**6)]
    assert windowed[2] < 1.2 * windowed[0]


# ---- the cache ----


CACHED = ["llama", "gpt2", "qwen3", "gemma", "llama(attention=mqa, n_layers=3)", "mistral", "transformer"]
CACHED += ["llama(attention=pattern(window(5), gqa(kv_heads=2, head_dim=8)), n_layers=3)"]
CACHED += [
    "llama(attention=pattern(window(4, dilation=3), window(5, sink_tokens=3)))",
    "llama(attention=longformer(7, 2))",
]
CACHED += ["llama(attention=pattern(mla, tva(3), w2))"]


@pytest.mark.parametrize("line", CACHED)
def test_cache_bytes_are_those_a_cache_holds(line: str) -> None:
    """In bfloat16, 2 bytes a number. After a prompt there is no spare room; a window needs only its last tokens, and
    the plain cache keeps the others too."""
    T = 40
    spec = parse(line).replace(d_model=32, n_heads=4, vocab_size=29, max_seq_len=64).resolve("50k")
    model = build(spec, dtype=torch.bfloat16).eval()
    own, plain = model.new_cache(), model.new_cache("contiguous")
    with torch.no_grad():
        for cache in (own, plain):
            model(torch.arange(T)[None] % 29, cache=cache)
    counts = count(spec, context=T)
    assert own.n_bytes == own.report().used_bytes == counts.kv_cache_bytes
    assert plain.n_bytes == counts.kv_bytes_per_token * T


def test_an_encoder_keeps_no_cache() -> None:
    counts = count("gpt2(architecture=encoder)")
    assert (counts.kv_bytes_per_token, counts.kv_cache_bytes) == (0, 0)


# ---- how it is called ----


def test_a_line_a_mapping_or_a_spec_is_counted_at_the_length_asked_for() -> None:
    spec = parse("llama")
    assert count("llama") == count({"preset": "llama"}) == count(spec) == count(spec.resolve())
    assert count(spec).context == spec.resolve().max_seq_len
    for context in (0, -3):
        with pytest.raises(SpecError, match="context: at least one token"):
            count(spec, context=context)
    with pytest.raises(SpecError, match="unknown preset"):
        count("lama")


def test_nothing_is_built_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "__init__", lambda self: pytest.fail("a module was built"))
    assert max(count(f"{p}(size='{s}')").params for p, preset in PRESETS.items() for s in preset.sizes) > 176e9
