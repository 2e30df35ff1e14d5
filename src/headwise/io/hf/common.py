"""What families share: RoPE and activations in their words and ours, and the layout of Llama and its kin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from headwise.attention import AttentionSpec
from headwise.attention.window import WindowSpec
from headwise.errors import FormatError, short
from headwise.ffn.glu import GLUSpec
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry, module, same
from headwise.position.rope import SCALINGS, RoPESpec
from headwise.registry import ComponentSpec
from headwise.spec import ModelSpec

P = TypeVar("P", bound=ComponentSpec)
MOST_LAYERS = 1024  # far more than any published model has

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
        "n_layers": config.size("num_hidden_layers", most=MOST_LAYERS),
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


def rope(
    config: Config,
    *,
    base: float = 10000.0,
    partial: float = 1.0,
    trained: int | None = None,
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """A RoPESpec's fields from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Args:
        config: the whole config.
        base, partial, trained: what an absent rope_theta, partial_rotary_factor and original_max_position_embeddings
            of the config stand for in this family.
        renamed: scalings that mean another one in this family.
    """
    found = config.section("rope_parameters") or config.section("rope_scaling") or Config({}, config.where)
    fields = {
        "kind": "rope",
        "base": found.get("rope_theta", float, config.get("rope_theta", float, base)),
        "partial_rotary_factor": found.get(
            "partial_rotary_factor", float, config.get("partial_rotary_factor", float, partial)
        ),
    }
    return {**fields, **scaling(found, config, trained, renamed)}


def scaling(
    found: Config, config: Config, trained: int | None = None, renamed: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """The `scaling` of a RoPESpec from one set of rope parameters; nothing where they ask for none."""
    kind = found.get("rope_type", str, found.get("type", str, "default"))
    kind = renamed.get(kind, kind)
    if kind == "default":
        return {}
    if kind not in SCALINGS or kind == "ntk":
        raise config.lack(f"the RoPE scaling {short(kind)}", "supported: linear, dynamic, yarn, llama3, longrope")
    known = SCALINGS[kind].model_fields
    values = {name: value for name, value in found.values.items() if name in known and value is not None}
    if "original_max_position_embeddings" in known:
        longest, name = config.size("max_position_embeddings"), "original_max_position_embeddings"
        # transformers stretches "dynamic" from the longest input that the config names, whatever else stands there.
        start = longest if kind == "dynamic" else config.size(name, trained) or found.size(name, longest)
        values |= {name: start, "factor": found.get("factor", float, longest / start)}
    return {"scaling": {**values, "kind": kind}}


def written_rope(spec: RoPESpec) -> dict[str, Any]:
    """`rope` taken back, in the words that old and new readers know: rope_theta and rope_scaling."""
    written: dict[str, Any] = {"rope_theta": spec.base}
    if spec.partial_rotary_factor != 1:
        written["partial_rotary_factor"] = spec.partial_rotary_factor
    if spec.scaling is not None:
        fields = spec.scaling.model_dump(mode="json", exclude_none=True)
        if (kind := fields.pop("kind")) == "dynamic":
            del fields["original_max_position_embeddings"]
        written["rope_scaling"] = {"rope_type": kind, **fields}
    return written


def heads(config: Config, *, kv_heads: int | None = None, head_dim: int | None = None) -> dict[str, Any]:
    """An attention's kv_heads and head_dim, left open where they follow from the model's widths.

    Args:
        config: the whole config.
        kv_heads, head_dim: what the absence of either stands for; None, and null, for what the widths say.
    """
    n_heads, d_model = config.size("num_attention_heads"), config.size("hidden_size")
    kv_heads = config.size("num_key_value_heads", None if "num_key_value_heads" in config.values else kv_heads)
    head_dim = config.size("head_dim", None if "head_dim" in config.values else head_dim)
    return {
        "kv_heads": None if kv_heads == n_heads else kv_heads,
        "head_dim": None if head_dim and head_dim * n_heads == d_model else head_dim,
    }


def first_attention(spec: ModelSpec) -> AttentionSpec:
    """The attention of the first layer, whose heads and biases the families give to all."""
    attention = spec.attention.at(0)
    if not isinstance(attention, AttentionSpec):
        raise FormatError(f"attention is {attention.kind}")
    return attention


def written_heads(spec: ModelSpec) -> dict[str, Any]:
    """`heads` taken back, both always named."""
    _, kv_heads, head_dim = first_attention(spec).heads(spec.dims)
    return {"num_key_value_heads": kv_heads, "head_dim": head_dim}


def sliding_layers(config: Config, rule: Callable[[int], bool]) -> list[bool]:
    """Which layers see a window only: as `layer_types` has it, else by the family's rule (layer → whether)."""
    n_layers = config.size("num_hidden_layers", most=MOST_LAYERS)
    kinds = config.get("layer_types", list, None)
    if kinds is None:
        return [rule(layer) for layer in range(n_layers)]
    if len(kinds) != n_layers or not all(kind in ("sliding_attention", "full_attention") for kind in kinds):
        allowed = f"sliding_attention or full_attention for each of {n_layers} layers"
        raise FormatError(f"{config.where}: 'layer_types' should be {allowed}, not {short(kinds)}")
    return [kind == "sliding_attention" for kind in kinds]


