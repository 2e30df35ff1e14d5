"""Falcon (2023) in all its forms: multi-query with one norm for both parts (7b), grouped queries with a norm each (40b,
the "new decoder"), and one part after the other with ALiBi (RW)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headwise.attention.softmax import SoftmaxSpec
from headwise.io.hf import common, gpt_kin
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry, Family, module, same
from headwise.position.alibi import ALiBiSpec
from headwise.position.rope import RoPESpec
from headwise.spec import ModelSpec

# The norms of a layer, ours → theirs, by the order of its parts.
NORMS = {
    "parallel": {"attention_norm": "input_layernorm"},
    "parallel_two_norms": {"attention_norm": "ln_attn", "ffn_norm": "ln_mlp"},
    "pre": gpt_kin.NORMS,
}


class Falcon(Family):
    """`bias` is that of all maps; ALiBi's bias is rounded, and divided by √head_dim as the scores are."""

    model_type = "falcon"
    architecture = "FalconForCausalLM"
    base = "transformer."

    def fields(self, config: Config) -> dict[str, Any]:
        d_model = config.size("n_embed", config.size("hidden_size"))
        n_heads = config.size("num_attention_heads")
        new, parallel = (
            config.get(name, bool, name == "parallel_attn") for name in ("new_decoder_architecture", "parallel_attn")
        )
        norms = config.size("num_ln_in_parallel_attn", 1 + new, most=2)
        if new and not parallel:
            raise config.lack(
                "new_decoder_architecture with parallel_attn=false", "the new decoder's parts are parallel"
            )
        if norms == 2 and parallel and not new:
            raise config.lack("num_ln_in_parallel_attn=2", "two norms belong to new_decoder_architecture=true")
        kv_heads = config.size("num_kv_heads", n_heads)
        if not new and config.get("multi_query", bool, True):
            kv_heads = 1
        order = ("parallel_two_norms" if norms == 2 else "parallel") if parallel else "pre"
        return {
            "preset": "falcon",
            "d_model": d_model,
            "n_layers": config.size("num_hidden_layers", most=common.MOST_LAYERS),
            "n_heads": n_heads,
            "vocab_size": config.size("vocab_size"),
            "max_seq_len": config.size("max_position_embeddings", 2048),
            "attention": {"kind": "softmax", "kv_heads": None if kv_heads == n_heads else kv_heads},
            "position": self.position(config, d_model // n_heads),
            "norm": gpt_kin.layernorm(config),
            "ffn": gpt_kin.mlp(config, "activation", "gelu", "ffn_hidden_size"),
            "order": order,
            "bias": config.get("bias", bool, False),
            "tie_embeddings": config.get("tie_word_embeddings", bool, True),
        }

    def position(self, config: Config, head_dim: int) -> dict[str, Any]:
        """ALiBi or RoPE."""
        if config.get("alibi", bool, False):
            return {"kind": "alibi", "scale": max(1, head_dim) ** -0.5, "rounded": True}
        return common.rope(config)

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        attention = common.part(spec.attention, SoftmaxSpec, "attention")
        _, kv_heads, _ = attention.heads(spec.dims)
        # One key head can be written in either layout; the new one has it beside two norms or one, the old beside one.
        new = spec.order != "pre" and (spec.order == "parallel_two_norms" or kv_heads not in (1, spec.n_heads))
        position = {"alibi": True}
        if not isinstance(spec.position, ALiBiSpec):
            position = {"alibi": False, **common.written_rope(common.part(spec.position, RoPESpec, "position"))}
        return {
            **common.written_widths(spec),
            **gpt_kin.written_mlp(spec, "activation", "ffn_hidden_size"),
            **position,
            "num_kv_heads": kv_heads,
            "multi_query": kv_heads == 1,
            "new_decoder_architecture": new,
            "num_ln_in_parallel_attn": 2 if spec.order == "parallel_two_norms" else 1,
            "parallel_attn": spec.order != "pre",
            "bias": attention.has_bias(spec.dims),
            "layer_norm_epsilon": gpt_kin.written_eps(spec),
        }

    def entries(self, spec: ModelSpec) -> Iterator[Entry]:
        yield from same("embedding.weight", "transformer.word_embeddings.weight")
        yield from module("stack.final_norm", "transformer.ln_f")
        yield from module("head", "lm_head")
        for n in range(spec.dims.n_layers):
            names = f"stack.blocks.{n}", f"transformer.h.{n}"
            yield from gpt_kin.layer(spec, *names, "self_attention", NORMS.get(spec.order, {}))


FAMILY = Falcon()
