"""GPT-2 (Radford et al. 2019). Its maps are stored as [in, out], queries, keys and values side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from headwise.attention.softmax import SoftmaxSpec
from headwise.ffn.mlp import MLPSpec
from headwise.io.hf import common
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry, Family, Rows, Then, Transposed, module, same
from headwise.norm.layernorm import LayerNormSpec
from headwise.spec import ModelSpec

CONV1D = Transposed()


class GPT2(Family):
    """Learned positions, LayerNorm before each part, biases everywhere but in the head."""

    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    base = "transformer."
    unused = re.compile(r"\.attn\.(masked_)?bias$")

    def fields(self, config: Config) -> dict[str, Any]:
        config.only("scale_attn_weights", True)
        config.only("scale_attn_by_inverse_layer_idx", False)
        config.only("add_cross_attention", False)
        d_model = config.size("n_embd")
        return {
            "preset": "gpt2",
            "d_model": d_model,
            "n_layers": config.size("n_layer", most=common.MOST_LAYERS),
            "n_heads": config.size("n_head"),
            "vocab_size": config.size("vocab_size"),
            "max_seq_len": config.size("n_positions"),
            "norm": {"kind": "layernorm", "eps": config.get("layer_norm_epsilon", float, 1e-5)},
            "ffn": {
                "kind": "mlp",
                "activation": config.choice("activation_function", common.ACTIVATIONS, "gelu_new"),
                "d_ff": config.size("n_inner", 4 * d_model),
            },
            "tie_embeddings": config.get("tie_word_embeddings", bool, True),
        }

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        common.part(spec.attention, SoftmaxSpec, "attention")
        ffn = common.part(spec.ffn, MLPSpec, "ffn")
        return {
            "n_embd": spec.d_model,
            "n_layer": spec.n_layers,
            "n_head": spec.n_heads,
            "n_inner": ffn.width(spec.dims),
            "vocab_size": spec.vocab_size,
            "n_positions": spec.max_seq_len,
            "layer_norm_epsilon": common.part(spec.norm, LayerNormSpec, "norm").eps,
            "activation_function": {"gelu_tanh": "gelu_new"}.get(ffn.activation, common.WRITTEN[ffn.activation]),
            "tie_word_embeddings": spec.tie_embeddings,
        }

    def entries(self, spec: ModelSpec) -> Iterator[Entry]:
        yield from same("embedding.weight", "transformer.wte.weight")
        yield from same("stack.positions.0.table.weight", "transformer.wpe.weight")
        yield from module("stack.final_norm", "transformer.ln_f")
        yield from module("head", "lm_head")
        fused = Then(CONV1D, Rows((spec.dims.d_model,) * 3))
        for n in range(spec.dims.n_layers):
            ours, theirs = f"stack.blocks.{n}", f"transformer.h.{n}"
            yield from module(f"{ours}.attention_norm", f"{theirs}.ln_1")
            yield from module(f"{ours}.ffn_norm", f"{theirs}.ln_2")
            yield from module([f"{ours}.attention.{w}" for w in ("wq", "wk", "wv")], f"{theirs}.attn.c_attn", fused)
            yield from module(f"{ours}.attention.wo", f"{theirs}.attn.c_proj", CONV1D)
            yield from module(f"{ours}.ffn.w_in", f"{theirs}.mlp.c_fc", CONV1D)
            yield from module(f"{ours}.ffn.w_out", f"{theirs}.mlp.c_proj", CONV1D)


FAMILY = GPT2()