def in_turn(sliding: Sequence[bool], window: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """A component that is `window` in the sliding layers and `full` in the others, as the shortest pattern."""
    if window == full:
        return full
    flags = bytes(sliding)
    period = next(n for n in range(1, len(flags) + 1) if flags.startswith(flags[n:]))
    items = [window if flag else full for flag in flags[:period]]
    return items[0] if period == 1 else {"kind": "pattern", "items": items}


def windows(config: Config, sliding: Sequence[bool], fields: dict[str, Any]) -> dict[str, Any]:
    """Attention with these fields, inside the config's window where a layer is sliding."""
    window = {"kind": "window", "window": config.size("sliding_window"), **fields} if any(sliding) else {}
    return in_turn(sliding, window, {"kind": "softmax", **fields})


def written_windows(spec: ModelSpec) -> dict[str, Any]:
    """`windows` taken back: `sliding_window`, None for full attention everywhere, and `layer_types`.

    Raises:
        FormatError: an attention that is neither softmax nor a window, or windows of several widths.
    """
    widths, kinds = set(), []
    for layer in (spec.attention.at(n) for n in range(spec.dims.n_layers)):
        if isinstance(layer, WindowSpec):
            widths.add(layer.window)
        kinds.append("sliding_attention" if isinstance(layer, WindowSpec) else "full_attention")
    if len(widths) > 1:
        raise FormatError(f"its windows are of several widths: {sorted(widths)}")
    return {"sliding_window": next(iter(widths), None), "layer_types": kinds}


def gated(config: Config, name: str = "hidden_act", default: str | None = "silu") -> dict[str, Any]:
    """A gated feed-forward's fields; the config has its activation as `name`."""
    return {"kind": config.choice(name, GATED, default), "d_ff": config.size("intermediate_size")}


def gate_spec(spec: ModelSpec) -> GLUSpec:
    """The gated feed-forward that a line of these families has in every layer."""
    return part(spec.ffn, GLUSpec, "ffn")


def written_gated(spec: ModelSpec, name: str = "hidden_act") -> dict[str, Any]:
    """`gated` taken back."""
    ffn = gate_spec(spec)
    if ffn.kind not in WRITTEN_GATES:
        raise FormatError(f"ffn is {ffn.kind}")
    return {name: WRITTEN_GATES[ffn.kind], "intermediate_size": ffn.width(spec.dims)}


def llama_layer(ours: str, theirs: str) -> Iterator[Entry]:
    """Attention and gated feed-forward of a layer, as Llama names them."""
    for mine, name in {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}.items():
        yield from module(f"{ours}.attention.{mine}", f"{theirs}.self_attn.{name}")
    for name in ("q_norm", "k_norm"):
        yield from same(f"{ours}.attention.{name}.weight", f"{theirs}.self_attn.{name}.weight")
    for mine, name in {"w_gate": "gate_proj", "w_up": "up_proj", "w_out": "down_proj"}.items():
        yield from module(f"{ours}.ffn.{mine}", f"{theirs}.mlp.{name}")


def llama_norms(ours: str, theirs: str) -> Iterator[Entry]:
    """The two norms of a layer, before each part."""
    yield from module(f"{ours}.attention_norm", f"{theirs}.input_layernorm")
    yield from module(f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm")


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
        yield from llama_norms(ours, theirs)
