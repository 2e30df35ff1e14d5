"""Mixtral (Jiang et al. 2024): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headwise.io.hf import common, moe_kin
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry
from headwise.io.hf.llama_kin import LlamaKin
from headwise.spec import ModelSpec

EXPERT = {"w_gate": "w1", "w_up": "w3", "w_out": "w2"}


class Mixtral(LlamaKin):
    """A window in every layer, or in none; the weights of the chosen experts always add up to 1."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    preset = "mixtral"
    eps = 1e-5

    def attention(self, config: Config) -> dict[str, Any]:
        window = config.size("sliding_window", None)
        kind = {"kind": "window", "window": window} if window else {"kind": "softmax"}
        return {**kind, **common.heads(config, kv_heads=8)}

    def position(self, config: Config) -> dict[str, Any]:
        return common.rope(config, base=1000000.0)

    def feed_forward(self, config: Config) -> dict[str, Any]:
        return moe_kin.experts(config, ["num_experts", "num_local_experts"], 2, "intermediate_size", 14336, 0.001)

    def written_feed_forward(self, spec: ModelSpec) -> dict[str, Any]:
        return {
            **moe_kin.written_experts(spec, "intermediate_size"),
            "num_local_experts": moe_kin.mixture(spec).n_experts,
        }

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        return {**super().config(spec), "sliding_window": common.written_windows(spec)["sliding_window"]}

    def entries(self, spec: ModelSpec) -> Iterator[Entry]:
        yield from common.llama_ends()
        for n in range(spec.dims.n_layers):
            ours, theirs = f"stack.blocks.{n}", f"model.layers.{n}"
            yield from moe_kin.attention_and_norms(ours, theirs)
            yield from moe_kin.mixture_entries(spec, ours, f"{theirs}.block_sparse_moe", EXPERT)


FAMILY = Mixtral()
