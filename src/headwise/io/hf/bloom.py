"""BLOOM (2022): ALiBi, a LayerNorm on the embeddings, GELU by its tanh formula, biases everywhere but in the head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headwise.attention.softmax import SoftmaxSpec
from headwise.ffn.mlp import MLPSpec
from headwise.io.hf import common, gpt_kin
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry, Family, module, same
from headwise.spec import ModelSpec


class Bloom(Family):
    """Its lengths have no limit; `seq_length`, where it stands, is that of training."""

    model_type = "bloom"
    architecture = "BloomForCausalLM"
    base = "transformer."

    def fields(self, config: Config) -> dict[str, Any]:
        config.only("apply_residual_connection_post_layernorm", False)
        config.only("n_inner", 4 * (d_model := config.size("n_embed", config.size("hidden_size", 64))))
        return {
            "preset": "bloom",
            "d_model": d_model,
            "n_layers": config.size("num_hidden_layers", config.size("n_layer", 2), most=common.MOST_LAYERS),
            "n_heads": config.size("num_attention_heads", config.size("n_head", 8)),
            "vocab_size": config.size("vocab_size"),
            "max_seq_len": config.size("seq_length", 2048),
            "norm": gpt_kin.layernorm(config),
            "tie_embeddings": config.get("tie_word_embeddings", bool, True),
        }

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        common.part(spec.attention, SoftmaxSpec, "attention")
        common.part(spec.ffn, MLPSpec, "ffn")
        return {
            "hidden_size": spec.d_model,
            "n_layer": spec.n_layers,
            "n_head": spec.n_heads,
            "vocab_size": spec.vocab_size,
            "seq_length": spec.max_seq_len,
            "layer_norm_epsilon": gpt_kin.written_eps(spec),
            "tie_word_embeddings": spec.tie_embeddings,
        }

    def entries(self, spec: ModelSpec) -> Iterator[Entry]:
        yield from same("embedding.weight", "transformer.word_embeddings.weight")
        yield from module("embedding_norm", "transformer.word_embeddings_layernorm")
        yield from module("stack.final_norm", "transformer.ln_f")
        yield from module("head", "lm_head")
        for n in range(spec.dims.n_layers):
            names = f"stack.blocks.{n}", f"transformer.h.{n}"
            yield from gpt_kin.layer(spec, *names, "self_attention", gpt_kin.NORMS)


FAMILY = Bloom()
