"""What GPT-NeoX, GPT-J, Falcon and BLOOM have in common: LayerNorms and a plain feed-forward, queries, keys and values
fused head by head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from headwise.ffn.mlp import MLPSpec
from headwise.io.hf import common
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry, Grouped, module
from headwise.norm.layernorm import LayerNormSpec
from headwise.spec import ModelSpec

NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def layernorm(config: Config, name: str = "layer_norm_epsilon") -> dict[str, Any]:
    """The norm's fields; the config has its epsilon as `name`."""
    return {"kind": "layernorm", "eps": config.get(name, float, 1e-5)}


def written_eps(spec: ModelSpec) -> float:
    """The epsilon of the line's LayerNorms."""
    return common.part(spec.norm, LayerNormSpec, "norm").eps


def mlp(config: Config, activation: str, default: str, width: str, d_ff: int | None = None) -> dict[str, Any]:
    """The feed-forward's fields; the config has its activation and its hidden width under these names.

    Args:
        config: the whole config.
        activation, default: the activation's name, and what its absence stands for.
        width, d_ff: the hidden width's name, and what its absence stands for; None: 4·d_model.
    """
    return {
        "kind": "mlp",
        "activation": config.choice(activation, common.ACTIVATIONS, default),
        "d_ff": config.size(width, d_ff),
    }


def written_mlp(spec: ModelSpec, activation: str, width: str) -> dict[str, Any]:
    """`mlp` taken back."""
    ffn = common.part(spec.ffn, MLPSpec, "ffn")
    written = {"gelu_tanh": "gelu_new"}.get(ffn.activation, common.WRITTEN[ffn.activation])
    return {activation: written, width: ffn.width(spec.dims)}


def share(turned: int, head_dim: int) -> float:
    """The partial_rotary_factor with which `turned` of a head's dimensions turn."""
    factor = turned / head_dim
    return factor if int(head_dim * factor) == turned else math.nextafter(factor, math.inf)


def fused(spec: ModelSpec) -> Grouped:
    """Queries, keys and values, one key head after another: its queries, its key, its value."""
    n_heads, kv_heads, head_dim = common.first_attention(spec).heads(spec.dims)
    return Grouped(kv_heads, (n_heads // kv_heads * head_dim, head_dim, head_dim))


def layer(spec: ModelSpec, ours: str, theirs: str, attention: str, norms: dict[str, str]) -> Iterator[Entry]:
    """A layer's maps and norms; `attention` is what theirs is called, `norms` the norms as ours → theirs."""
    maps = [f"{ours}.attention.{name}" for name in ("wq", "wk", "wv")]
    yield from module(maps, f"{theirs}.{attention}.query_key_value", fused(spec))
    yield from module(f"{ours}.attention.wo", f"{theirs}.{attention}.dense")
    yield from module(f"{ours}.ffn.w_in", f"{theirs}.mlp.dense_h_to_4h")
    yield from module(f"{ours}.ffn.w_out", f"{theirs}.mlp.dense_4h_to_h")
    for mine, name in norms.items():
        yield from module(f"{ours}.{mine}", f"{theirs}.{name}")
