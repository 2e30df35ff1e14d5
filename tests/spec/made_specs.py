"""Random specs, drawn from what the registry holds: a new mechanism is among them without a word here."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from headwise.errors import SpecError
from headwise.registry import FAMILIES, ComponentSpec, Pattern, validated
from headwise.spec import ModelSpec, list_presets
from headwise.spec.model import model_spec
from headwise.spec.presets import PRESETS

# For properties of random specs: many draws fit no architecture and are passed over.
LOOSE = settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])

# Values for models that are to be built: small, and mostly fitting one another.
SMALL: dict[str, list[Any]] = {
    "kv_heads": [None, 1, 2],
    "head_dim": [None, 8, 16],
    "d_ff": [None, 1, 24, 40],
    "window": [1, 3, 7, 100],
    "rank": [1, 2, 3, 4],
    "r_hidden": [None, 5],
    "s_normals": [0, 1, 2],
    "n_experts": [1, 4],
    "top_k": [1, 2],
    "n_shared_experts": [0, 2],
    "shared_d_ff": [None, 11],
    "n_groups": [1, 2],
    "topk_groups": [1, 2],
    "feature_dim": [None, 4, 10],
    "gate_rank": [1, 5],
    "mu_dim": [None, 4, 6],
    "sigma_dim": [None, 4, 5, "head_dim"],
    "kv_lora_rank": [None, 5],
    "q_lora_rank": [None, 6],
    "qk_nope_head_dim": [None, 7],
    "qk_rope_head_dim": [None, 4],
    "v_head_dim": [None, 20],
    "partial_rotary_factor": [1.0, 0.5],
    "factor": [1.0, 2.0, 4.5],
    "original_max_position_embeddings": [4, 16, 64],
}


def values(name: str, annotation: Any, metadata: list[Any], small: bool) -> st.SearchStrategy[Any]:
    """Values that a pydantic field of this type and these bounds takes."""
    if small and name in SMALL:
        return st.sampled_from(SMALL[name])
    origin = get_origin(annotation)
    if origin is Literal:
        return st.sampled_from(get_args(annotation))
    if origin is Annotated:
        inner, info = get_args(annotation)
        return values(name, inner, info.metadata, small)
    if origin is tuple:
        return st.lists(values(name, get_args(annotation)[0], [], small), min_size=1, max_size=4).map(tuple)
    if origin in (Union, types.UnionType):
        return st.one_of(*(values(name, part, metadata, small) for part in get_args(annotation)))
    if annotation is type(None):
        return st.none()
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return fields_of(annotation, small).map(lambda fields: validated_or_skip(annotation, fields))
    if annotation is bool:
        return st.booleans()
    low = next((m.gt if isinstance(m, annotated_types.Gt) else m.ge for m in metadata if _is_low(m)), -1000)
    high = next((m.lt if isinstance(m, annotated_types.Lt) else m.le for m in metadata if _is_high(m)), low + 100_000)
    open_low = any(isinstance(m, annotated_types.Gt) for m in metadata)
    open_high = any(isinstance(m, annotated_types.Lt) for m in metadata)
    if annotation is int:
        return st.integers(low + open_low, high - open_high)
    if annotation is float:
        return st.floats(low, high, exclude_min=open_low, exclude_max=open_high, allow_nan=False)
    if annotation is str:
        return st.text(max_size=8)
    raise TypeError(f"no random values for {name}: {annotation}; add them to made_specs.py")


def _is_low(m: Any) -> bool:
    return isinstance(m, annotated_types.Gt | annotated_types.Ge)


def _is_high(m: Any) -> bool:
    return isinstance(m, annotated_types.Lt | annotated_types.Le)


def validated_or_skip(model: type[BaseModel], fields: dict[str, Any]) -> Any:
    try:
        return validated(model, fields)
    except SpecError:
        return assume(False)


def fields_of(model: type[BaseModel], small: bool = False) -> st.SearchStrategy[dict[str, Any]]:
    """Some of a model's fields (all that it requires), with random values."""

    def field(name: str, info: FieldInfo) -> st.SearchStrategy[Any]:
        return values(name, info.annotation, info.metadata, small)

    infos = {name: info for name, info in model.model_fields.items() if name != "kind"}
    required = {name: field(name, info) for name, info in infos.items() if info.is_required()}
    optional = {name: field(name, info) for name, info in infos.items() if not info.is_required()}
    return st.fixed_dictionaries(required, optional=optional)


@st.composite
def components(draw: st.DrawFn, family: str, *, small: bool = False, kinds: list[str] | None = None) -> ComponentSpec:
    """A component of one family, of any kind registered, in a pattern now and then."""
    registry = FAMILIES[family]

    def one() -> ComponentSpec:
        kind = draw(st.sampled_from(kinds or registry.list()))
        return validated_or_skip(
            registry.get(kind).spec, {**draw(fields_of(registry.get(kind).spec, small)), "kind": kind}
        )

    if draw(st.integers(0, 4)):
        return one()
    items = tuple(one() for _ in range(draw(st.integers(1, 3))))
    assume(not any(getattr(item, "embeds", False) for item in items))
    return Pattern(items=items)


@st.composite
def specs(draw: st.DrawFn, *, small: bool = False) -> ModelSpec:
    """A model: any preset, with any of its fields replaced. `small` ones have few weights and every width given."""
    preset = draw(st.sampled_from(list_presets()))
    fields: dict[str, Any] = {"preset": preset}
    own = {name: i for name, i in ModelSpec.model_fields.items() if name not in ("preset", "size", *FAMILIES)}
    widths = {"d_model": [16, 24, 48], "n_layers": [1, 2, 3], "n_heads": [2, 4, 6], "n_encoder_layers": [1, 2, 3]}
    widths |= {"vocab_size": [1, 11, 40], "max_seq_len": [1, 8, 33]}
    if small:
        fields |= {name: draw(st.sampled_from(options)) for name, options in widths.items()}
        own = {name: info for name, info in own.items() if name not in widths}
    elif draw(st.booleans()):
        fields["size"] = draw(st.sampled_from([None, *PRESETS[preset].sizes]))
    for name, info in own.items():
        if not draw(st.integers(0, 2)):
            fields[name] = draw(values(name, info.annotation, info.metadata, small))
    for family in FAMILIES:
        if draw(st.booleans()):
            fields[family] = draw(components(family, small=small))
    try:
        return model_spec(fields)
    except SpecError:
        return assume(False)
