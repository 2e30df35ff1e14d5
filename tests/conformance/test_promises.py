"""Promises 2 to 7 of every mechanism: causality, caches, padding, precision, counts, saving."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance_lines import extra_inputs, model_of, one_layer, tokens

from headwise.cache import RecurrentCache
from headwise.errors import HeadwiseError
from headwise.io.pretrained import load, save_pretrained
from headwise.model import build
from headwise.model.base import LanguageModel
from headwise.spec import count, parse

T = 41


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit(causal_line: str) -> None:
    model, ids = model_of(causal_line), tokens(2, 300)
    before = model(ids)
    for t in (1, 150, 299):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % 61
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
        assert not torch.equal(after[:, t], before[:, t])


@torch.no_grad()
def test_an_encoder_sees_later_tokens(encoder_line: str) -> None:
    model, ids = model_of(encoder_line), tokens(1, 12)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 61
    assert not torch.allclose(model(changed)[:, 0], model(ids)[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_cached_decoding_in_any_chunking_equals_the_full_pass(causal_line: str, seed: int) -> None:
    model, ids = model_of(causal_line), tokens(2, T)
    full = model(ids)
    rng, cache, pieces, start = random.Random(seed), model.new_cache(), [], 0
    while start < T:
        stop = min(T, start + rng.choice([1, 1, 2, 7, 19]))
        pieces.append(model(ids[:, start:stop], cache=cache))
        start = stop
        assert cache.length == start
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_the_compiler_is_given_to_decode_one_token_equals_the_full_pass(
    causal_line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of one row and attention of one query have forms of their own there (`kernels/one_row.py`)."""
    model, ids = model_of(causal_line), tokens(1, 20)
    full, cache = model(ids), model.new_cache("contiguous")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    steps = [model(one, cache=cache) for one in ids.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), full, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cropped_cache_goes_on_from_where_it_was_cut(causal_line: str) -> None:
    model, ids = model_of(causal_line), tokens(1, T)
    cache = model.new_cache("contiguous")
    model(ids, cache=cache)
    if any(isinstance(layer, RecurrentCache) for layer in cache.layers):
        with pytest.raises(HeadwiseError, match="crop to 0"):
            cache.crop(10)
        cache.crop(0)
        torch.testing.assert_close(model(ids, cache=cache), model(ids), atol=1e-5, rtol=1e-5)
        return
    cache.crop(10)
    torch.testing.assert_close(model(ids[:, 10:], cache=cache), model(ids)[:, 10:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_encoder_decoder_decodes_from_its_cache(encoder_decoder_line: str) -> None:
    model = model_of(encoder_decoder_line)
    ids, extra, cache = tokens(2, T), extra_inputs(model, 2), model.new_cache()
    first, rest = model(ids[:, :7], cache=cache, **extra), model(ids[:, 7:], cache=cache)
    torch.testing.assert_close(torch.cat([first, rest], 1), model(ids, **extra), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(ids), model(ids, **extra)), "the decoder must look at what was read"


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_other_tokens(line: str, side: str) -> None:
    model = model_of(line)
    ids, pad = tokens(2, T), tokens(2, 300, seed=9)
    segments = torch.cat([torch.zeros(2, T, dtype=torch.long), torch.full((2, 300), -1)], 1)
    padded = torch.cat([ids, pad], 1)
    if side == "left":
        padded, segments = padded.roll(300, 1), segments.roll(300, 1)
    own = slice(300, None) if side == "left" else slice(T)
    extra = extra_inputs(model, 2)
    torch.testing.assert_close(
        model(padded, segments=segments, **extra)[:, own], model(ids, **extra), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_packed_documents_are_as_if_each_stood_alone(line: str) -> None:
    model = model_of(line)
    lengths = [5, 300, 1, 60]
    documents = [tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    segments = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], 1)
    extra = extra_inputs(model, 1)
    packed = model(torch.cat(documents, 1), segments=segments, **extra)
    alone = torch.cat([model(d, **extra) for d in documents], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_left_padded_batches_decode_from_a_cache(causal_line: str) -> None:
    model = model_of(causal_line)
    ids, segments = tokens(1, 30), torch.cat([torch.full((1, 9), -1), torch.zeros(1, 21, dtype=torch.long)], 1)
    cache = model.new_cache()
    pieces = [model(ids[:, :20], segments=segments[:, :20], cache=cache)[:, 9:]]
    pieces += [model(ids[:, i : i + 1], cache=cache) for i in range(20, 30)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids[:, 9:]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bf16_is_finite_and_near_float32_at_4096(line: str) -> None:
    spec = parse(one_layer(line)).replace(max_seq_len=4096)
    model = build(spec, seed=1).eval()
    ids = tokens(1, 4096)
    exact = model(ids, **extra_inputs(model, 1))
    half = model.bfloat16()(ids, **extra_inputs(model, 1))
    assert half.isfinite().all()
    error = (half.float() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert error < 0.02, f"relative error {error:.3f}"


def loss_and_grads(model: LanguageModel, compiled: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    ids, targets = tokens(2, T), tokens(2, T, seed=4)
    model.zero_grad()
    logits = (model if compiled is None else compiled)(ids, **extra_inputs(model, 2))
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_checkpointing_compiling_and_autocast_give_the_same_loss(stacked_line: str) -> None:
    model = model_of(stacked_line).train()
    loss, grads = loss_and_grads(model)
    model.activation_checkpointing = True
    torch.testing.assert_close(loss_and_grads(model), (loss, grads), atol=1e-7, rtol=1e-6)
    model.activation_checkpointing = False
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = loss_and_grads(model)
    torch.testing.assert_close(half, loss, atol=0.03, rtol=0.03)
    torch._dynamo.reset()
    # This backend traces and differentiates as inductor does, without its choice of what to keep for the backward pass
    # and the minutes of C++ compilation.
    compiled = torch.compile(model, backend="aot_eager_default_partitioner", fullgraph=True)
    torch.testing.assert_close(loss_and_grads(model, compiled), loss_and_grads(model), atol=1e-6, rtol=1e-5)


def test_counts_equal_the_built_modules(line: str) -> None:
    model = model_of(line)
    assert count(model.spec).params == sum(p.numel() for p in model.parameters())


@torch.no_grad()
def test_saved_and_loaded_logits_are_bit_identical(line: str, tmp_path: Path) -> None:
    model, ids = model_of(line), tokens(2, T)
    save_pretrained(model, tmp_path / "model")
    again = load(tmp_path / "model").eval()
    assert again.spec == model.spec
    assert torch.equal(again(ids, **extra_inputs(model, 2)), model(ids, **extra_inputs(model, 2)))
