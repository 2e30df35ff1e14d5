"""Qwen 3's mixtures (2025): Qwen 3 with experts in every layer, or in some."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headwise.errors import FormatError, short
from headwise.io.hf import common, moe_kin
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry
from headwise.io.hf.llama_kin import LlamaKin
from headwise.spec import ModelSpec


class Qwen3MoE(LlamaKin):
    """`decoder_sparse_step` puts experts in every n-th layer, `mlp_only_layers` takes them out of some."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    preset = "qwen3"

    def attention(self, config: Config) -> dict[str, Any]:
        window = config.size("sliding_window", 4096) if config.get("use_sliding_window", bool, False) else None
        kind = {"kind": "window", "window": window} if window else {"kind": "softmax"}
        bias = config.get("attention_bias", bool, False) or None
        return {**kind, **common.heads(config, kv_heads=4), "qk_norm": True, "bias": bias}

    def feed_forward(self, config: Config) -> dict[str, Any]:
        n_layers = config.size("num_hidden_layers", most=common.MOST_LAYERS)
        step, only = config.size("decoder_sparse_step", 1), config.get("mlp_only_layers", list, [])
        if not all(isinstance(n, int) for n in only):
            raise FormatError(f"{config.where}: 'mlp_only_layers' should be numbers of layers, not {short(only)}")
        dense = [n in only or (n + 1) % step > 0 for n in range(n_layers)]
        moe = {
            **moe_kin.experts(config, ["num_experts", "num_local_experts"], 8, "moe_intermediate_size", 768, 0.001),
            "norm_topk_prob": config.get("norm_topk_prob", bool, False),
        }
        return common.in_turn(dense, common.gated(config), moe) if any(dense) else moe

    def written_feed_forward(self, spec: ModelSpec) -> dict[str, Any]:
        moe = moe_kin.mixture(spec)
        return {
            **moe_kin.written_experts(spec, "moe_intermediate_size"),
            "num_experts": moe.n_experts,
            "norm_topk_prob": moe.norm_topk_prob,
            "intermediate_size": moe_kin.dense_width(spec),
            "decoder_sparse_step": 1,
            "mlp_only_layers": moe_kin.dense_layers(spec),
        }

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        window = common.written_windows(spec)["sliding_window"]
        return {
            **super().config(spec),
            "attention_bias": common.first_attention(spec).has_bias(spec.dims),
            "use_sliding_window": window is not None,
            "sliding_window": window,
        }

    def entries(self, spec: ModelSpec) -> Iterator[Entry]:
        dense = moe_kin.dense_layers(spec)
        yield from common.llama_ends()
        for n in range(spec.dims.n_layers):
            ours, theirs = f"stack.blocks.{n}", f"model.layers.{n}"
            yield from moe_kin.attention_and_norms(ours, theirs)
            if n in dense:
                yield from moe_kin.dense_entries(ours, f"{theirs}.mlp")
            else:
                yield from moe_kin.mixture_entries(spec, ours, f"{theirs}.mlp")


FAMILY = Qwen3MoE()
