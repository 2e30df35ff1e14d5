"""Llama 1–3 (Touvron et al. 2023) and all that is stored as it: SmolLM, TinyLlama, Yi, …"""

from __future__ import annotations

from typing import Any

from headwise.io.hf import common
from headwise.io.hf.config import Config
from headwise.io.hf.llama_kin import LlamaKin
from headwise.spec import ModelSpec


class Llama(LlamaKin):
    """Biases on all maps of the attention, or of the feed-forward, where the config asks for them."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"

    def attention(self, config: Config) -> dict[str, Any]:
        return {**super().attention(config), "bias": config.get("attention_bias", bool, False) or None}

    def fields(self, config: Config) -> dict[str, Any]:
        config.only("pretraining_tp", 1)
        bias = config.get("mlp_bias", bool, False) or None
        return {**(fields := super().fields(config)), "ffn": {**fields["ffn"], "bias": bias}}

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        return {
            **super().config(spec),
            "attention_bias": common.first_attention(spec).has_bias(spec.dims),
            "mlp_bias": common.gate_spec(spec).has_bias(spec.dims),
        }


FAMILY = Llama()
