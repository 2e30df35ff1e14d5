"""Small random models of transformers, converted as llama.cpp does it, give the same logits out of a GGUF file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from converted import convert
from gguf import GGUFWriter
from published_models import check_same, published

import headwise as hw
from headwise.io.gguf import gguf_spec, load_gguf
from headwise.io.hf.folder import hf_spec
from headwise.position.rope import RoPESpec, YarnScaling

WIDTHS = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 80}
KIN = {**WIDTHS, "num_key_value_heads": 2, "max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.5],
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", KIN),
    "llama, all heads": ("llama", {**KIN, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama, biases, one key head": (
        "llama", {**KIN, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 3e-5}),
    "llama, narrow heads": ("llama", {**KIN, "head_dim": 8, "rope_parameters": {"rope_theta": 5e5}}),
    "llama, linear": ("llama", {**KIN, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama, yarn": ("llama", {**KIN, "rope_parameters": YARN}),
    "llama 3": ("llama", {**KIN, "head_dim": 32, "rope_parameters": LLAMA3}),
    "llama 3, trained on less": (
        "llama", {**KIN, "head_dim": 32, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}),
    "qwen2": ("qwen2", KIN),
    "qwen2, tied, yarn": ("qwen2", {**KIN, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {**KIN, "head_dim": 16}),
    "gpt2": ("gpt2", {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "gpt2, wide": ("gpt2", {"n_embd": 48, "n_head": 4, "n_layer": 1, "n_positions": 64, "n_inner": 56}),
    "phi3": ("phi3", {**KIN, "sliding_window": None}),
    "phi3, window, partial": ("phi3", {**KIN, "sliding_window": 7, "rope_parameters": {
        "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "phi3, long": (
        "phi3", {**KIN, "sliding_window": None, "original_max_position_embeddings": 16, "rope_parameters": LONG}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_model_that_was_converted(case: str, tmp_path: Path) -> None:
    model_type, config = CASES[case]
    peer = published(model_type, **config)
    path = convert(peer, tmp_path / "model.gguf")
    ours = load_gguf(path)
    assert ours.spec == gguf_spec(path)
    assert hw.parse(str(ours.spec)) == ours.spec
    assert not ours.training
    check_same(peer, ours)


@pytest.mark.parametrize("case", [case for case in CASES if "trained on less" not in case])
def test_the_line_is_that_of_the_folder(case: str, tmp_path: Path) -> None:
    """A model has one line, whichever of its forms is opened."""
    model_type, config = CASES[case]
    peer = published(model_type, **config)
    peer.save_pretrained(tmp_path / "folder")
    assert gguf_spec(convert(peer, tmp_path / "model.gguf")) == hf_spec(tmp_path / "folder")


def test_what_a_file_says_of_yarn_is_in_the_line(tmp_path: Path) -> None:
    def more(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_yarn_beta_fast(16.0)
        writer.add_rope_scaling_yarn_beta_slow(2.0)
        writer.add_rope_scaling_attn_factors(0.5)

    path = convert(published("qwen2", **KIN, rope_parameters=YARN), tmp_path / "model.gguf", more=more)
    position = gguf_spec(path).position
    assert isinstance(position, RoPESpec)
    assert isinstance(position.scaling, YarnScaling)
    assert (position.scaling.beta_fast, position.scaling.beta_slow) == (16, 2)
    # llama.cpp multiplies what the file says with YaRN's own rule.
    assert position.scaling.attention_factor == pytest.approx(0.5 * (1 + 0.1 * math.log(4)))


def test_old_files_of_gpt2_have_their_head_twice(tmp_path: Path) -> None:
    """Once as the embedding and once as a head: the line then has both, and computes the same."""
    peer = published("gpt2", n_embd=48, n_head=4, n_layer=1, n_positions=64)
    ours = load_gguf(convert(peer, tmp_path / "model.gguf", output=True))
    assert not ours.spec.tie_embeddings
    check_same(peer, ours)
