"""A model of transformers' as a GGUF file, made as llama.cpp's converter makes it (convert_hf_to_gguf.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    RopeScalingType,
    get_tensor_name_map,
    quantize,
)
from numpy.typing import NDArray

Type = GGMLQuantizationType


def convert(
    model: Any,
    path: Path,
    kind: Type = Type.F32,
    *,
    output: bool = False,
    more: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Write `model` to `path`, its matrices as numbers of `kind`; vectors are float32 always.

    `output` writes the head even where it is the embedding, as old converters did for GPT-2; `more` adds values.
    """
    config = model.config
    writer = GGUFWriter(path, config.model_type)
    (_gpt2 if config.model_type == "gpt2" else _llama_kin)(writer, config)
    architectures: dict[str, MODEL_ARCH] = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(architectures[config.model_type], config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings and not output:
            continue
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert there is not None, name
        data = _changed(name, parameter.detach().numpy(), config)
        used = kind if data.ndim > 1 else Type.F32
        writer.add_tensor(there, quantize(np.ascontiguousarray(data, np.float32), used), raw_dtype=used)
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _changed(name: str, data: NDArray[Any], config: Any) -> NDArray[Any]:
    if config.model_type == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return data.T
    if config.model_type == "llama" and ".q_proj." in name:
        return _permuted(data, config.num_attention_heads)
    if config.model_type == "llama" and ".k_proj." in name:
        return _permuted(data, config.num_key_value_heads)
    return data


def _permuted(data: NDArray[Any], n_heads: int) -> NDArray[Any]:
    """`LlamaModel.permute` of the converter."""
    return data.reshape(n_heads, 2, data.shape[0] // n_heads // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)


def _gpt2(writer: GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_ctx if hasattr(config, "n_ctx") else config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _llama_kin(writer: GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope: dict[str, Any] = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if getattr(config, "head_dim", None) is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config.model_type == "llama":
        writer.add_vocab_size(config.vocab_size)
    if config.model_type in ("llama", "phi3"):
        writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * head_dim))
    kind = rope.get("rope_type", "default")
    if config.model_type == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3(rope, head_dim))
    if kind == "longrope":
        trained = config.original_max_position_embeddings
        scale = config.max_position_embeddings / trained
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(trained)))
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))


def _llama3(rope: dict[str, Any], head_dim: int) -> NDArray[np.float32]:
    """The converter's loop over frequencies."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    trained, factors = rope["original_max_position_embeddings"], []
    for n in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (n / head_dim)
        if wavelength < trained / high:
            factors.append(1.0)
        elif wavelength > trained / low:
            factors.append(rope["factor"])
        else:
            smooth = (trained / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def add_byte_level(writer: GGUFWriter) -> None:
    """A byte-level tokenizer of 59 tokens, some of them merged from others."""
    tokens = ["<|endoftext|>", "<|im_start|>", *"abcdefghijklmnopqrstuvwxyzĠĊ.,!?0123456789ABCDEFGHI"]
    tokens += ["th", "the", "Ġthe", "an", "and", "<think>"]
    merges = ["t h", "th e", "Ġ the", "a n", "an d"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 3), 4])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")


def add_sentencepiece(writer: GGUFWriter) -> None:
    """SentencePiece's BPE of 61 tokens, with bytes for what is none of them."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(16))]
    tokens += [*"▁abcdefghijklmnopqrstuvwxyz.,!?012345", "th", "▁t", "the", "▁the", "an"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3, *[6] * 16, *[1] * (len(tokens) - 19)])
    writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
