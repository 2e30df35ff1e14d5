"""A line of a known family, written as the folder that transformers and what reads its folders take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.attention import AttentionSpec
from headwise.attention.mla import MLASpec
from headwise.errors import FormatError
from headwise.ffn.base import FFNSpec
from headwise.ffn.moe import MoESpec
from headwise.io.atomic import atomic_dir, write_json
from headwise.io.hf import families, family_of
from headwise.io.hf.config import Config
from headwise.io.hf.family import Family
from headwise.io.hf.folder import CONFIG, WEIGHTS, as_spec, used_entries
from headwise.io.tensors import module_tensors, write_tensors
from headwise.registry import ComponentSpec
from headwise.spec import ModelSpec
from headwise.spec.grammar import print_value

if TYPE_CHECKING:
    from torch import Tensor

    from headwise.model.base import LanguageModel

# Fields of a spec that change nothing a trained model computes, or are worked into the components' own.
IDLE = {"preset", "size", "init", "init_std", "dropout", "n_encoder_layers", "bias"}
# Named even where there is none: what their absence stands for differs by class, and may lie outside the vocabulary.
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
COMPONENTS = ("attention", "position", "norm", "ffn")


def save_hf(
    module: LanguageModel,
    folder: Path,
    special_ids: Mapping[str, Any] | None = None,
    model_type: str | None = None,
) -> str:
    """Write config.json, generation_config.json and model.safetensors; the class of transformers that they are for.

    Args:
        module: the model; its parameters are stored in the dtype they have, bit for bit.
        folder: made, or replaced where it holds such a folder already.
        special_ids: `eos_token_id`, `bos_token_id`, `pad_token_id`, as far as the tokenizer has them.
        model_type: the family to write it as; None: that of the line's preset, else Llama's, else any that fits.

    Raises:
        FormatError: no family, or not the one asked for, computes what this line does.
        WriteError: disk or permission.
    """
    family, config = family_for(module.spec, model_type)
    own = module_tensors(module)
    tensors = written(family, module.spec, own)
    ids = dict(special_ids or {})
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = {"architectures": [family.architecture], "model_type": family.model_type, **config}
    with atomic_dir(folder) as temporary:
        write_json(temporary / CONFIG, {**config, "torch_dtype": dtype, **dict.fromkeys(IDS), **ids})
        write_json(temporary / "generation_config.json", ids)
        write_tensors(temporary / WEIGHTS, tensors, {"format": "pt"})
    return family.architecture


def written(family: Family, spec: ModelSpec, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's parameters as the family's tensors."""
    tensors: dict[str, Tensor] = {}
    for entry in used_entries(family, spec, own):
        tensors |= zip(entry.theirs, entry.way.write([own[name] for name in entry.ours]))
    return tensors


def family_for(spec: ModelSpec, model_type: str | None = None) -> tuple[Family, dict[str, Any]]:
    """A family that computes what a line does, and its config.

    Raises:
        FormatError: there is none, or it is not `model_type`.
    """
    if model_type is not None:
        asked = family_of(model_type, "export")
        return asked, _config(asked, spec)
    known = families()
    reasons: dict[str, str] = {}
    for name in dict.fromkeys([*({spec.preset} & {*known}), "llama", *known]):
        try:
            return known[name], _config(known[name], spec)
        except FormatError as error:
            reasons[name] = str(error)
    raise FormatError(f"no family of Hugging Face models computes {spec}: {next(iter(reasons.values()))}")


def _config(family: Family, spec: ModelSpec) -> dict[str, Any]:
    """The family's config of a line, read back to see that it says the same line."""
    try:
        if spec.architecture != "decoder":
            raise FormatError(f"it is an {spec.architecture}")
        config = family.config(spec)
        again = as_spec(family, Config(config, CONFIG))
        if differing := [name for name, value in meaning(spec).items() if meaning(again)[name] != value]:
            written = ((name, *(print_value(getattr(each, name)) for each in (spec, again))) for name in differing)
            raise FormatError("; ".join(f"{name} {here}, not {there}" for name, here, there in written))
    except FormatError as error:
        raise FormatError(f"{family.architecture} cannot hold it: {error}") from None
    return config


def meaning(spec: ModelSpec) -> dict[str, Any]:
    """A spec as what it computes: open fields filled in, patterns written out, layer by layer."""
    found = {name: value for name, value in dict(spec).items() if name not in IDLE}
    for name in COMPONENTS:
        found[name] = [_meaning(getattr(spec, name).at(n), spec) for n in range(spec.dims.n_layers)]
    return found


def _meaning(component: ComponentSpec, spec: ModelSpec) -> dict[str, Any]:
    fields, dims = component.model_dump(exclude={"dropout", "aux_loss_coef", "z_loss_coef"}), spec.dims
    if isinstance(component, AttentionSpec):
        _, fields["kv_heads"], fields["head_dim"] = component.heads(dims)
        fields["out_bias"], fields["scale"] = component.has_out_bias(dims), component.scale_in_force(dims)
    if isinstance(component, MLASpec):
        widths = component.latent_dim(dims), component.nope_dim(dims), component.rotary_dim(dims), fields["head_dim"]
        fields |= zip(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), widths)
    if isinstance(component, MoESpec):
        fields["shared_d_ff"] = component.shared_width(dims)
    if isinstance(component, AttentionSpec | FFNSpec):
        fields["bias"] = component.has_bias(dims)
    if isinstance(component, FFNSpec):
        fields["d_ff"] = component.width(dims)
    return fields
