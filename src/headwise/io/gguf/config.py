"""What a GGUF file says of its model, as the config.json that the same model has on the Hub: the families of `io/hf`
then read both, and a model has one line wherever it comes from.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headwise.errors import short
from headwise.io.gguf.header import Header
from headwise.io.hf.config import Config
from headwise.position.rope import Llama3Scaling

# general.architecture; the families of the same name read the rest.
ARCHITECTURES = ("gpt2", "llama", "phi3", "qwen2", "qwen3")
WIDTHS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "intermediate_size": "feed_forward_length",
}
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}
# What some files of these architectures ask for, under the architecture's name, and none of the families computes.
LACKING = (
    "expert_count", "logit_scale", "embedding_scale", "residual_scale", "attention.scale", "attention.clamp_kqv",
    "attention.max_alibi_bias", "attn_logit_softcapping", "final_logit_softcapping", "use_parallel_residual",
)  # fmt: skip
# Tensors that are no weights: they belong to the position code.
ROPE_FREQS, ROPE_LONG, ROPE_SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)
# What llama.cpp's converter takes for the context that Llama 3's frequencies were trained at; files do not say it.
LLAMA3_CONTEXT = 8192


def hf_config(header: Header) -> Config:
    """The config.json of the file's model.

    Raises:
        FormatError: the architecture is another, a value is missing or of the wrong type, or asks for what we lack.
    """
    values = Config(header.values, str(header.path))
    name = values.choice("general.architecture", {name: name for name in ARCHITECTURES})
    for lacking in LACKING:
        given = header.values.get(f"{name}.{lacking}", 0)
        if not isinstance(given, int | float) or given != 0:
            raise values.lack(f"{name}.{lacking}={short(given)}", "it is not supported")
    if (embedding := header.tensors.get("token_embd.weight")) is None:
        raise values.lack("a model without token_embd.weight", "the token embedding is needed")
    config = {theirs: values.size(f"{name}.{ours}") for theirs, ours in WIDTHS.items()}
    config |= {"vocab_size": embedding.shape[0], "tie_word_embeddings": "output.weight" not in header.tensors}
    if name == "gpt2":
        config |= {"layer_norm_epsilon": decimal(values.get("gpt2.attention.layer_norm_epsilon", float))}
        return Config(
            {GPT2_NAMES.get(key, key): value for key, value in config.items()} | {"model_type": name}, values.where
        )
    head_dim = values.size(f"{name}.attention.key_length", config["hidden_size"] // config["num_attention_heads"])
    if (width := values.size(f"{name}.attention.value_length", head_dim)) != head_dim:
        raise values.lack(f"values {width} wide beside keys {head_dim} wide", "one width for both is supported")
    config |= {
        "model_type": name,
        "head_dim": head_dim,
        "num_key_value_heads": values.size(f"{name}.attention.head_count_kv", config["num_attention_heads"]),
        "rms_norm_eps": decimal(values.get(f"{name}.attention.layer_norm_rms_epsilon", float)),
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "sliding_window": values.get(f"{name}.attention.sliding_window", int, 0) or None,
        **_rope(header, values, name, head_dim),
    }
    return Config(config, values.where)


def decimal(value: float) -> float:
    """The shortest decimal that gives the same float32: what was meant by a number that a file keeps as one."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def _rope(header: Header, values: Config, name: str, head_dim: int) -> dict[str, Any]:
    base = decimal(values.get(f"{name}.rope.freq_base", float, 10000.0))
    rotary_dim = values.size(f"{name}.rope.dimension_count", head_dim)
    if name == "llama" and rotary_dim != head_dim:  # the converter reorders rows as if all turned
        raise values.lack(f"RoPE on {rotary_dim} of {head_dim} dimensions", "all are turned in this architecture")
    trained = values.size(f"{name}.rope.scaling.original_context_length", None)
    return {
        "rope_theta": base,
        "partial_rotary_factor": rotary_dim / head_dim,
        "original_max_position_embeddings": trained,
        "rope_scaling": _scaling(header, values, name, base, rotary_dim, trained),
    }


