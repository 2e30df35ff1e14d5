"""Mistral 7B (Jiang et al. 2023): Llama with, in the first version, a sliding window in every layer."""

from __future__ import annotations

from typing import Any

from headwise.io.hf import common
from headwise.io.hf.config import Config
from headwise.io.hf.llama_kin import LlamaKin
from headwise.spec import ModelSpec


class Mistral(LlamaKin):
    """No biases; `sliding_window` null stands for full attention, its absence for a window of 4096."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    preset = "mistral"

    def attention(self, config: Config) -> dict[str, Any]:
        window = config.size("sliding_window", None if "sliding_window" in config.values else 4096)
        kind = {"kind": "window", "window": window} if window else {"kind": "softmax"}
        return {**kind, **common.heads(config, kv_heads=8)}

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        return {**super().config(spec), "sliding_window": common.written_windows(spec)["sliding_window"]}


FAMILY = Mistral()
