"""A line of one of llama.cpp's architectures as a GGUF file, tensor by tensor: the way back of `model.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType, quantize
from numpy.typing import NDArray

from headwise.attention.softmax import SoftmaxSpec
from headwise.errors import FormatError
from headwise.io.atomic import atomic_file
from headwise.io.gguf.config import ROPE_FREQS
from headwise.io.gguf.model import gguf_spec
from headwise.io.gguf.names import gguf_entries
from headwise.io.gguf.vocabulary import write_tokenizer
from headwise.io.hf.export import family_for, meaning
from headwise.io.hf.family import Family
from headwise.io.tensors import module_tensors
from headwise.position.rope import Llama3Scaling, RoPESpec
from headwise.spec import ModelSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from headwise.model.base import LanguageModel

Type = GGMLQuantizationType
# What matrices can be written as; vectors are float32 in every file.
TYPES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
OWN = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}
FILE_TYPES = {
    Type.F32: LlamaFileType.ALL_F32,
    Type.F16: LlamaFileType.MOSTLY_F16,
    Type.BF16: LlamaFileType.MOSTLY_BF16,
    Type.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")


def save_gguf(
    module: LanguageModel,
    path: Path,
    kind: str | None = None,
    tokenizer: tuple[Tokenizer, Mapping[str, Any], Sequence[int]] | None = None,
) -> str:
    """Write a model that llama.cpp and what stands on it read; what it was written as.

    Args:
        module: the model.
        path: the file, replaced where it exists.
        kind: one of TYPES for its matrices; None: the precision that the parameters have.
        tokenizer: the library's object, its tokenizer_config.json, and the ids that end a text. Without one llama.cpp
            loads the file, and takes ids only.

    Raises:
        FormatError: no architecture of llama.cpp computes what the line does, or it has no form for the tokenizer.
        WriteError: disk or permission.
    """
    spec, own = module.spec, module_tensors(module)
    family = _family(spec)
    chosen = TYPES[kind] if kind is not None else OWN.get(next(iter(own.values())).dtype, Type.F32)
    tensors = _tensors(family, spec, own)
    with atomic_file(path) as temporary:
        writer = GGUFWriter(temporary, family.model_type)
        writer.add_file_type(FILE_TYPES[chosen])
        writer.add_quantization_version(2)
        writer.add_vocab_size(spec.dims.vocab_size)
        _write_widths(writer, family, spec)
        if tokenizer is None:
            writer.add_tokenizer_model("none")
        else:
            write_tokenizer(writer, *tokenizer, spec.dims.vocab_size)
        kinds = {name: _kind(name, tensor, chosen) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            per_block, block_bytes = GGML_QUANT_SIZES[kinds[name]]
            n_bytes = tensor.numel() // per_block * block_bytes
            shape = (*tensor.shape[:-1], tensor.shape[-1] // per_block * block_bytes)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), n_bytes, kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            writer.write_tensor_data(_quantised(tensor, kinds[name]))
        writer.close()
        _check(temporary, spec)
    return f"GGUF, {family.model_type} in {chosen.name}"


def _family(spec: ModelSpec) -> Family:
    """The architecture that computes what a line does."""
    reasons: dict[str, str] = {}
    for name in dict.fromkeys([*({spec.preset} & {*ARCHITECTURES}), *ARCHITECTURES]):
        try:
            return family_for(spec, name)[0]
        except FormatError as error:
            reasons[name] = str(error)
    raise FormatError(
        f"no architecture that is written as GGUF ({', '.join(ARCHITECTURES)}) computes {spec}: "
        f"{next(iter(reasons.values()))}"
    )


def _tensors(family: Family, spec: ModelSpec, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for entry in gguf_entries(family, spec, own):
        tensors |= zip(entry.theirs, entry.way.write([own[name].detach().cpu() for name in entry.ours]))
    scaling = spec.position.scaling if isinstance(spec.position, RoPESpec) else None
    if isinstance(scaling, Llama3Scaling):
        base, rotary_dim = spec.position.base, spec.attention.rotary_dim(spec.dims)
        theta = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
        tensors[ROPE_FREQS] = (theta / scaling.frequencies(theta, base, rotary_dim, 1)).float()
    return tensors


def _kind(name: str, tensor: Tensor, chosen: Type) -> Type:
    """What one tensor is written as: vectors and position tables in float32, rows that no block fits in half."""
    if tensor.dim() == 1 or name.startswith("position_embd"):
        return Type.F32
    return Type.F16 if tensor.shape[-1] % GGML_QUANT_SIZES[chosen][0] else chosen


def _quantised(tensor: Tensor, kind: Type) -> NDArray[Any]:
    return quantize(np.ascontiguousarray(tensor.float().numpy()), kind).view(np.uint8)


def _write_widths(writer: GGUFWriter, family: Family, spec: ModelSpec) -> None:
    dims = spec.dims
    writer.add_block_count(dims.n_layers)
    writer.add_context_length(dims.max_seq_len)
    writer.add_embedding_length(dims.d_model)
    writer.add_feed_forward_length(spec.ffn.at(0).width(dims))
    writer.add_head_count(dims.n_heads)
    eps: float = spec.norm.at(0).eps
    if family.model_type == "gpt2":
        writer.add_layer_norm_eps(eps)
        return
    writer.add_layer_norm_rms_eps(eps)
    attention, position = spec.attention.at(0), spec.position.at(0)
    assert isinstance(attention, SoftmaxSpec)
    assert isinstance(position, RoPESpec)
    _, kv_heads, head_dim = attention.heads(dims)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(position.rotary_dim(head_dim))
    writer.add_rope_freq_base(position.base)
    if (scaling := position.scaling) is None:
        return
    if scaling.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling.factor)
    if trained := getattr(scaling, "original_max_position_embeddings", None):
        writer.add_rope_scaling_orig_ctx_len(trained)


def _check(path: Path, spec: ModelSpec) -> None:
    """Refuse a file that does not say what the line does: what GGUF has no values for, or we none that it reads."""
    said, meant = meaning(gguf_spec(path)), meaning(spec)
    if differing := [name for name in meant if said[name] != meant[name]]:
        raise FormatError(f"GGUF cannot say it all of {spec}: {', '.join(differing)} would be lost")
