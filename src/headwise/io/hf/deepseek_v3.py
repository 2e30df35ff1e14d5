"""DeepSeek V3 and R1 (arXiv:2412.19437): latent attention, a few dense layers, then mixtures chosen by sigmoids within
groups, with a bias of the choice and a shared expert."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from headwise.attention.mla import MLASpec
from headwise.io.hf import common, moe_kin
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry, module, same
from headwise.io.hf.llama_kin import LlamaKin
from headwise.position.rope import RoPESpec
from headwise.spec import ModelSpec

WIDTHS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
MAPS = {
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
}


class DeepSeekV3(LlamaKin):
    """With YaRN's `mscale_all_dim` the whole score is multiplied by a further factor, which stands in `scale`. The
    module that predicts further tokens, a layer past the last in the published file, is left out as transformers does.
    """

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    preset = "deepseek_v3"
    unused = re.compile(r"\.rotary_emb\.inv_freq$|^model\.layers\.61\.")

    def attention(self, config: Config) -> dict[str, Any]:
        n_heads = config.size("num_attention_heads")
        config.only("num_key_value_heads", n_heads)
        widths = {name: config.size(name, width) for name, width in WIDTHS.items()}
        found = config.section("rope_parameters") or config.section("rope_scaling") or Config({}, config.where)
        sharpened, kind = (
            found.get("mscale_all_dim", float, 0.0),
            found.get("rope_type", str, found.get("type", str, "")),
        )
        scale = None
        if sharpened and kind not in ("", "default") and (factor := found.get("factor", float)) > 1:
            key_dim = widths["qk_nope_head_dim"] + widths["qk_rope_head_dim"]
            scale = key_dim**-0.5 * (0.1 * sharpened * math.log(factor) + 1) ** 2
        return {
            "kind": "mla",
            **widths,
            "q_lora_rank": config.size("q_lora_rank", None if "q_lora_rank" in config.values else 1536),
            "bias": config.get("attention_bias", bool, False) or None,
            "scale": scale,
        }

    def position(self, config: Config) -> dict[str, Any]:
        interleaved = config.get("rope_interleave", bool, True)
        return {**common.rope(config), "pairing": "interleaved" if interleaved else "half"}

    def feed_forward(self, config: Config) -> dict[str, Any]:
        config.only("scoring_func", "sigmoid")
        config.only("topk_method", "noaux_tc")
        config.only("moe_layer_freq", 1)
        n_layers = config.size("num_hidden_layers", most=common.MOST_LAYERS)
        n_dense = config.get("first_k_dense_replace", int, 3)
        moe = {
            **moe_kin.experts(config, ["n_routed_experts"], 8, "moe_intermediate_size", 2048, 0.001),
            "n_shared_experts": config.size("n_shared_experts", 1),
            "norm_topk_prob": config.get("norm_topk_prob", bool, True),
            "scoring": "sigmoid",
            "correction_bias": True,
            "n_groups": config.size("n_group", 8),
            "topk_groups": config.size("topk_group", 4),
            "routed_scaling_factor": config.get("routed_scaling_factor", float, 2.5),
        }
        if n_dense == 0:
            return moe
        return common.in_turn([n < n_dense for n in range(n_layers)], common.gated(config), moe)

    def written_position(self, spec: ModelSpec) -> dict[str, Any]:
        rope = common.part(spec.position, RoPESpec, "position")
        return {**common.written_rope(rope), "rope_interleave": rope.pairing == "interleaved"}

    def written_feed_forward(self, spec: ModelSpec) -> dict[str, Any]:
        moe = moe_kin.mixture(spec)
        return {
            **moe_kin.written_experts(spec, "moe_intermediate_size"),
            "n_routed_experts": moe.n_experts,
            "n_shared_experts": moe.n_shared_experts,
            "norm_topk_prob": moe.norm_topk_prob,
            "n_group": moe.n_groups,
            "topk_group": moe.topk_groups,
            "routed_scaling_factor": moe.routed_scaling_factor,
            "intermediate_size": moe_kin.dense_width(spec),
            "first_k_dense_replace": len(moe_kin.dense_layers(spec)),
        }

    def written_heads(self, spec: ModelSpec) -> dict[str, Any]:
        attention, dims = common.part(spec.attention, MLASpec, "attention"), spec.dims
        return {
            "num_key_value_heads": dims.n_heads,
            "kv_lora_rank": attention.latent_dim(dims),
            "q_lora_rank": attention.q_lora_rank,
            "qk_nope_head_dim": attention.nope_dim(dims),
            "qk_rope_head_dim": attention.rotary_dim(dims),
            "v_head_dim": attention.heads(dims)[2],
            "attention_bias": attention.has_bias(dims),
            "num_nextn_predict_layers": 0,
        }

    def entries(self, spec: ModelSpec) -> Iterator[Entry]:
        dense = moe_kin.dense_layers(spec)
        yield from common.llama_ends()
        for n in range(spec.dims.n_layers):
            ours, theirs = f"stack.blocks.{n}", f"model.layers.{n}"
            yield from common.llama_norms(ours, theirs)
            for mine, name in MAPS.items():
                yield from module(f"{ours}.attention.{mine}", f"{theirs}.self_attn.{name}")
            if n in dense:
                yield from moe_kin.dense_entries(ours, f"{theirs}.mlp")
                continue
            yield from moe_kin.mixture_entries(spec, ours, f"{theirs}.mlp")
            yield from same(f"{ours}.ffn.correction_bias", f"{theirs}.mlp.gate.e_score_correction_bias")
            for mine, name in moe_kin.PARTS.items():
                yield from module(f"{ours}.ffn.shared.{mine}", f"{theirs}.mlp.shared_experts.{name}")


FAMILY = DeepSeekV3()
