"""GPT-NeoX (Black et al. 2022) and Pythia: RoPE on part of each head, attention and feed-forward side by side, each
with its own norm, or one after the other."""

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


class GPTNeoX(Family):
    """Biases on the feed-forward always, on the attention's maps where the config asks for them."""

    model_type = "gpt_neox"
    architecture = "GPTNeoXForCausalLM"
    base = "gpt_neox."
    unused = re.compile(r"\.attention\.(masked_bias|bias|rotary_emb\.inv_freq)$")

    def fields(self, config: Config) -> dict[str, Any]:
        base, partial = config.get("rotary_emb_base", float, 10000.0), config.get("rotary_pct", float, 0.25)
        bias = config.get("attention_bias", bool, True)
        return {
            "preset": "gpt_neox",
            **common.widths(config),
            "attention": {"kind": "softmax", "bias": None if bias else False},
            "position": common.rope(config, base=base, partial=partial),
            "norm": gpt_kin.layernorm(config, "layer_norm_eps"),
            "ffn": gpt_kin.mlp(config, "hidden_act", "gelu", "intermediate_size", 24576),
            "order": "parallel_two_norms" if config.get("use_parallel_residual", bool, True) else "pre",
            "tie_embeddings": config.get("tie_word_embeddings", bool, False),
        }

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        attention = common.part(spec.attention, SoftmaxSpec, "attention")
        rope = common.written_rope(common.part(spec.position, RoPESpec, "position"))
        return {
            **common.written_widths(spec),
            **gpt_kin.written_mlp(spec, "hidden_act", "intermediate_size"),
            "attention_bias": attention.has_bias(spec.dims),
            "layer_norm_eps": gpt_kin.written_eps(spec),
            "rotary_emb_base": rope["rope_theta"],
            "rotary_pct": rope.get("partial_rotary_factor", 1.0),
            "rope_scaling": rope.get("rope_scaling"),
            "use_parallel_residual": spec.order == "parallel_two_norms",
        }

    def entries(self, spec: ModelSpec) -> Iterator[Entry]:
        yield from same("embedding.weight", "gpt_neox.embed_in.weight")
        yield from module("stack.final_norm", "gpt_neox.final_layer_norm")
        yield from module("head", "embed_out")
        for n in range(spec.dims.n_layers):
            names = f"stack.blocks.{n}", f"gpt_neox.layers.{n}"
            yield from gpt_kin.layer(spec, *names, "attention", gpt_kin.NORMS)


FAMILY = GPTNeoX()
