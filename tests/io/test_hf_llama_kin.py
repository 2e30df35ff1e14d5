"""Published models of Llama's kin: the same numbers as transformers, and back without a changed bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from published_models import check_family

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_theta": 500000.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3]}
LONG |= {"long_factor": [1.0, 2.0, 4.0, 7.5], "original_max_position_embeddings": 32}
TURNS = ["full_attention", "sliding_attention", "full_attention", "full_attention", "sliding_attention"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama plain": ("llama", {"num_key_value_heads": 4}),
    "llama wide heads, biases, tied": (
        "llama",
        {"head_dim": 12, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama3 scaling": ("llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-3}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0}}),
    "llama dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 24},
    ),
    "llama yarn": ("llama", {"rope_parameters": YARN, "hidden_act": "gelu"}),
    "llama longrope, its own amplitude": (
        "llama",
        {"rope_parameters": {**LONG, "factor": 3.0, "attention_factor": 1.2}, "tie_word_embeddings": True},
    ),
    "llama yarn, spelt out": (
        "llama",
        {"rope_parameters": {**YARN, "beta_fast": 20.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False}},
    ),
    "mistral window": ("mistral", {"sliding_window": 9, "head_dim": 6}),
    "mistral full": ("mistral", {"sliding_window": None, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 upper windows": (
        "qwen2",
        {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3 biases, layers in turn": (
        "qwen3",
        {
            "head_dim": 8,
            "attention_bias": True,
            "num_hidden_layers": 5,
            "layer_types": TURNS,
            "use_sliding_window": True,
            "sliding_window": 5,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
        },
    ),
    "phi3": ("phi3", {"sliding_window": 11}),
    "phi3 beyond its first length": (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 32, "max_position_embeddings": 128},
    ),
    "phi3 within its first length": (
        "phi3",
        {
            "rope_parameters": {**LONG, "original_max_position_embeddings": 64},
            "original_max_position_embeddings": 64,
            "max_position_embeddings": 128,
        },
    ),
    "phi3 partial, tied": (
        "phi3",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_computes_the_same_and_comes_back(case: str, tmp_path: Path) -> None:
    model_type, config = CASES[case]
    check_family(tmp_path, model_type, **{**SMALL, **config})
