"""OLMo 2 (2024): Llama with each norm behind its part, and an RMSNorm over all heads' queries, and keys, together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headwise.io.hf import common
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry, module
from headwise.io.hf.llama_kin import LlamaKin
from headwise.spec import ModelSpec


class Olmo2(LlamaKin):
    """Biases on the attention's maps where the config asks for them."""

    model_type = "olmo2"
    architecture = "Olmo2ForCausalLM"
    preset = "olmo2"
    eps = 1e-5

    def attention(self, config: Config) -> dict[str, Any]:
        bias = config.get("attention_bias", bool, False) or None
        return {**super().attention(config), "qk_norm": "full", "bias": bias}

    def fields(self, config: Config) -> dict[str, Any]:
        return {**super().fields(config), "order": "reordered"}

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        return {**super().config(spec), "attention_bias": common.first_attention(spec).has_bias(spec.dims)}

    def entries(self, spec: ModelSpec) -> Iterator[Entry]:
        yield from common.llama_ends()
        for n in range(spec.dims.n_layers):
            ours, theirs = f"stack.blocks.{n}", f"model.layers.{n}"
            yield from common.llama_layer(ours, theirs)
            yield from module(f"{ours}.attention_norm", f"{theirs}.post_attention_layernorm")
            yield from module(f"{ours}.ffn_norm", f"{theirs}.post_feedforward_layernorm")


FAMILY = Olmo2()
