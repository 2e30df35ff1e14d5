"""Phi-3 and Phi-4-mini (2024): Llama with q|k|v and gate|up each in one matrix, and LongRoPE in the long models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headwise.io.hf import common
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry, Rows, module
from headwise.io.hf.llama_kin import LlamaKin
from headwise.position.rope import RoPESpec
from headwise.spec import ModelSpec


class Phi3(LlamaKin):
    """No biases; a window in every layer, or in none."""

    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    eps = 1e-5

    def attention(self, config: Config) -> dict[str, Any]:
        window = config.size("sliding_window", None)
        return {**({"kind": "window", "window": window} if window else {"kind": "softmax"}), **common.heads(config)}

    def position(self, config: Config) -> dict[str, Any]:
        # Early files call their scaling "su" or "yarn"; transformers computes LongRoPE for all of them.
        return common.rope(config, trained=4096, renamed={"su": "longrope", "yarn": "longrope"})

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        scaling = common.part(spec.position, RoPESpec, "position").scaling
        return {
            **super().config(spec),
            "original_max_position_embeddings": getattr(scaling, "original_max_position_embeddings", spec.max_seq_len),
            "sliding_window": common.written_windows(spec)["sliding_window"],
        }

    def entries(self, spec: ModelSpec) -> Iterator[Entry]:
        yield from common.llama_ends()
        n_heads, kv_heads, head_dim = common.first_attention(spec).heads(spec.dims)
        qkv = Rows((n_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim))
        gate_up = Rows((common.gate_spec(spec).width(spec.dims),) * 2)
        for n in range(spec.dims.n_layers):
            ours, theirs = f"stack.blocks.{n}", f"model.layers.{n}"
            yield from module(
                [f"{ours}.attention.{w}" for w in ("wq", "wk", "wv")], f"{theirs}.self_attn.qkv_proj", qkv
            )
            yield from module(f"{ours}.attention.wo", f"{theirs}.self_attn.o_proj")
            yield from module([f"{ours}.ffn.w_gate", f"{ours}.ffn.w_up"], f"{theirs}.mlp.gate_up_proj", gate_up)
            yield from module(f"{ours}.ffn.w_out", f"{theirs}.mlp.down_proj")
            yield from common.llama_norms(ours, theirs)


FAMILY = Phi3()
