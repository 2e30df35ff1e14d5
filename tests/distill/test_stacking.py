"""Caches of both libraries as [B,L,H,T,D]: the same numbers, with gradients, and a clear word where there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kv_models import drawn, small, tokens
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import EncoderDecoderCache, QuantizedLayer

from headwise.distill import flatten_kv_heads, stack_past_kv, unflatten_kv_heads
from headwise.distill.capture import capture
from headwise.errors import HeadwiseError

HF = LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip


def test_a_transformers_cache_with_gradients() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(HF)
    out = model(tokens(2, 11), use_cache=True)
    k, v = stack_past_kv(out.past_key_values)
    assert k.shape == v.shape == (2, 3, 2, 11, 8)
    for layer in range(3):
        assert torch.equal(k[:, layer], out.past_key_values.layers[layer].keys)
        assert torch.equal(v[:, layer], out.past_key_values.layers[layer].values)
    (k.square().sum() + v.square().sum()).backward()
    for layer in model.model.layers:
        assert layer.self_attn.k_proj.weight.grad.abs().sum() > 0
        assert layer.self_attn.v_proj.weight.grad.abs().sum() > 0


def test_spare_room_of_a_static_cache_is_left_out() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(HF).eval()
    with torch.no_grad():
        growing = stack_past_kv(model(tokens(2, 11), use_cache=True).past_key_values)
        room = StaticCache(config=HF, max_cache_len=32)
        static = stack_past_kv(model(tokens(2, 11), past_key_values=room, use_cache=True).past_key_values)
    for one, other in zip(growing, static):
        torch.testing.assert_close(one, other)


def test_pairs_of_layers_and_the_decoder_of_two() -> None:
    pairs = [(drawn(2, 3, 5, 4, seed=n), drawn(2, 3, 5, 6, seed=9 + n)) for n in range(2)]
    k, v = stack_past_kv(pairs)
    assert (k.shape, v.shape) == ((2, 2, 3, 5, 4), (2, 2, 3, 5, 6))  # keys and values have widths of their own
    assert torch.equal(k[:, 1], pairs[1][0])
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    both.self_attention_cache.update(*pairs[0], 0)
    assert torch.equal(stack_past_kv(both)[0][:, 0], pairs[0][0])


@pytest.mark.parametrize("kind", ["contiguous", "static"])
@pytest.mark.parametrize("call", ["gqa(kv_heads=2)", "tva(rank=4)"])
def test_our_own_cache_is_what_capture_sees_turned(kind: str, call: str) -> None:
    model = small(f"attention={call}")
    cache = model.new_cache(kind)
    with capture(model, {"keys", "values"}) as signals:
        model(tokens(2, 11), cache=cache)
    k, v = stack_past_kv(cache)
    assert k.shape[:3] == (2, 2, model.spec.attention.heads(model.spec.dims)[1])
    for layer, (keys, values) in enumerate(zip(signals.keys, signals.values)):
        assert keys is not None
        torch.testing.assert_close(k[:, layer], signals.encodings[layer].rotate(keys))
        torch.testing.assert_close(v[:, layer], values)
    (k.sum() + v.square().sum()).backward()
    attention: Any = model.decoding_stack().blocks[0].attention
    assert attention.wv.weight.grad.abs().sum() > 0


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))
def test_flattening_puts_heads_side_by_side_and_back(B: int, L: int, H: int, T: int, D: int) -> None:
    x = drawn(B, L, H, T, D)
    flat = flatten_kv_heads(x)
    assert torch.equal(flat, torch.cat([x[:, :, h] for h in range(H)], -1))
    assert torch.equal(unflatten_kv_heads(flat, H), x)


class Quantised(QuantizedLayer):
    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor.half()

    def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
        return q_tensor.float()


def quantised_cache() -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [Quantised()]
    for _ in range(2):  # the first tokens in few bits, later ones beside them as they are
        cache.update(drawn(1, 2, 3, 4).float(), drawn(1, 2, 3, 4).float(), 0)
    assert cache.layers[0].keys is not None
    assert cache.layers[0].keys.shape == (1, 2, 3, 4)
    return cache


def test_caches_without_keys_and_values_of_every_token_are_errors() -> None:
    refused = "layer 0: a {} cache of {} tokens holds no keys and values of every token; fill a plain growing cache"
    for call, kind, name in [
        ("linear", "auto", "recurrent"),
        ("mla", "auto", "latent"),
        ("window(4)", "auto", "rolling"),
        ("softmax", "int8", "int8"),
        ("softmax", "paged", "paged"),
    ]:
        model = small(f"attention={call}")
        cache = model.new_cache(kind)
        with torch.no_grad():
            model(tokens(2, 11), cache=cache)
        with pytest.raises(HeadwiseError, match=refused.format(name, 11)):
            stack_past_kv(cache)
    with pytest.raises(HeadwiseError, match="a contiguous cache of 0 tokens"):
        stack_past_kv(small().new_cache("contiguous"))
    with pytest.raises(HeadwiseError, match=r"no cache was given \(None\); run the model with use_cache=True"):
        stack_past_kv(None)
    for other in ({"k": 1}, [], "cache", [torch.zeros(2, 3)], [(torch.zeros(2), torch.zeros(2))], DynamicCache()):
        with pytest.raises(HeadwiseError, match="is no cache that can be read; give a transformers cache"):
            stack_past_kv(other)
    with pytest.raises(HeadwiseError, match="layer 0: a Quantised of 6 tokens holds no keys"):
        stack_past_kv(quantised_cache())


def test_a_window_that_has_forgotten_is_an_error() -> None:
    from transformers.cache_utils import DynamicSlidingWindowLayer

    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=4)]
    for _ in range(2):
        cache.update(drawn(1, 2, 3, 4), drawn(1, 2, 3, 4), 0)
    with pytest.raises(HeadwiseError, match="layer 0: a DynamicSlidingWindowLayer of 6 tokens"):
        stack_past_kv(cache)


def test_layers_of_unlike_shapes_are_named() -> None:
    pairs = [(drawn(1, 2, 3, 4), drawn(1, 2, 3, 4)), (drawn(1, 1, 3, 4), drawn(1, 2, 3, 4))]
    with pytest.raises(HeadwiseError, match=r"keys of layer 0 are \[1, 2, 3, 4\] and those of layer 1 \[1, 1, 3, 4\]"):
        stack_past_kv(pairs)
    with pytest.raises(HeadwiseError, match="10 numbers a token do not divide into 3 heads"):
        unflatten_kv_heads(torch.zeros(1, 1, 2, 10), 3)
