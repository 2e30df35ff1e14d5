"""Published mixtures of experts, Mixtral, Qwen 3 MoE and DeepSeek V3: the same numbers as transformers, and back
without a changed bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from published_models import check_family, check_same, published, reread

import headwise as hw
from headwise.ffn.moe import MoESpec
from headwise.io.hf.export import save_hf

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
MIXTRAL = {**SMALL, "num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 24, "num_local_experts": 5}
QWEN = {**SMALL, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 40}
QWEN |= {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3}
DEEPSEEK = {**SMALL, "num_hidden_layers": 3, "num_key_value_heads": 4, "intermediate_size": 40}
DEEPSEEK |= {
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
}
DEEPSEEK |= {"first_k_dense_replace": 1, "kv_lora_rank": 9, "q_lora_rank": 14, "qk_nope_head_dim": 7}
DEEPSEEK |= {"qk_rope_head_dim": 4, "v_head_dim": 5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral window, wide heads, tied": (
        "mixtral",
        {**MIXTRAL, "sliding_window": 9, "head_dim": 10, "tie_word_embeddings": True, "num_experts_per_tok": 3},
    ),
    "qwen3_moe": ("qwen3_moe", QWEN),
    "qwen3_moe every second layer": ("qwen3_moe", {**QWEN, "decoder_sparse_step": 2, "norm_topk_prob": True}),
    "qwen3_moe some dense, windows, biases": (
        "qwen3_moe",
        {**QWEN, "mlp_only_layers": [0, 1], "use_sliding_window": True, "sliding_window": 7, "attention_bias": True},
    ),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "deepseek_v3 yarn": (
        "deepseek_v3",
        {**DEEPSEEK, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "n_shared_experts": 2},
    ),
    "deepseek_v3 plain queries, half rotation, biases": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "rope_interleave": False,
            "attention_bias": True,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.4},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_computes_the_same_and_comes_back(case: str, tmp_path: Path) -> None:
    model_type, config = CASES[case]
    ours = check_family(tmp_path, model_type, **config)
    assert any(isinstance(ffn, MoESpec) for ffn in ours.spec.ffn.each())


def test_the_bias_of_the_choice_stays_as_exact_as_it_is_stored(tmp_path: Path) -> None:
    peer = published("deepseek_v3", **DEEPSEEK)
    peer.to(torch.bfloat16)
    gate = peer.model.layers[1].mlp.gate
    gate.e_score_correction_bias = torch.randn(8)
    peer.save_pretrained(tmp_path / "theirs")
    ours = hw.load(tmp_path / "theirs")
    assert ours.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(ours.stack.blocks[1].ffn.correction_bias, gate.e_score_correction_bias)
    save_hf(ours, tmp_path / "ours")
    again = reread(tmp_path / "ours").model.layers[1].mlp.gate
    assert torch.equal(again.e_score_correction_bias, gate.e_score_correction_bias)


@pytest.mark.parametrize("preset", ["gpt_neox", "mixtral", "deepseek_v3", "gemma2", "olmo2"])
def test_a_style_is_the_published_one(preset: str, tmp_path: Path) -> None:
    """Trained here, it goes out as the family of its name."""
    fields = "d_model=64, n_layers=2, n_heads=4, vocab_size=61, max_seq_len=64, init_std=0.2"
    ffn = ", ffn=pattern(swiglu, moe(8, 3, d_ff=12, scoring=sigmoid, correction_bias=true, n_shared_experts=1))"
    model = hw.build(f"{preset}({fields}{ffn if preset == 'deepseek_v3' else ''})").eval()
    save_hf(model, tmp_path)
    peer = reread(tmp_path)
    assert peer.config.model_type == preset
    check_same(peer, model)
