"""Presets: the published styles, part by part, and the widths of their published models.

A preset without a size is a style, built at whatever size a comparison asks for. With a size it is the published model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from headwise.errors import Problem, SpecError, one_of


@dataclass(frozen=True)
class Preset:
    """A style: one line about it, the fields it sets, and what each published size sets on top."""

    summary: str
    fields: dict[str, Any]
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)


def _sizes(common: dict[str, Any], **sizes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name.lstrip("_").replace("_", "."): {**common, **fields} for name, fields in sizes.items()}


def _shape(n_layers: int, d_model: int, n_heads: int, **more: Any) -> dict[str, Any]:
    return {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, **more}


def _swiglu(d_ff: int) -> dict[str, Any]:
    return {"kind": "swiglu", "d_ff": d_ff}


def _rope(base: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"kind": "rope", "base": base, **more}


DEEPSEEK = {"n_shared_experts": 1, "scoring": "sigmoid", "correction_bias": True}
LLAMA3_ROPE = _rope(500000.0)


def _qwen(kv_heads: int) -> dict[str, Any]:
    return {"kind": "softmax", "kv_heads": kv_heads, "head_dim": 128, "qk_norm": True}


def _gemma2(window: int = 4096, **fields: Any) -> dict[str, Any]:
    heads = {"softcap": 50.0, **fields}
    items = [{"kind": "window", "window": window, **heads}, {"kind": "softmax", **heads}]
    return {"kind": "pattern", "items": items}


PRESETS: dict[str, Preset] = {
    "gpt2": Preset(
        "GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each part, GELU, tied embeddings",
        {
            "attention": "softmax",
            "position": "learned",
            "norm": "layernorm",
            "ffn": {"kind": "mlp", "activation": "gelu_tanh"},
            "bias": True,
            "tie_embeddings": True,
        },
        _sizes(
            {"vocab_size": 50257, "max_seq_len": 1024},
            _124m=_shape(12, 768, 12),
            _355m=_shape(24, 1024, 16),
            _774m=_shape(36, 1280, 20),
            _1558m=_shape(48, 1600, 25),
        ),
    ),
    "gpt1": Preset(
        "GPT (Radford et al. 2018): as GPT-2 but LayerNorm after each part (post-norm)",
        {
            "attention": "softmax",
            "position": "learned",
            "norm": "layernorm",
            "ffn": {"kind": "mlp", "activation": "gelu_tanh"},
            "order": "post",
            "bias": True,
            "tie_embeddings": True,
            "init": "normal",
        },
        _sizes({"vocab_size": 40478, "max_seq_len": 512}, _117m=_shape(12, 768, 12)),
    ),
    "llama": Preset(
        "Llama (Touvron et al. 2023): RoPE, RMSNorm, SwiGLU, no biases; 70b is Llama 2's, 8b Llama 3's",
        {"attention": "softmax", "position": "rope", "norm": "rmsnorm", "ffn": "swiglu", "init": "normal"},
        _sizes(
            {"vocab_size": 32000, "max_seq_len": 2048},
            _7b=_shape(32, 4096, 32, ffn=_swiglu(11008)),
            _13b=_shape(40, 5120, 40, ffn=_swiglu(13824)),
            _33b=_shape(60, 6656, 52, ffn=_swiglu(17920)),
            _65b=_shape(80, 8192, 64, ffn=_swiglu(22016)),
            _70b=_shape(
                80,
                8192,
                64,
                ffn=_swiglu(28672),
                attention={"kind": "softmax", "kv_heads": 8},
                max_seq_len=4096,
                norm={"kind": "rmsnorm", "eps": 1e-5},
            ),
            _8b=_shape(
                32,
                4096,
                32,
                ffn=_swiglu(14336),
                attention={"kind": "softmax", "kv_heads": 8},
                position=LLAMA3_ROPE,
                vocab_size=128256,
                max_seq_len=8192,
                norm={"kind": "rmsnorm", "eps": 1e-5},
            ),
        ),
    ),
    "mistral": Preset(
        "Mistral (Jiang et al. 2023): Llama with grouped queries and a sliding window of 4096",
        {
            "attention": {"kind": "window", "window": 4096, "kv_heads": 2},
            "position": "rope",
            "norm": {"kind": "rmsnorm", "eps": 1e-5},
            "ffn": "swiglu",
            "init": "normal",
        },
        _sizes(
            {"vocab_size": 32000, "max_seq_len": 32768},
            _7b=_shape(32, 4096, 32, ffn=_swiglu(14336), attention={"kind": "window", "window": 4096, "kv_heads": 8}),
        ),
    ),
    "qwen3": Preset(
        "Qwen 3 (2025): Llama with grouped queries and an RMSNorm on queries and keys",
        {
            "attention": {"kind": "softmax", "kv_heads": 2, "qk_norm": True},
            "position": _rope(1000000.0),
            "norm": "rmsnorm",
            "ffn": "swiglu",
            "init": "normal",
        },
        _sizes(
            {"vocab_size": 151936, "max_seq_len": 40960, "attention": _qwen(8)},
            _0_6b=_shape(28, 1024, 16, ffn=_swiglu(3072), tie_embeddings=True),
            _1_7b=_shape(28, 2048, 16, ffn=_swiglu(6144), tie_embeddings=True),
            _4b=_shape(36, 2560, 32, ffn=_swiglu(9728), tie_embeddings=True),
            _8b=_shape(36, 4096, 32, ffn=_swiglu(12288)),
        ),
    ),
    "gemma": Preset(
        "Gemma (2024): GeGLU, RMSNorm, RoPE, multi-query at 2b, embeddings tied and scaled by √d_model",
        {
            "attention": {"kind": "softmax", "kv_heads": 1},
            "position": "rope",
            "norm": {"kind": "rmsnorm", "unit_offset": True},
            "ffn": "geglu_tanh",
            "tie_embeddings": True,
            "scale_embeddings": True,
            "init": "normal",
        },
        _sizes(
            {"vocab_size": 256000, "max_seq_len": 8192},
            _2b=_shape(
                18,
                2048,
                8,
                ffn={"kind": "geglu_tanh", "d_ff": 16384},
                attention={"kind": "softmax", "kv_heads": 1, "head_dim": 256},
            ),
            _7b=_shape(
                28,
                3072,
                16,
                ffn={"kind": "geglu_tanh", "d_ff": 24576},
                attention={"kind": "softmax", "head_dim": 256},
            ),
        ),
    ),
    "gemma2": Preset(
        "Gemma 2 (2024): Gemma with norms around each part, windows in turn, scores and logits under soft caps",
        {
            "attention": _gemma2(kv_heads=2),
            "position": "rope",
            "norm": {"kind": "rmsnorm", "unit_offset": True},
            "ffn": "geglu_tanh",
            "order": "sandwich",
            "tie_embeddings": True,
            "scale_embeddings": True,
            "logit_softcap": 30.0,
            "init": "normal",
        },
        _sizes(
            {"vocab_size": 256000, "max_seq_len": 8192},
            _2b=_shape(
                26,
                2304,
                8,
                ffn={"kind": "geglu_tanh", "d_ff": 9216},
                attention=_gemma2(kv_heads=4, head_dim=256),
            ),
            _9b=_shape(
                42,
                3584,
                16,
                ffn={"kind": "geglu_tanh", "d_ff": 14336},
                attention=_gemma2(kv_heads=8, head_dim=256),
            ),
            _27b=_shape(
                46,
                4608,
                32,
                ffn={"kind": "geglu_tanh", "d_ff": 36864},
                attention=_gemma2(kv_heads=16, head_dim=128, scale=144**-0.5),
            ),
        ),
    ),
    "olmo2": Preset(
        "OLMo 2 (2024): Llama with each norm behind its part, queries and keys normed over all heads",
        {
            "attention": {"kind": "softmax", "qk_norm": "full"},
            "position": LLAMA3_ROPE,
            "norm": "rmsnorm",
            "ffn": "swiglu",
            "order": "reordered",
            "init": "normal",
        },
        _sizes(
            {"vocab_size": 100352, "max_seq_len": 4096},
            _1b=_shape(16, 2048, 16, ffn=_swiglu(8192)),
            _7b=_shape(32, 4096, 32, ffn=_swiglu(11008)),
            _13b=_shape(40, 5120, 40, ffn=_swiglu(13824)),
            _32b=_shape(
                64, 5120, 40, ffn=_swiglu(27648), attention={"kind": "softmax", "kv_heads": 8, "qk_norm": "full"}
            ),
        ),
    ),
    "falcon": Preset(
        "Falcon (2023): attention and feed-forward in parallel from one LayerNorm, multi-query, RoPE",
        {
            "attention": {"kind": "softmax", "kv_heads": 1},
            "position": "rope",
            "norm": "layernorm",
            "ffn": {"kind": "mlp", "activation": "gelu"},
            "order": "parallel",
            "tie_embeddings": True,
            "init": "normal",
        },
        _sizes({"vocab_size": 65024, "max_seq_len": 2048}, _7b=_shape(32, 4544, 71)),
    ),
    "bloom": Preset(
        "BLOOM (2022): ALiBi, a LayerNorm on the embeddings, GELU, biases, tied embeddings",
        {
            "attention": "softmax",
            "position": "alibi",
            "norm": "layernorm",
            "ffn": {"kind": "mlp", "activation": "gelu_tanh"},
            "bias": True,
            "tie_embeddings": True,
            "embedding_norm": True,
            "init": "normal",
        },
        _sizes(
            {"vocab_size": 250880, "max_seq_len": 2048},
            _560m=_shape(24, 1024, 16),
            _1_1b=_shape(24, 1536, 16),
            _3b=_shape(30, 2560, 32),
            _7_1b=_shape(30, 4096, 32),
            _176b=_shape(70, 14336, 112),
        ),
    ),
    "gptj": Preset(
        "GPT-J (2021): attention and feed-forward in parallel, interleaved RoPE on a quarter of each head",
        {
            "attention": {"kind": "softmax", "bias": False},
            "position": _rope(pairing="interleaved", partial_rotary_factor=0.25),
            "norm": "layernorm",
            "ffn": {"kind": "mlp", "activation": "gelu_tanh"},
            "order": "parallel",
            "bias": True,
            "head_bias": True,
            "init": "normal",
        },
        _sizes({"vocab_size": 50400, "max_seq_len": 2048}, _6b=_shape(28, 4096, 16)),
    ),
    "gpt_neox": Preset(
        "GPT-NeoX (2022): attention and feed-forward in parallel, a LayerNorm for each, RoPE on a quarter of each head",
        {
            "attention": "softmax",
            "position": _rope(partial_rotary_factor=0.25),
            "norm": "layernorm",
            "ffn": {"kind": "mlp", "activation": "gelu"},
            "order": "parallel_two_norms",
            "bias": True,
            "init": "normal",
        },
        _sizes({"max_seq_len": 2048}, _20b=_shape(44, 6144, 64, vocab_size=50432)),
    ),
    "mixtral": Preset(
        "Mixtral (Jiang et al. 2024): Llama with grouped queries and 8 experts a layer, of which a token uses 2",
        {
            "attention": {"kind": "softmax", "kv_heads": 2},
            "position": _rope(1000000.0),
            "norm": {"kind": "rmsnorm", "eps": 1e-5},
            "ffn": {"kind": "moe", "n_experts": 8, "top_k": 2},
            "init": "normal",
        },
        _sizes(
            {"vocab_size": 32000, "attention": {"kind": "softmax", "kv_heads": 8}},
            _8x7b=_shape(32, 4096, 32, ffn={"kind": "moe", "d_ff": 14336}, max_seq_len=32768),
            _8x22b=_shape(56, 6144, 48, ffn={"kind": "moe", "d_ff": 16384}, max_seq_len=65536, vocab_size=32768),
        ),
    ),
    "deepseek_v3": Preset(
        "DeepSeek V3 (2024): latent attention, interleaved RoPE, experts chosen by sigmoids, one of them shared",
        {
            "attention": "mla",
            "position": _rope(pairing="interleaved"),
            "norm": "rmsnorm",
            "ffn": {"kind": "moe", **DEEPSEEK},
            "init": "normal",
        },
        _sizes(
            {"vocab_size": 129280, "max_seq_len": 163840},
            _671b=_shape(
                61,
                7168,
                128,
                attention={
                    "kind": "mla",
                    "kv_lora_rank": 512,
                    "q_lora_rank": 1536,
                    "qk_nope_head_dim": 128,
                    "qk_rope_head_dim": 64,
                    "v_head_dim": 128,
                    "scale": 192**-0.5 * (0.1 * math.log(40) + 1) ** 2,
                },
                position=_rope(
                    pairing="interleaved",
                    scaling={
                        "kind": "yarn",
                        "factor": 40.0,
                        "original_max_position_embeddings": 4096,
                        "mscale": 1.0,
                        "mscale_all_dim": 1.0,
                    },
                ),
                ffn={
                    "kind": "pattern",
                    "items": [
                        *[_swiglu(18432)] * 3,
                        *[
                            {
                                "kind": "moe",
                                "n_experts": 256,
                                "top_k": 8,
                                "d_ff": 2048,
                                "n_groups": 8,
                                "topk_groups": 4,
                                "routed_scaling_factor": 2.5,
                                **DEEPSEEK,
                            }
                        ]
                        * 58,
                    ],
                },
            ),
        ),
    ),
    "transformer": Preset(
        "The 2017 Transformer (Vaswani et al.): encoder–decoder, sinusoidal positions, post-norm, ReLU",
        {
            "architecture": "encoder_decoder",
            "attention": "softmax",
            "position": "sinusoidal",
            "norm": "layernorm",
            "ffn": {"kind": "mlp", "activation": "relu"},
            "order": "post",
            "bias": True,
            "tie_embeddings": True,
            "scale_embeddings": True,
            "init": "xavier",
        },
        _sizes(
            {"vocab_size": 37000, "max_seq_len": 512},
            base=_shape(6, 512, 8, n_encoder_layers=6),
            big=_shape(6, 1024, 16, n_encoder_layers=6),
        ),
    ),
}


def list_presets() -> list[str]:
    """The presets' names, sorted."""
    return sorted(PRESETS)


def preset_fields(name: Any, size: Any = None) -> dict[str, Any]:
    """The fields a preset sets, those of its published `size` included.

    Raises:
        SpecError: no such preset, or no such published size of it.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise SpecError([Problem("preset", one_of(name, PRESETS, "preset"))])
    preset = PRESETS[name]
    if size is None:
        return dict(preset.fields)
    wanted = size.lower() if isinstance(size, str) else None
    if wanted not in preset.sizes:
        known = one_of(size, preset.sizes, f"published size of {name}")
        raise SpecError([Problem("size", f"{known}; for the style at another size leave it out and use --size")])
    return {**preset.fields, **preset.sizes[wanted], "size": wanted}
