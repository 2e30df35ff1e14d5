"""Llama 1–3 (Touvron et al. 2023) and all that is stored as it: SmolLM, TinyLlama, Yi, …"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headwise.attention.softmax import SoftmaxSpec
from headwise.io.hf import common
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry, Family
from headwise.norm.rmsnorm import RMSNormSpec
from headwise.position.rope import RoPESpec
from headwise.spec import ModelSpec


class Llama(Family):
    """RoPE, RMSNorm, SwiGLU, grouped queries; biases and head widths as the config says."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"

    def fields(self, config: Config) -> dict[str, Any]:
        config.only("pretraining_tp", 1)
        attention_bias, mlp_bias = (config.get(name, bool, False) for name in ("attention_bias", "mlp_bias"))
        return {
            "preset": "llama",
            **common.widths(config),
            "attention": {"kind": "softmax", **common.heads(config), "bias": attention_bias or None},
            "position": common.rope(config),
            "norm": common.rmsnorm(config),
            "ffn": {**common.gated(config), "bias": mlp_bias or None},
            "tie_embeddings": config.get("tie_word_embeddings", bool, False),
        }

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        attention = common.part(spec.attention, SoftmaxSpec, "attention")
        return {
            **common.written_widths(spec),
            **common.written_heads(attention, spec),
            **common.written_rope(common.part(spec.position, RoPESpec, "position")),
            **common.written_gated(spec),
            "attention_bias": attention.has_bias(spec.dims),
            "mlp_bias": spec.ffn.has_bias(spec.dims),
            "rms_norm_eps": common.part(spec.norm, RMSNormSpec, "norm").eps,
        }

    def entries(self, spec: ModelSpec) -> Iterator[Entry]:
        return common.llama_entries(spec)


FAMILY = Llama()
