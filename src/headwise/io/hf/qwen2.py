"""Qwen 2 and 2.5 (2024), the dense models: Llama with biases on queries, keys and values; in some, windows in the upper
layers."""

from __future__ import annotations

from typing import Any

from headwise.io.hf import common
from headwise.io.hf.config import Config
from headwise.io.hf.llama_kin import LlamaKin, qwen_windows, written_qwen_windows
from headwise.spec import ModelSpec


class Qwen2(LlamaKin):
    """The output map has no bias."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"

    def attention(self, config: Config) -> dict[str, Any]:
        return qwen_windows(config, {**common.heads(config, kv_heads=32), "bias": True, "out_bias": False})

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        return {**super().config(spec), **written_qwen_windows(spec)}


FAMILY = Qwen2()
