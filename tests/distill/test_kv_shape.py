"""The shape of a cache, from a model, its spec, and Hugging Face configurations: grouped, latent, folded, recurrent."""

from __future__ import annotations

import pytest
import torch
from kv_models import small, tokens
from transformers import DeepseekV2Config, Gemma3Config, GPT2Config, LlamaConfig

from headwise.distill import KVShape
from headwise.errors import HeadwiseError
from headwise.model.surgery import fold
from headwise.spec import parse

GQA = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_hidden_layers": 3,
    "model_type": "llama",
}


def test_grouped_heads_and_their_own_width_are_read_from_the_configuration() -> None:
    """hidden/heads would give 16, and the number of query heads 4."""
    expected = KVShape(n_layers=3, n_heads=4, kv_heads=2, key_dim=24, value_dim=24)
    assert KVShape.of(GQA) == KVShape.of(LlamaConfig(**GQA)) == expected
    line = "llama(d_model=64, n_layers=3, n_heads=4, vocab_size=9, attention=gqa(kv_heads=2, head_dim=24))"
    assert KVShape.of(parse(line)) == expected
    assert KVShape.of(expected) is expected
    assert KVShape.of(GQA, match="output") == KVShape(3, 4, 4, 24, 24)


def test_older_names_and_models_of_several_parts() -> None:
    assert KVShape.of(GPT2Config(n_layer=5, n_embd=48, n_head=6)) == KVShape(5, 6, 6, 8, 8)
    assert KVShape.of({"n_layer": 5, "n_embd": 48, "n_head": 6}) == KVShape(5, 6, 6, 8, 8)
    text = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
    assert KVShape.of(Gemma3Config(text_config={**text, "num_hidden_layers": 2})) == KVShape(2, 4, 1, 16, 16)
    falcon = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "multi_query": True}
    assert KVShape.of(falcon) == KVShape(2, 4, 1, 8, 8)
    assert KVShape.of({**falcon, "new_decoder_architecture": True, "num_kv_heads": 2}) == KVShape(2, 4, 2, 8, 8)


def test_latent_attention_has_two_widths() -> None:
    deepseek = DeepseekV2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, qk_nope_head_dim=12,
        qk_rope_head_dim=4, v_head_dim=10, kv_lora_rank=8, q_lora_rank=None,
    )  # fmt: skip
    assert KVShape.of(deepseek) == KVShape(2, 4, 4, 16, 10)  # as transformers caches them
    ours = small("attention=mla(qk_nope_head_dim=12, qk_rope_head_dim=4, v_head_dim=10)")
    assert KVShape.of(ours) == KVShape(2, 4, 4, 12, 10)  # as capture sees them


def test_a_folded_vein_has_the_unfolded_ones_shape() -> None:
    model = small("attention=tva(rank=6, kv_heads=2)")
    assert KVShape.of(model) == KVShape.of(fold(model)) == KVShape(2, 4, 2, 6, 6)


def test_layers_that_differ_are_named_and_may_be_chosen() -> None:
    model = small("attention=pattern(gqa(kv_heads=2), softmax, linear)")
    mixed = model.spec.replace(n_layers=6)
    with pytest.raises(HeadwiseError, match=r"layer 2: linear keeps a state and no keys and values; match its outputs"):
        KVShape.of(mixed)
    with pytest.raises(
        HeadwiseError, match=r"layers 0,3: 4 heads, 2 of keys and values, 8 and 8 wide; layers 1,4: 4 heads, 4 of"
    ):
        KVShape.of(mixed, layers=[0, 1, 3, 4])
    assert KVShape.of(mixed, layers=[0, 3]) == KVShape(2, 4, 2, 8, 8)
    assert KVShape.of(mixed, match="output") == KVShape(6, 4, 4, 8, 8)
    assert KVShape.of(GQA, layers=[0, 2]).n_layers == 2
    with pytest.raises(HeadwiseError, match="but no layer"):
        KVShape.of(mixed, layers=[])


@pytest.mark.parametrize("given", [{}, {"num_hidden_layers": 2}, 7, None, {"num_hidden_layers": 2, "hidden_size": 8}])
def test_what_says_nothing_of_heads_is_an_error(given: object) -> None:
    with pytest.raises(HeadwiseError, match="does not say num_hidden_layers, num_attention_heads and head_dim"):
        KVShape.of(given)


def test_the_shape_is_that_of_the_stacked_cache() -> None:
    from headwise.distill import stack_past_kv

    model = small("attention=gqa(kv_heads=2)")
    cache = model.new_cache()
    with torch.no_grad():
        model(tokens(2, 5), cache=cache)
    k, v = stack_past_kv(cache)
    shape = KVShape.of(model)
    assert k.shape == (2, shape.n_layers, shape.kv_heads, 5, shape.key_dim)
    assert v.shape == (2, shape.n_layers, shape.kv_heads, 5, shape.value_dim)
