"""Qwen 3 (2025), the dense models: Llama with an RMSNorm on each head's queries and keys; windows in the upper layers
of some."""

from __future__ import annotations

from typing import Any

from headwise.io.hf import common
from headwise.io.hf.config import Config
from headwise.io.hf.llama_kin import LlamaKin, qwen_windows, written_qwen_windows
from headwise.spec import ModelSpec


class Qwen3(LlamaKin):
    """Heads of a width of their own, 128 where the config names none."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    preset = "qwen3"

    def attention(self, config: Config) -> dict[str, Any]:
        bias = config.get("attention_bias", bool, False) or None
        heads = common.heads(config, kv_heads=32, head_dim=128)
        return qwen_windows(config, {**heads, "qk_norm": True, "bias": bias})

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        return {
            **super().config(spec),
            **written_qwen_windows(spec),
            "attention_bias": common.first_attention(spec).has_bias(spec.dims),
        }


FAMILY = Qwen3()