def _scaling(
    header: Header, values: Config, name: str, base: float, rotary_dim: int, trained: int | None
) -> dict[str, Any] | None:
    """The scaling in Hugging Face's words; None where frequencies are as they are."""
    longest, name = values.size(f"{name}.context_length"), f"{name}.rope.scaling"
    if ROPE_FREQS in header.tensors:
        return _llama3(_factors(header, values, ROPE_FREQS, rotary_dim), base, trained or LLAMA3_CONTEXT)
    if ROPE_LONG in header.tensors or ROPE_SHORT in header.tensors:
        long, short = (_factors(header, values, tensor, rotary_dim) for tensor in (ROPE_LONG, ROPE_SHORT))
        amplitude = values.get(f"{name}.attn_factor", float, 1.0)
        span = trained or longest
        usual = math.sqrt(1 + math.log(longest / span) / math.log(span)) if longest > span > 1 else 1.0
        return {
            "rope_type": "longrope",
            "long_factor": [decimal(factor) for factor in long.tolist()],
            "short_factor": [decimal(factor) for factor in short.tolist()],
            "attention_factor": None if math.isclose(amplitude, usual, rel_tol=1e-6) else amplitude,
        }
    factor = values.get(f"{name}.factor", float, 0.0)
    kind = values.get(f"{name}.type", str, "linear" if factor else "none")
    if kind == "none" or (kind == "linear" and not factor):
        return None
    if kind not in ("linear", "yarn"):
        raise values.lack(f"{name}.type={kind!r:.40}", "supported: none, linear, yarn, and factors in tensors")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": decimal(factor)}
    if kind == "yarn":
        for theirs in ("beta_fast", "beta_slow"):
            if f"{name}.yarn_{theirs}" in values:
                scaling[theirs] = decimal(values.get(f"{name}.yarn_{theirs}", float))
        if f"{name}.attn_factor" in values and factor > 1:  # llama.cpp multiplies it with YaRN's own
            scaling["attention_factor"] = values.get(f"{name}.attn_factor", float) * (1 + 0.1 * math.log(factor))
    return scaling


def _factors(header: Header, values: Config, name: str, rotary_dim: int) -> NDArray[np.float32]:
    """What each pair's frequency is divided by."""
    info = header.tensors.get(name)
    if info is None:
        raise values.lack("factors of long RoPE", f"both {ROPE_LONG} and {ROPE_SHORT} are needed")
    if info.type.name != "F32" or info.shape != (rotary_dim // 2,):
        raise values.lack(f"{name} as {info.type.name} {list(info.shape)}", f"wanted is F32 [{rotary_dim // 2}]")
    factors = header.bytes.array(info.start, rotary_dim // 2, np.float32)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise values.lack(f"{name} with numbers that are not above 0", "each divides a frequency")
    return factors


def _llama3(factors: NDArray[np.float32], base: float, trained: int) -> dict[str, Any]:
    """Llama 3.1's rule where the factors are what it gives, which is what files have them from; else the factors."""
    factor = decimal(float(factors.max()))
    rule = Llama3Scaling(
        factor=factor, original_max_position_embeddings=trained, low_freq_factor=1.0, high_freq_factor=4.0
    )
    rotary_dim = 2 * len(factors)
    theta = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    scaled = rule.frequencies(theta, base, rotary_dim, trained)
    if np.allclose((theta / scaled).numpy(), factors, rtol=1e-5, atol=0):
        return {"rope_type": "llama3", **rule.model_dump(exclude={"kind"})}
    plain = [decimal(factor) for factor in factors.tolist()]
    return {"rope_type": "longrope", "long_factor": plain, "short_factor": plain, "attention_factor": 1.0}
