"""Every preset is the published model: in its number of parameters, and in what it computes.

The published side is Hugging Face's code (for the 2017 Transformer torch's own layers), built from the published
configurations written out below; random weights are copied across by the name mappings of this file, which are also
the documentation of how our names and theirs correspond.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers as hf

from headwise.model import build
from headwise.spec import ModelSpec, count, list_presets, parse
from headwise.spec.presets import PRESETS

# ---- published sizes ----


def llama_like(config: type, d: int, n: int, heads: int, kv: int, ff: int, vocab: int, tied: bool, **more: Any) -> Any:
    widths = {"hidden_size": d, "num_hidden_layers": n, "intermediate_size": ff, "vocab_size": vocab}
    groups = {"num_attention_heads": heads, "num_key_value_heads": kv}
    return config(**widths, **groups, tie_word_embeddings=tied, **more)


def gpt2_config(d: int, layers: int, heads: int) -> Any:
    return hf.GPT2Config(n_embd=d, n_layer=layers, n_head=heads, vocab_size=50257, n_positions=1024)


def bloom_config(d: int, layers: int, heads: int) -> Any:
    return hf.BloomConfig(hidden_size=d, n_layer=layers, n_head=heads, vocab_size=250880)


def llama_config(*args: Any) -> Any:
    return llama_like(hf.LlamaConfig, *args, tied=False)


def qwen_config(*args: Any) -> Any:
    return llama_like(hf.Qwen3Config, *args, head_dim=128)


def gemma_config(*args: Any) -> Any:
    return llama_like(hf.GemmaConfig, *args, tied=True, head_dim=256)


def gemma2_config(*args: Any) -> Any:
    return llama_like(hf.Gemma2Config, *args[:-1], 256_000, tied=True, head_dim=args[-1])


def olmo2_config(*args: Any) -> Any:
    return llama_like(hf.Olmo2Config, *args, tied=False)


QWEN3 = hf.Qwen3ForCausalLM
# line → class, its published configuration, and the parameters its authors' checkpoint holds
PUBLISHED: dict[str, tuple[Any, Callable[[], Any], int]] = {
    "gpt2(size='124m')": (hf.GPT2LMHeadModel, lambda: gpt2_config(768, 12, 12), 124_439_808),
    "gpt2(size='355m')": (hf.GPT2LMHeadModel, lambda: gpt2_config(1024, 24, 16), 354_823_168),
    "gpt2(size='774m')": (hf.GPT2LMHeadModel, lambda: gpt2_config(1280, 36, 20), 774_030_080),
    "gpt2(size='1558m')": (hf.GPT2LMHeadModel, lambda: gpt2_config(1600, 48, 25), 1_557_611_200),
    "gpt1(size='117m')": (hf.OpenAIGPTLMHeadModel, hf.OpenAIGPTConfig, 116_534_784),
    "llama(size='7b')": (hf.LlamaForCausalLM, lambda: llama_config(4096, 32, 32, 32, 11008, 32000), 6_738_415_616),
    "llama(size='13b')": (hf.LlamaForCausalLM, lambda: llama_config(5120, 40, 40, 40, 13824, 32000), 13_015_864_320),
    "llama(size='33b')": (hf.LlamaForCausalLM, lambda: llama_config(6656, 60, 52, 52, 17920, 32000), 32_528_943_616),
    "llama(size='65b')": (hf.LlamaForCausalLM, lambda: llama_config(8192, 80, 64, 64, 22016, 32000), 65_285_660_672),
    "llama(size='70b')": (hf.LlamaForCausalLM, lambda: llama_config(8192, 80, 64, 8, 28672, 32000), 68_976_648_192),
    "llama(size='8b')": (hf.LlamaForCausalLM, lambda: llama_config(4096, 32, 32, 8, 14336, 128256), 8_030_261_248),
    "mistral(size='7b')": (
        hf.MistralForCausalLM,
        lambda: llama_like(hf.MistralConfig, 4096, 32, 32, 8, 14336, 32000, tied=False, sliding_window=4096),
        7_241_732_096,
    ),
    "qwen3(size='0.6b')": (QWEN3, lambda: qwen_config(1024, 28, 16, 8, 3072, 151936, True), 596_049_920),
    "qwen3(size='1.7b')": (QWEN3, lambda: qwen_config(2048, 28, 16, 8, 6144, 151936, True), 1_720_574_976),
    "qwen3(size='4b')": (QWEN3, lambda: qwen_config(2560, 36, 32, 8, 9728, 151936, True), 4_022_468_096),
    "qwen3(size='8b')": (QWEN3, lambda: qwen_config(4096, 36, 32, 8, 12288, 151936, False), 8_190_735_360),
    "gemma(size='2b')": (hf.GemmaForCausalLM, lambda: gemma_config(2048, 18, 8, 1, 16384, 256000), 2_506_172_416),
    "gemma(size='7b')": (hf.GemmaForCausalLM, lambda: gemma_config(3072, 28, 16, 16, 24576, 256000), 8_537_680_896),
    "falcon(size='7b')": (hf.FalconForCausalLM, hf.FalconConfig, 6_921_720_704),
    "bloom(size='560m')": (hf.BloomForCausalLM, lambda: bloom_config(1024, 24, 16), 559_214_592),
    "bloom(size='1.1b')": (hf.BloomForCausalLM, lambda: bloom_config(1536, 24, 16), 1_065_314_304),
    "bloom(size='3b')": (hf.BloomForCausalLM, lambda: bloom_config(2560, 30, 32), 3_002_557_440),
    "bloom(size='7.1b')": (hf.BloomForCausalLM, lambda: bloom_config(4096, 30, 32), 7_069_016_064),
    "bloom(size='176b')": (hf.BloomForCausalLM, lambda: bloom_config(14336, 70, 112), 176_247_271_424),
    "gptj(size='6b')": (hf.GPTJForCausalLM, hf.GPTJConfig, 6_050_882_784),
    "gemma2(size='2b')": (hf.Gemma2ForCausalLM, lambda: gemma2_config(2304, 26, 8, 4, 9216, 256), 2_614_341_888),
    "gemma2(size='9b')": (hf.Gemma2ForCausalLM, lambda: gemma2_config(3584, 42, 16, 8, 14336, 256), 9_241_705_984),
    "gemma2(size='27b')": (hf.Gemma2ForCausalLM, lambda: gemma2_config(4608, 46, 32, 16, 36864, 128), 27_227_128_320),
    "olmo2(size='1b')": (hf.Olmo2ForCausalLM, lambda: olmo2_config(2048, 16, 16, 16, 8192, 100352), 1_484_916_736),
    "olmo2(size='7b')": (hf.Olmo2ForCausalLM, lambda: olmo2_config(4096, 32, 32, 32, 11008, 100352), 7_298_617_344),
    "olmo2(size='13b')": (hf.Olmo2ForCausalLM, lambda: olmo2_config(5120, 40, 40, 40, 13824, 100352), 13_716_198_400),
    "olmo2(size='32b')": (hf.Olmo2ForCausalLM, lambda: olmo2_config(5120, 64, 40, 8, 27648, 100352), 32_234_279_936),
    "mixtral(size='8x7b')": (hf.MixtralForCausalLM, hf.MixtralConfig, 46_702_792_704),
    "mixtral(size='8x22b')": (
        hf.MixtralForCausalLM,
        lambda: hf.MixtralConfig(
            hidden_size=6144, intermediate_size=16384, num_hidden_layers=56, num_attention_heads=48, vocab_size=32768
        ),
        140_630_071_296,
    ),
    "deepseek_v3(size='671b')": (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config, 671_026_404_352),
    "gpt_neox(size='20b')": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, 20_554_567_680),
}  # fmt: skip


def n_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_every_published_size_is_compared() -> None:
    lines = {f"{name}(size='{size}')" for name, preset in PRESETS.items() for size in preset.sizes}
    assert lines == {*PUBLISHED, "transformer(size='base')", "transformer(size='big')"}


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_sizes_have_the_published_parameters(line: str) -> None:
    model_class, config, published = PUBLISHED[line]
    with torch.device("meta"):
        theirs = model_class(config())
    assert count(parse(line)).params == n_params(theirs) == published
    if line.startswith("deepseek"):  # its 45,000 maps take ten seconds to make; test_counts.py has smaller mixtures
        return
    ours = build(line, device="meta")
    assert n_params(ours) == published
    if model_class in (hf.LlamaForCausalLM, hf.Qwen3ForCausalLM, hf.GemmaForCausalLM):
        # These have one matrix a projection as we do, so the shapes are equal one by one.
        shapes = sorted(tuple(p.shape) for p in ours.parameters())
        assert shapes == sorted(tuple(p.shape) for p in theirs.parameters())


@pytest.mark.parametrize(
    ("size", "d", "heads", "ff", "published"), [("base", 512, 8, 2048, 65e6), ("big", 1024, 16, 4096, 213e6)]
)
def test_the_2017_transformer_has_its_parameters(size: str, d: int, heads: int, ff: int, published: float) -> None:
    """Section 3 and table 3 of the paper, which rounds: 65 and 213 million."""
    with torch.device("meta"):
        layers = [nn.TransformerEncoderLayer(d, heads, ff), nn.TransformerDecoderLayer(d, heads, ff)]
    expected = 37_000 * d + 6 * sum(map(n_params, layers))
    spec = parse(f"transformer(size={size})")
    assert count(spec).params == n_params(build(spec, device="meta")) == expected
    assert expected == pytest.approx(published, rel=0.04)


LENGTHS = {"gpt2(size='124m')": 1024, "gpt1(size='117m')": 512, "llama(size='7b')": 2048, "llama(size='70b')": 4096}
LENGTHS |= {
    "llama(size='8b')": 8192,
    "mistral(size='7b')": 32_768,
    "qwen3(size='8b')": 40_960,
    "gemma(size='2b')": 8192,
}
LENGTHS |= {"falcon(size='7b')": 2048, "bloom(size='560m')": 2048, "gptj(size='6b')": 2048}


def test_published_lengths_vocabularies_and_bases() -> None:
    assert {line: parse(line).max_seq_len for line in LENGTHS} == LENGTHS
    for line, (_, config, _) in PUBLISHED.items():
        assert parse(line).vocab_size == config().vocab_size
    bases = {parse(f"llama(size='{size}')").position.base for size in ("7b", "13b", "33b", "65b", "70b")}
    assert bases == {10_000.0}
    assert parse("llama(size='8b')").position.base == 500_000.0
    assert parse("qwen3(size='8b')").position.base == 1_000_000.0
    assert parse("mistral(size='7b')").attention.window == 4096


def test_single_fields_override_a_published_size() -> None:
    wide, narrow = parse("llama(size='7b')"), parse("llama(size='7b', n_layers=16, vocab_size=1000)")
    assert (narrow.d_model, narrow.n_layers, narrow.vocab_size) == (4096, 16, 1000)
    assert (
        count(narrow).params
        == count(wide).params - 16 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) - 2 * 31_000 * 4096
    )


# ---- what they compute ----


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def shaken(model: nn.Module) -> nn.Module:
    """The model with random values everywhere, norms and biases too, so that no part can hide."""
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(noise / math.sqrt(p.shape[-1]) if p.dim() > 1 else p + 0.3 * noise)
    return model.eval()


class Theirs:
    """Their tensors by name; `linear` and `norm` hand over weight and bias under our name."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = dict(model.named_parameters())
        self.ours: dict[str, Tensor] = {}

    def put(self, ours: str, theirs: str, change: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        """Weight, and bias where there is one."""
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" in self.tensors:
                self.ours[f"{ours}.{part}"] = change(self.tensors.pop(f"{theirs}.{part}"))

    def split(self, ours: str, theirs: str, cut: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        """One matrix of theirs for queries, keys and values, cut into our three."""
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" in self.tensors:
                for name, tensor in zip("qkv", cut(self.tensors.pop(f"{theirs}.{part}"))):
                    self.ours[f"{ours}.w{name}.{part}"] = tensor


def from_llama(t: Theirs, n_layers: int) -> None:
    t.put("embedding", "model.embed_tokens")
    for n in range(n_layers):
        ours, theirs = f"stack.blocks.{n}", f"model.layers.{n}"
        for name in "qkvo":
            t.put(f"{ours}.attention.w{name}", f"{theirs}.self_attn.{name}_proj")
        for name in ("q_norm", "k_norm"):
            t.put(f"{ours}.attention.{name}", f"{theirs}.self_attn.{name}")
        t.put(f"{ours}.ffn.w_gate", f"{theirs}.mlp.gate_proj")
        t.put(f"{ours}.ffn.w_up", f"{theirs}.mlp.up_proj")
        t.put(f"{ours}.ffn.w_out", f"{theirs}.mlp.down_proj")
        t.put(f"{ours}.attention_norm", f"{theirs}.input_layernorm")
        t.put(f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm")
    t.put("stack.final_norm", "model.norm")
    t.put("head", "lm_head")


def from_gpt2(t: Theirs, n_layers: int) -> None:
    def transpose(w: Tensor) -> Tensor:
        return w.mT if w.dim() == 2 else w  # GPT-2 stores [in, out]

    t.put("embedding", "transformer.wte")
    t.put("stack.positions.0.table", "transformer.wpe")
    from_gpt_blocks(t, n_layers, transpose)
    t.put("stack.final_norm", "transformer.ln_f")


def from_gpt1(t: Theirs, n_layers: int) -> None:
    t.put("embedding", "transformer.tokens_embed")
    t.put("stack.positions.0.table", "transformer.positions_embed")
    from_gpt_blocks(t, n_layers, lambda w: w.mT if w.dim() == 2 else w)


def from_gpt_blocks(t: Theirs, n_layers: int, transpose: Callable[[Tensor], Tensor]) -> None:
    for n in range(n_layers):
        ours, theirs = f"stack.blocks.{n}", f"transformer.h.{n}"
        t.split(f"{ours}.attention", f"{theirs}.attn.c_attn", lambda w: transpose(w).chunk(3))
        t.put(f"{ours}.attention.wo", f"{theirs}.attn.c_proj", transpose)
        t.put(f"{ours}.ffn.w_in", f"{theirs}.mlp.c_fc", transpose)
        t.put(f"{ours}.ffn.w_out", f"{theirs}.mlp.c_proj", transpose)
        t.put(f"{ours}.attention_norm", f"{theirs}.ln_1")
        t.put(f"{ours}.ffn_norm", f"{theirs}.ln_2")


def from_falcon(t: Theirs, n_layers: int) -> None:
    def one_kv_head(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_model = w.shape[1]
        head_dim = (w.shape[0] - d_model) // 2
        return w.split([d_model, head_dim, head_dim])  # type: ignore[return-value]

    t.put("embedding", "transformer.word_embeddings")
    for n in range(n_layers):
        ours, theirs = f"stack.blocks.{n}", f"transformer.h.{n}"
        t.split(f"{ours}.attention", f"{theirs}.self_attention.query_key_value", one_kv_head)
        t.put(f"{ours}.attention.wo", f"{theirs}.self_attention.dense")
        t.put(f"{ours}.ffn.w_in", f"{theirs}.mlp.dense_h_to_4h")
        t.put(f"{ours}.ffn.w_out", f"{theirs}.mlp.dense_4h_to_h")
        t.put(f"{ours}.attention_norm", f"{theirs}.input_layernorm")
    t.put("stack.final_norm", "transformer.ln_f")


def from_bloom(t: Theirs, n_layers: int) -> None:
    def by_head(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return w.unflatten(0, (6, 3, -1)).transpose(0, 1).flatten(1, 2).unbind(0)  # type: ignore[return-value]

    t.put("embedding", "transformer.word_embeddings")
    t.put("embedding_norm", "transformer.word_embeddings_layernorm")
    for n in range(n_layers):
        ours, theirs = f"stack.blocks.{n}", f"transformer.h.{n}"
        t.split(f"{ours}.attention", f"{theirs}.self_attention.query_key_value", by_head)
        t.put(f"{ours}.attention.wo", f"{theirs}.self_attention.dense")
        t.put(f"{ours}.ffn.w_in", f"{theirs}.mlp.dense_h_to_4h")
        t.put(f"{ours}.ffn.w_out", f"{theirs}.mlp.dense_4h_to_h")
        t.put(f"{ours}.attention_norm", f"{theirs}.input_layernorm")
        t.put(f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm")
    t.put("stack.final_norm", "transformer.ln_f")


def from_gptj(t: Theirs, n_layers: int) -> None:
    t.put("embedding", "transformer.wte")
    for n in range(n_layers):
        ours, theirs = f"stack.blocks.{n}", f"transformer.h.{n}"
        for name, other in zip("qkvo", ("q_proj", "k_proj", "v_proj", "out_proj")):
            t.put(f"{ours}.attention.w{name}", f"{theirs}.attn.{other}")
        t.put(f"{ours}.ffn.w_in", f"{theirs}.mlp.fc_in")
        t.put(f"{ours}.ffn.w_out", f"{theirs}.mlp.fc_out")
        t.put(f"{ours}.attention_norm", f"{theirs}.ln_1")
    t.put("stack.final_norm", "transformer.ln_f")
    t.put("head", "lm_head")


def assert_equal_logits(
    line: str | ModelSpec, theirs: nn.Module, mapping: Callable[[Theirs, int], None], lengths: list[int]
) -> None:
    spec = parse(line)
    assert spec.is_resolved, "the line must give every width"
    assert spec.n_layers is not None
    assert spec.vocab_size is not None
    theirs = shaken(theirs)
    t = Theirs(theirs)
    mapping(t, spec.n_layers)
    assert not t.tensors, f"without a place in ours: {list(t.tensors)}"
    if spec.tie_embeddings:
        t.ours["head.weight"] = t.ours["embedding.weight"]
    ours = build(spec).eval()
    ours.load_state_dict(t.ours, strict=True)
    for length in lengths:
        ids = torch.randint(spec.vocab_size, (2, length), generator=torch.Generator().manual_seed(length))
        expected = theirs(ids, use_cache=False).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(ids), expected, rtol=1e-4, atol=1e-4)


WIDTHS = "n_layers=2, vocab_size=61, max_seq_len=64"


def small(config: type, heads: int = 4, d: int = 32, **more: Any) -> Any:
    fields = {"num_key_value_heads": heads, "intermediate_size": 56, "max_position_embeddings": 64, **more}
    return config(
        hidden_size=d,
        num_hidden_layers=2,
        num_attention_heads=heads,
        vocab_size=61,
        attn_implementation="eager",
        **fields,
    )


LLAMA = f"llama({WIDTHS}, d_model=32, n_heads=4, ffn=swiglu(d_ff=56)"
PARAMETERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mha": (f"{LLAMA})", {}),
    "mqa": (f"{LLAMA}, attention=mqa)", {"num_key_value_heads": 1}),
    "gqa": (f"{LLAMA}, attention=gqa(kv_heads=2))", {"num_key_value_heads": 2}),
    "odd head width": (f"{LLAMA}, attention=gqa(kv_heads=2, head_dim=14))", {"num_key_value_heads": 2, "head_dim": 14}),
    "tied": (f"{LLAMA}, tie_embeddings=true)", {"tie_word_embeddings": True}),
    "biases": (
        f"{LLAMA}, attention=softmax(bias=true), norm=rmsnorm(eps=1e-3))",
        {"attention_bias": True, "rms_norm_eps": 1e-3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_llama_computes_what_the_published_model_does(name: str) -> None:
    line, fields = PARAMETERS[name]
    assert_equal_logits(line, hf.LlamaForCausalLM(small(hf.LlamaConfig, **fields)), from_llama, [1, 23])


ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("rope(base=500)", {"rope_type": "default", "rope_theta": 500.0}),
    "linear": ("rope(scaling=linear(3))", {"rope_type": "linear", "factor": 3.0}),
    "dynamic": (
        "rope(scaling=dynamic(3, original_max_position_embeddings=64))",
        {"rope_type": "dynamic", "factor": 3.0},
    ),
    "yarn": (
        "rope(base=300, scaling=yarn(4, original_max_position_embeddings=16))",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 300.0},
    ),
    "yarn with a ramp inside": (
        "rope(base=300, scaling=yarn(4, original_max_position_embeddings=400))",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 400, "rope_theta": 300.0},
    ),
    "yarn with all fields": (
        "rope(scaling=yarn(4, original_max_position_embeddings=40, beta_fast=9, beta_slow=0.5, mscale=1.4, "
        "mscale_all_dim=0.7, truncate=false))",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "beta_fast": 9.0, "beta_slow": 0.5}
        | {"mscale": 1.4, "mscale_all_dim": 0.7, "truncate": False},
    ),
    "yarn with its own sharpening": (
        "rope(scaling=yarn(4, original_max_position_embeddings=16, attention_factor=0.8))",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.8},
    ),
    "llama3": (
        "rope(base=500, scaling=llama3(8, original_max_position_embeddings=32, low_freq_factor=1, high_freq_factor=4))",
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 500.0}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "longrope": (
        "rope(scaling=longrope(4, original_max_position_embeddings=40, short_factor=[1, 1.1, 1.2, 3], "
        "long_factor=[1, 2, 5.5, 9]))",
        {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 40}
        | {"short_factor": [1.0, 1.1, 1.2, 3.0], "long_factor": [1.0, 2.0, 5.5, 9.0]},
    ),
    "longrope with its own sharpening": (
        "rope(scaling=longrope(0.5, original_max_position_embeddings=40, short_factor=[1, 1.1, 1.2, 3], "
        "long_factor=[1, 2, 5.5, 9], attention_factor=1.2))",
        {"rope_type": "longrope", "factor": 0.5, "original_max_position_embeddings": 40, "attention_factor": 1.2}
        | {"short_factor": [1.0, 1.1, 1.2, 3.0], "long_factor": [1.0, 2.0, 5.5, 9.0]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_rope_and_its_scalings_are_hugging_faces(name: str) -> None:
    """Below, at and above the trained length, which `dynamic` and `longrope` go by."""
    rope, parameters = ROPES[name]
    theirs = hf.LlamaForCausalLM(small(hf.LlamaConfig, rope_parameters={"rope_theta": 10000.0, **parameters}))
    assert_equal_logits(f"{LLAMA}, position={rope})", theirs, from_llama, [5, 64, 100])


def shrunk(line: str, **parts: Any) -> ModelSpec:
    """A style or published model as it stands, but small: only widths change, here and (`parts`) in its components."""
    spec = parse(line)
    fields: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 61, "max_seq_len": 64}
    for family in ("attention", "ffn"):
        component = getattr(spec, family)
        known = {k: v for k, v in parts.items() if k in type(component).model_fields}
        fields[family] = component.model_copy(update=known)
    return spec.replace(**fields)


@pytest.mark.parametrize(("line", "eps"), [("llama", 1e-6), ("llama(size='13b')", 1e-6), ("llama(size='70b')", 1e-5)])
def test_llama_as_it_stands(line: str, eps: float) -> None:
    spec = shrunk(line, d_ff=56, kv_heads=2)
    config = small(hf.LlamaConfig, num_key_value_heads=2, rms_norm_eps=eps)
    assert_equal_logits(spec, hf.LlamaForCausalLM(config), from_llama, [1, 31])


def test_llama_3_as_it_stands() -> None:
    config = small(hf.LlamaConfig, num_key_value_heads=2, rms_norm_eps=1e-5)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500_000.0}
    spec = shrunk("llama(size='8b')", d_ff=56, kv_heads=2)
    assert_equal_logits(spec, hf.LlamaForCausalLM(config), from_llama, [1, 31])


@pytest.mark.parametrize("window", [1, 5, 64])
@pytest.mark.parametrize("line", ["mistral", "mistral(size='7b')"])
def test_mistral_computes_what_the_published_model_does(line: str, window: int) -> None:
    config = small(hf.MistralConfig, num_key_value_heads=2, sliding_window=window, rms_norm_eps=1e-5)
    spec = shrunk(line, d_ff=56, kv_heads=2, window=window)
    assert_equal_logits(spec, hf.MistralForCausalLM(config), from_llama, [3, 40])


@pytest.mark.parametrize(
    ("line", "tied"), [("qwen3", False), ("qwen3(size='0.6b')", True), ("qwen3(size='8b')", False)]
)
def test_qwen3_computes_what_the_published_model_does(line: str, tied: bool) -> None:
    config = small(hf.Qwen3Config, num_key_value_heads=2, head_dim=12, tie_word_embeddings=tied)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    spec = shrunk(line, d_ff=56, kv_heads=2, head_dim=12)
    assert_equal_logits(spec, hf.Qwen3ForCausalLM(config), from_llama, [1, 31])


@pytest.mark.parametrize(("line", "kv_heads"), [("gemma", 1), ("gemma(size='2b')", 1), ("gemma(size='7b')", 4)])
def test_gemma_computes_what_the_published_model_does(line: str, kv_heads: int) -> None:
    config = small(hf.GemmaConfig, num_key_value_heads=kv_heads, head_dim=12)
    spec = shrunk(line, d_ff=56, head_dim=12)
    assert_equal_logits(spec, hf.GemmaForCausalLM(config), from_llama, [1, 31])


def test_gpt2_computes_what_the_published_model_does() -> None:
    config = hf.GPT2Config(n_embd=36, n_layer=2, n_head=3, vocab_size=61, n_positions=64, attn_implementation="eager")
    assert_equal_logits(f"gpt2({WIDTHS}, d_model=36, n_heads=3)", hf.GPT2LMHeadModel(config), from_gpt2, [1, 64])


def test_gpt1_computes_what_the_published_model_does() -> None:
    config = hf.OpenAIGPTConfig(n_embd=36, n_layer=2, n_head=3, vocab_size=61, n_positions=64)
    theirs = hf.OpenAIGPTLMHeadModel(config)
    theirs.forward = without_cache(theirs.forward)
    assert_equal_logits(f"gpt1({WIDTHS}, d_model=36, n_heads=3)", theirs, from_gpt1, [1, 64])


def without_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """GPT-1's code knows no cache to switch off."""
    return lambda ids, use_cache: forward(ids)


def test_falcon_computes_what_the_published_model_does() -> None:
    config = hf.FalconConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, vocab_size=61, attn_implementation="eager"
    )
    assert_equal_logits(f"falcon({WIDTHS}, d_model=24, n_heads=3)", hf.FalconForCausalLM(config), from_falcon, [1, 33])


def test_bloom_computes_what_the_published_model_does() -> None:
    """With 6 heads, no power of two, where the slopes' second rule shows."""
    config = hf.BloomConfig(hidden_size=48, n_layer=2, n_head=6, vocab_size=61)
    assert_equal_logits(f"bloom({WIDTHS}, d_model=48, n_heads=6)", hf.BloomForCausalLM(config), from_bloom, [1, 50])


def test_gptj_computes_what_the_published_model_does() -> None:
    config = hf.GPTJConfig(n_embd=48, n_layer=2, n_head=3, vocab_size=61, n_positions=64, rotary_dim=4)
    assert_equal_logits(f"gptj({WIDTHS}, d_model=48, n_heads=3)", hf.GPTJForCausalLM(config), from_gptj, [1, 50])


def test_the_2017_transformer_computes_what_torchs_layers_do() -> None:
    """Equations 1 to 3 of the paper on torch's own post-norm layers, sinusoids written as the paper writes them."""
    d, heads, vocab = 24, 3, 61
    spec = parse(
        f"transformer(d_model={d}, n_heads={heads}, n_layers=2, n_encoder_layers=3, vocab_size={vocab}, max_seq_len=64)"
    )
    layer = {"d_model": d, "nhead": heads, "dim_feedforward": 4 * d, "dropout": 0.0, "batch_first": True}
    encoder = shaken(nn.ModuleList(nn.TransformerEncoderLayer(**layer) for _ in range(3))).train()
    decoder = shaken(nn.ModuleList(nn.TransformerDecoderLayer(**layer) for _ in range(2))).train()
    embedding = shaken(nn.Embedding(vocab, d))

    t = Theirs(nn.ModuleDict({"encoder": encoder, "decoder": decoder, "embedding": embedding}))
    t.put("embedding", "embedding")
    t.ours["head.weight"] = t.ours["embedding.weight"]
    for side, n_layers in (("encoder", 3), ("decoder", 2)):
        norms = ["attention_norm", "ffn_norm"] if side == "encoder" else ["attention_norm", "cross_norm", "ffn_norm"]
        for n in range(n_layers):
            ours, theirs = f"{side}.blocks.{n}", f"{side}.{n}"
            for name, other in (("attention", "self_attn"), ("cross_attention", "multihead_attn")):
                for part in ("weight", "bias"):
                    if (joined := t.tensors.pop(f"{theirs}.{other}.in_proj_{part}", None)) is not None:
                        t.ours |= {f"{ours}.{name}.w{x}.{part}": w for x, w in zip("qkv", joined.chunk(3))}
                t.put(f"{ours}.{name}.wo", f"{theirs}.{other}.out_proj")
            t.put(f"{ours}.ffn.w_in", f"{theirs}.linear1")
            t.put(f"{ours}.ffn.w_out", f"{theirs}.linear2")
            for i, norm in enumerate(norms):
                t.put(f"{ours}.{norm}", f"{theirs}.norm{i + 1}")
    assert not t.tensors
    model = build(spec)
    model.load_state_dict(t.ours, strict=True)

    def embedded(ids: Tensor) -> Tensor:
        p, i = torch.meshgrid(torch.arange(ids.shape[1]), torch.arange(d), indexing="ij")
        angle = p / 10000 ** ((i - i % 2) / d)
        return embedding(ids) * math.sqrt(d) + torch.where(i % 2 == 0, angle.sin(), angle.cos())

    read, written = torch.randint(vocab, (2, 2, 17)).unbind(0)
    written = written[:, :9]
    memory = embedded(read)
    for block in encoder:
        memory = block(memory)
    y = embedded(written)
    for block in decoder:
        y = block(y, memory, tgt_mask=nn.Transformer.generate_square_subsequent_mask(9), tgt_is_causal=True)
    expected = y @ embedding.weight.T
    torch.testing.assert_close(model(written, encoder_ids=read), expected, rtol=1e-4, atol=1e-4)


def test_every_preset_is_compared() -> None:
    compared = {"llama", "mistral", "qwen3", "gemma", "gpt2", "gpt1", "falcon", "bloom", "gptj", "transformer"}
    as_folders = {"gpt_neox", "mixtral", "deepseek_v3", "gemma2", "olmo2"}  # in tests/io/test_hf_mixtures.py
    assert compared | as_folders == set(list_presets())
