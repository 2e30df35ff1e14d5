"""GPT-J (Wang and Komatsuzaki 2021): interleaved RoPE on the first `rotary_dim` dimensions of each head, attention and
feed-forward side by side from one norm, a head with a bias."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from headwise.attention.softmax import SoftmaxSpec
from headwise.io.hf import common, gpt_kin
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry, Family, module, same
from headwise.position.rope import RoPESpec
from headwise.spec import ModelSpec

ATTENTION = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "out_proj"}


class GPTJ(Family):
    """Biases on the feed-forward and the head, none on the attention's maps."""

    model_type = "gptj"
    architecture = "GPTJForCausalLM"
    base = "transformer."
    unused = re.compile(r"\.attn\.(masked_)?bias$")

    def fields(self, config: Config) -> dict[str, Any]:
        d_model, n_heads = config.size("n_embd"), config.size("n_head")
        head_dim = max(1, d_model // n_heads)
        if "rotary_dim" in config.values and "rotary_dim" not in config:
            raise config.lack("rotary_dim=null", "name how many dimensions of a head turn")
        turned = config.size("rotary_dim", 64, most=head_dim)
        return {
            "preset": "gptj",
            "d_model": d_model,
            "n_layers": config.size("n_layer", most=common.MOST_LAYERS),
            "n_heads": n_heads,
            "vocab_size": config.size("vocab_size"),
            "max_seq_len": config.size("n_positions"),
            "position": {
                "kind": "rope",
                "pairing": "interleaved",
                "partial_rotary_factor": gpt_kin.share(turned, head_dim),
            },
            "norm": gpt_kin.layernorm(config),
            "ffn": gpt_kin.mlp(config, "activation_function", "gelu_new", "n_inner"),
            "tie_embeddings": config.get("tie_word_embeddings", bool, False),
        }

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        common.part(spec.attention, SoftmaxSpec, "attention")
        return {
            "n_embd": spec.d_model,
            "n_layer": spec.n_layers,
            "n_head": spec.n_heads,
            "vocab_size": spec.vocab_size,
            "n_positions": spec.max_seq_len,
            "rotary_dim": common.part(spec.position, RoPESpec, "position").rotary_dim(spec.dims.head_dim),
            "layer_norm_epsilon": gpt_kin.written_eps(spec),
            **gpt_kin.written_mlp(spec, "activation_function", "n_inner"),
            "tie_word_embeddings": spec.tie_embeddings,
        }

    def entries(self, spec: ModelSpec) -> Iterator[Entry]:
        yield from same("embedding.weight", "transformer.wte.weight")
        yield from module("stack.final_norm", "transformer.ln_f")
        yield from module("head", "lm_head")
        for n in range(spec.dims.n_layers):
            ours, theirs = f"stack.blocks.{n}", f"transformer.h.{n}"
            yield from module(f"{ours}.attention_norm", f"{theirs}.ln_1")
            for mine, name in ATTENTION.items():
                yield from module(f"{ours}.attention.{mine}", f"{theirs}.attn.{name}")
            yield from module(f"{ours}.ffn.w_in", f"{theirs}.mlp.fc_in")
            yield from module(f"{ours}.ffn.w_out", f"{theirs}.mlp.fc_out")


FAMILY = GPTJ()
