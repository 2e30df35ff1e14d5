"""The shape of a model's KV cache: how many layers, key/value heads and numbers a head (document 004).

Read from `num_key_value_heads` and `head_dim` where they are given, never from hidden_size/num_attention_heads alone:
with grouped queries a cache has fewer heads than the model. Keys and values have widths of their own (latent attention,
Wasserstein attention).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from headwise.attention import AttentionSpec
from headwise.errors import HeadwiseError, short
from headwise.model.base import LanguageModel
from headwise.spec import ModelSpec

# Hugging Face's names of a field, older models' among them.
_NAMES = {
    "n_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "n_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
}


@dataclass(frozen=True)
class KVShape:
    """A cache `[B,L,H,T,D]` of L `n_layers` and H `kv_heads`; D is `key_dim` for keys, `value_dim` for values.

    `n_heads` are the query heads. In place of keys and values it may be the shape of attention outputs, where each
    query head has its own.
    """

    n_layers: int
    n_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, source: Any, layers: Iterable[int] | None = None, match: Literal["kv", "output"] = "kv") -> KVShape:
        """The shape of what `capture` and `stack_past_kv` give.

        Args:
            source: a KVShape (as it is), a Headwise model or its spec, or a Hugging Face configuration, as an object or
                as the mapping in its config.json.
            layers: the layers that are meant; None: all. Only a Headwise model can have unlike ones.
            match: "kv" for keys and values, "output" for what attention makes before `wo`.

        Raises:
            HeadwiseError: layers of unlike shapes, a layer that keeps no keys and values, a configuration that does not
                say how wide its heads are, or something else altogether.
        """
        if isinstance(source, LanguageModel):
            source = source.spec
        if isinstance(source, ModelSpec):
            return _of_spec(source, layers, match)
        shape = source if isinstance(source, KVShape) else _of_config(source)
        if match == "output" and not isinstance(source, KVShape):
            shape = KVShape(shape.n_layers, shape.n_heads, shape.n_heads, shape.value_dim, shape.value_dim)
        if layers is None:
            return shape
        return KVShape(len(list(layers)), shape.n_heads, shape.kv_heads, shape.key_dim, shape.value_dim)


def _of_spec(spec: ModelSpec, layers: Iterable[int] | None, match: str) -> KVShape:
    dims = spec.dims
    chosen = list(range(dims.n_layers) if layers is None else layers)
    shapes: dict[tuple[int, int, int, int], list[int]] = {}
    for layer in chosen:
        attention = spec.attention.at(layer)
        if not isinstance(attention, AttentionSpec):
            raise HeadwiseError(f"layer {layer}: {attention.kind} does not say which heads it has; take another layer")
        H, _, D = attention.heads(dims)
        kv = attention.kv_shape(dims) if match == "kv" else (H, D, D)
        if kv is None:
            raise HeadwiseError(
                f"layer {layer}: {attention.kind} keeps a state and no keys and values; match its outputs instead, "
                "or choose layers that keep them"
            )
        shapes.setdefault((H, *kv), []).append(layer)
    if len(shapes) != 1:
        each = "; ".join(f"layers {_ranges(at)}: {_told(*shape)}" for shape, at in shapes.items()) or "no layer"
        raise HeadwiseError(f"one shape for all layers is wanted, but {each}; choose layers of one shape")
    (H, kv_heads, key_dim, value_dim) = next(iter(shapes))
    return KVShape(len(chosen), H, kv_heads, key_dim, value_dim)


def _told(n_heads: int, kv_heads: int, key_dim: int, value_dim: int) -> str:
    return f"{n_heads} heads, {kv_heads} of keys and values, {key_dim} and {value_dim} wide"


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as 0-2,5."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{first}-{last}" if first != last else str(first) for first, last in runs)


def _of_config(config: Any) -> KVShape:
    """Of Hugging Face's fields; a model of several parts (text and vision) has them in its text part."""
    text = getattr(config, "get_text_config", None)
    config = text() if callable(text) else config

    def value(name: str) -> Any:
        return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)

    def given(*names: str) -> int | None:
        numbers = (value(name) for name in names)
        return next((n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)

    n_layers, n_heads, hidden = (given(*_NAMES[name]) for name in ("n_layers", "n_heads", "hidden"))
    head_dim = given("head_dim") or (hidden and n_heads and hidden // n_heads)
    if n_layers is None or n_heads is None or not head_dim:
        raise HeadwiseError(
            f"{short(config)} does not say num_hidden_layers, num_attention_heads and head_dim (or hidden_size); give "
            "a Headwise model, its spec, a Hugging Face configuration, or a KVShape"
        )
    kv_heads = given("num_key_value_heads", "num_kv_heads") or n_heads
    if value("multi_query") and not value("new_decoder_architecture"):  # Falcon's way to say it
        kv_heads = 1
    key_dim = head_dim
    if nope := given("qk_nope_head_dim"):  # latent attention's, which is cached in its expanded form
        key_dim = nope + (given("qk_rope_head_dim") or 0)
    return KVShape(n_layers, n_heads, kv_heads, key_dim, given("v_head_dim") or head_dim)
