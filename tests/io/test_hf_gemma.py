"""Gemma 1, 2 and 3 and OLMo 2: norms in other places and of another form, capped scores and logits, layers in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from published_models import check_family

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
}
BOTH = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e6},
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {"num_key_value_heads": 1}),
    "gemma untied, biases": ("gemma", {"tie_word_embeddings": False, "attention_bias": True, "rms_norm_eps": 1e-4}),
    "gemma2": ("gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 7}),
    "gemma2 tight caps": (
        "gemma2",
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 10},
    ),
    "gemma2 no caps, full": (
        "gemma2",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention"] * 3,
            "query_pre_attn_scalar": 144,
        },
    ),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 8, "sliding_window": 5, "query_pre_attn_scalar": 12}),
    "gemma3 scaled": (
        "gemma3_text",
        {
            "num_hidden_layers": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            "sliding_window": 7,
            "rope_parameters": BOTH,
            "final_logit_softcapping": 3.0,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "olmo2": ("olmo2", {"head_dim": None}),
    "olmo2 wide, biases, tied": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_computes_the_same_and_comes_back(case: str, tmp_path: Path) -> None:
    model_type, config = CASES[case]
    if (settings := {**SMALL, **config})["head_dim"] is None:
        del settings["head_dim"]
    check_family(tmp_path, model_type, **settings)
