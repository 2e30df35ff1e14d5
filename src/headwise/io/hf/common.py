"""What families share: RoPE and activations in their words and ours, and the layout of Llama and its kin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from headwise.attention import AttentionSpec
from headwise.errors import FormatError
from headwise.ffn.glu import GLUSpec
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry, module, same
from headwise.position.rope import SCALINGS, RoPESpec
from headwise.registry import ComponentSpec
from headwise.spec import ModelSpec

P = TypeVar("P", bound=ComponentSpec)

# transformers' activations → ours.
ACTIVATIONS = {
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
GATES = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
GATED = {name: GATES[ours] for name, ours in ACTIVATIONS.items() if ours in GATES}
# Ours → the one of theirs that is written.
WRITTEN = {"relu": "relu", "relu2": "relu2", "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
WRITTEN_GATES = {gate: WRITTEN[name] for name, gate in GATES.items()}


def part(component: ComponentSpec, kind: type[P], what: str) -> P:
    """The component, which must be of the class `kind` for a family to hold it.

    Raises:
        FormatError: it is another one.
    """
    if type(component) is not kind:
        raise FormatError(f"{what} is {component.kind}")
    return component


def widths(config: Config) -> dict[str, Any]:
    """The fields every family has, by the names most use."""
    return {
        "d_model": config.size("hidden_size"),
        "n_layers": config.size("num_hidden_layers"),
        "n_heads": config.size("num_attention_heads"),
        "vocab_size": config.size("vocab_size"),
        "max_seq_len": config.size("max_position_embeddings"),
    }


def written_widths(spec: ModelSpec) -> dict[str, Any]:
    """`widths` taken back."""
    return {
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_seq_len,
        "tie_word_embeddings": spec.tie_embeddings,
    }


def rope(config: Config, *, base: float = 10000.0, partial: float = 1.0) -> dict[str, Any]:
    """A RoPESpec's fields from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Args:
        config: the whole config.
        base, partial: the family's own defaults of rope_theta and partial_rotary_factor.
    """
    found = config.section("rope_parameters") or config.section("rope_scaling") or Config({}, config.where)
    return rope_fields(
        found, config,
        base=found.get("rope_theta", float, config.get("rope_theta", float, base)),
        partial=found.get("partial_rotary_factor", float, config.get("partial_rotary_factor", float, partial)),
    )  # fmt: skip


def rope_fields(found: Config, config: Config, *, base: float, partial: float) -> dict[str, Any]:
    """A RoPESpec's fields from one set of rope parameters."""
    fields: dict[str, Any] = {"kind": "rope", "base": base, "partial_rotary_factor": partial}
    kind = found.get("rope_type", str, found.get("type", str, "default"))
    if kind in ("default", "mrope"):
        return fields
    if kind not in SCALINGS or kind == "ntk":
        raise config.lack(f"the RoPE scaling {kind!r}", "supported: linear, dynamic, yarn, llama3, longrope")
    known = SCALINGS[kind].model_fields
    scaling = {name: value for name, value in found.values.items() if name in known and value is not None}
    if "original_max_position_embeddings" in known:
        longest = config.size("max_position_embeddings")
        trained = config.size("original_max_position_embeddings", None)
        # transformers stretches "dynamic" from the config's length, whatever else is written there.
        trained = longest if kind == "dynamic" else trained or found.size("original_max_position_embeddings", longest)
        scaling["original_max_position_embeddings"] = trained
        if kind in ("yarn", "longrope"):
            scaling.setdefault("factor", longest / trained)
    return {**fields, "scaling": {**scaling, "kind": kind}}


def written_rope(spec: RoPESpec) -> dict[str, Any]:
    """`rope` taken back, in the words that old and new readers know: rope_theta and rope_scaling."""
    written: dict[str, Any] = {"rope_theta": spec.base}
    if spec.partial_rotary_factor != 1:
        written["partial_rotary_factor"] = spec.partial_rotary_factor
    if spec.scaling is not None:
        fields = spec.scaling.model_dump(mode="json", exclude_none=True)
        written["rope_scaling"] = {"rope_type": fields.pop("kind"), **fields}
    return written


def rmsnorm(config: Config, default: float = 1e-6) -> dict[str, Any]:
    """An RMSNormSpec's fields."""
    return {"kind": "rmsnorm", "eps": config.get("rms_norm_eps", float, default)}


def heads(config: Config) -> dict[str, Any]:
    """An attention's kv_heads and head_dim, left open where they follow from the model's widths."""
    n_heads, d_model = config.size("num_attention_heads"), config.size("hidden_size")
    kv_heads, head_dim = config.size("num_key_value_heads", n_heads), config.size("head_dim", None)
    return {
        "kv_heads": None if kv_heads == n_heads else kv_heads,
        "head_dim": None if head_dim and head_dim * n_heads == d_model else head_dim,
    }


def written_heads(attention: AttentionSpec, spec: ModelSpec) -> dict[str, Any]:
    """`heads` taken back, both always named."""
    _, kv_heads, head_dim = attention.heads(spec.dims)
    return {"num_key_value_heads": kv_heads, "head_dim": head_dim}


def gated(config: Config, default: str | None = "silu", name: str = "hidden_act") -> dict[str, Any]:
    """A gated feed-forward's fields."""
    return {"kind": config.choice(name, GATED, default), "d_ff": config.size("intermediate_size")}


def written_gated(spec: ModelSpec) -> dict[str, Any]:
    """`gated` taken back."""
    ffn = part(spec.ffn, GLUSpec, "ffn")
    if ffn.kind not in WRITTEN_GATES:
        raise FormatError(f"ffn is {ffn.kind}")
    return {"hidden_act": WRITTEN_GATES[ffn.kind], "intermediate_size": ffn.width(spec.dims)}


def llama_layer(ours: str, theirs: str) -> Iterator[Entry]:
    """Attention and gated feed-forward of a layer, as Llama names them; norms are each family's own."""
    for mine, name in {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}.items():
        yield from module(f"{ours}.attention.{mine}", f"{theirs}.self_attn.{name}")
    for name in ("q_norm", "k_norm"):
        yield from same(f"{ours}.attention.{name}.weight", f"{theirs}.self_attn.{name}.weight")
    for mine, name in {"w_gate": "gate_proj", "w_up": "up_proj", "w_out": "down_proj"}.items():
        yield from module(f"{ours}.ffn.{mine}", f"{theirs}.mlp.{name}")


def llama_ends() -> Iterator[Entry]:
    """Embedding, final norm and head, as Llama names them."""
    yield from same("embedding.weight", "model.embed_tokens.weight")
    yield from module("stack.final_norm", "model.norm")
    yield from module("head", "lm_head")


def llama_entries(spec: ModelSpec) -> Iterator[Entry]:
    """A whole model in Llama's layout."""
    yield from llama_ends()
    for n in range(spec.dims.n_layers):
        ours, theirs = f"stack.blocks.{n}", f"model.layers.{n}"
        yield from llama_layer(ours, theirs)
        yield from module(f"{ours}.attention_norm", f"{theirs}.input_layernorm")
        yield from module(f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm")
