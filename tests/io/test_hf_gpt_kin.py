"""Published models in GPT's manner, GPT-NeoX, GPT-J, Falcon and BLOOM: the same numbers as transformers, and back
without a changed bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from published_models import check_family

NEOX = {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 2}
NEOX |= {"max_position_embeddings": 64}
GPTJ = {"n_embd": 36, "n_layer": 2, "n_head": 3, "rotary_dim": 4, "n_positions": 64}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
RW = {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}
BLOOM = {"hidden_size": 48, "n_layer": 2, "n_head": 6}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox serial, no attention biases, tied": (
        "gpt_neox",
        {**NEOX, "use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "gpt_neox whole heads turn, scaled": (
        "gpt_neox",
        {**NEOX, "rope_parameters": {**LINEAR, "partial_rotary_factor": 1.0}, "hidden_act": "gelu_new"},
    ),
    "gptj": ("gptj", GPTJ),
    "gptj wide, tied, exact": (
        "gptj",
        {**GPTJ, "n_inner": 50, "tie_word_embeddings": True, "activation_function": "gelu", "rotary_dim": 10},
    ),
    "falcon 7b's form": ("falcon", FALCON),
    "falcon 7b's form, biases, untied": (
        "falcon",
        {**FALCON, "bias": True, "tie_word_embeddings": False, "ffn_hidden_size": 50, "rope_parameters": LINEAR},
    ),
    "falcon 40b's form": ("falcon", {**FALCON, **NEW}),
    "falcon 11b's form, one norm": ("falcon", {**FALCON, **NEW, "num_ln_in_parallel_attn": 1, "bias": True}),
    "falcon 40b's form, one key head": ("falcon", {**FALCON, **NEW, "num_kv_heads": 1}),
    "falcon serial, all key heads, RoPE": ("falcon", {**FALCON, "parallel_attn": False, "multi_query": False}),
    "falcon RW's form": ("falcon", {**FALCON, **RW, "hidden_size": 48, "num_attention_heads": 12}),
    "falcon ALiBi, multi-query, parallel": ("falcon", {**FALCON, "alibi": True, "num_attention_heads": 2}),
    "bloom": ("bloom", BLOOM),
    "bloom untied, two heads": ("bloom", {**BLOOM, "n_head": 2, "tie_word_embeddings": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_computes_the_same_and_comes_back(case: str, tmp_path: Path) -> None:
    model_type, config = CASES[case]
    check_family(tmp_path, model_type, **config)
