"""Multi-head latent attention: the formula, its two forms, which is taken when, and Hugging Face's modules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from headwise.attention import Context
from headwise.attention.mla import MLAAttention
from headwise.cache import LayerCache
from headwise.dims import Dims
from headwise.errors import SpecError
from headwise.model import build
from headwise.registry import POSITION, get_attention
from headwise.spec import count, parse

DIMS = Dims(d_model=32, n_heads=4)
ODD: dict[str, Any] = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 16}


def draws(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(dtype: torch.dtype = torch.float64, **fields: Any) -> MLAAttention:
    attention = get_attention("mla", d_model=32, n_heads=4, **fields).to(dtype)
    with torch.no_grad():
        for n, parameter in enumerate(attention.parameters()):
            parameter.copy_(0.3 * draws(*parameter.shape, seed=n) + (parameter.dim() == 1))
    return attention


def encoding(attention: MLAAttention, positions: Tensor, seq_len: int, code: Any = "rope") -> Any:
    return POSITION.build(code, DIMS).encode(positions, seq_len, attention.rope_dim)


def norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


@pytest.mark.parametrize("q_lora_rank", [None, 10])
def test_weights_and_output_are_those_of_the_paper_head_by_head(q_lora_rank: int | None) -> None:
    """Equations 37 to 47 of DeepSeek-V2, with matrices cut out of the maps by hand."""
    T = 6
    attention = layer(q_lora_rank=q_lora_rank, **ODD)
    x = draws(1, T, 32, seed=8)
    turn = encoding(attention, torch.arange(T), T)
    y, weights = attention(x, context=Context(causal=True, encoding=turn), return_attention_weights=True)
    latent, k_rope = (x[0] @ attention.wkv_a.weight.T).split([12, 4], dim=-1)
    latent, k_rope = norm(latent, attention.kv_norm.weight), turn.rotate(k_rope[None, None])[0, 0]
    if q_lora_rank is None:
        queries = x[0] @ attention.wq.weight.T
    else:
        queries = norm(x[0] @ attention.wq_a.weight.T, attention.q_norm.weight) @ attention.wq_b.weight.T
    heads = []
    for h in range(4):
        q_nope, q_rope = queries[:, 10 * h : 10 * (h + 1)].split([6, 4], dim=-1)
        up = attention.wkv_b.weight[22 * h : 22 * (h + 1)]
        k_nope, v = latent @ up[:6].T, latent @ up[6:].T
        scores = (q_nope @ k_nope.T + turn.rotate(q_rope[None, None])[0, 0] @ k_rope.T) / math.sqrt(10)
        p = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
        torch.testing.assert_close(weights[0, h], p)
        heads.append(p @ v)
    torch.testing.assert_close(y[0], torch.cat(heads, -1) @ attention.wo.weight.T)


# ---- two forms ----


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "fields": draw(st.sampled_from([{}, ODD, {"q_lora_rank": 5, "bias": True, "kv_lora_rank": 3}])),
        "held": draw(st.sampled_from([0, 1, 30])),
        "T": draw(st.sampled_from([1, 2, 7, 260])),
        "causal": draw(st.booleans()),
        "position": draw(st.sampled_from(["none", "rope", "alibi", "rope(scaling=linear(2))"])),
        "segments": draw(st.booleans()),
        "mask": draw(st.sampled_from([None, "bool", "float"])),
    }


def both_forms(attention: MLAAttention, case: dict[str, Any], dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Output and gradients, expanded and absorbed, for new tokens after held ones."""
    from headwise.spec.grammar import read_value

    held, T = case["held"], case["T"]
    S = held + T
    x_all = draws(2, S, 32, dtype=dtype)
    keys = torch.arange(S).div(5, rounding_mode="floor").expand(2, S)
    mask = None
    if case["mask"] == "bool":
        mask = (draws(1, 1, T, S, seed=3) > -0.5) | torch.eye(S, dtype=torch.bool)[held:]
    elif case["mask"] == "float":
        mask = draws(1, 4, T, S, seed=3, dtype=dtype)
    weight = draws(2, T, 32, seed=4, dtype=dtype)
    code = read_value(case["position"])
    results = []
    for absorbed in (False, True):
        attention.absorbed = absorbed
        cache = LayerCache() if held else None
        if cache is not None:
            first = encoding(attention, torch.arange(held), held, code)
            with torch.no_grad():
                attention(x_all[:, :held], context=Context(causal=True, encoding=first, cache=cache))
        x = x_all[:, held:].clone()
        own = {} if held else {"wrt": (x.requires_grad_(), *attention.parameters())}
        given = Context(
            case["causal"], encoding(attention, torch.arange(held, S), S, code),
            (keys[:, held:], keys) if case["segments"] else None, cache,
        )  # fmt: skip
        with torch.set_grad_enabled(bool(own)):
            y, _ = attention(x, mask, context=given)
        results.append((y, *torch.autograd.grad((y * weight).sum(), own["wrt"])) if own else (y,))
    return results


@settings(max_examples=60)
@given(situations())
def test_absorbed_form_equals_the_expanded_one_in_every_situation(case: dict[str, Any]) -> None:
    expanded, absorbed = both_forms(layer(**case["fields"]), case, torch.float64)
    torch.testing.assert_close(absorbed, expanded, atol=1e-9, rtol=1e-8)


def test_absorbed_form_equals_the_expanded_one_to_1e_5_in_float32() -> None:
    case = {"held": 700, "T": 3, "causal": True, "position": "rope", "segments": False, "mask": None}
    attention = get_attention("mla", d_model=32, n_heads=4)
    (expanded,), (absorbed,) = both_forms(attention, case, torch.float32)
    torch.testing.assert_close(absorbed, expanded, atol=1e-5, rtol=0)


def flops(attention: MLAAttention, held: int, T: int, absorbed: bool | None) -> int:
    attention.absorbed = absorbed
    cache = LayerCache()
    with torch.no_grad():
        if held:
            attention(draws(1, held, 32, dtype=torch.float32), context=Context(causal=True, cache=cache))
        # The counter does not know the fused CPU kernel, only the products that its plain form is made of.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            attention(draws(1, T, 32, dtype=torch.float32), context=Context(causal=True, cache=cache))
    return counter.get_total_flops()


@pytest.mark.parametrize("fields", [{}, {"kv_lora_rank": 2}, ODD])
@pytest.mark.parametrize(("held", "T"), [(0, 1), (0, 128), (500, 1), (500, 4), (500, 200)])
def test_the_form_taken_is_the_one_that_multiplies_less(fields: dict[str, Any], held: int, T: int) -> None:
    """By torch's counter, which sees masked scores too: a tenth is allowed where the two forms cost about the same."""
    attention = layer(torch.float32, **fields)
    expanded, absorbed, taken = (flops(attention, held, T, form) for form in (False, True, None))
    assert taken in (expanded, absorbed)
    assert taken <= 1.1 * min(expanded, absorbed)


def test_training_expands_and_decoding_absorbs() -> None:
    attention = get_attention("mla", d_model=32, n_heads=4)
    assert not attention._absorbs(512, 512, True)
    assert not attention._absorbs(512, 512, False)
    assert attention._absorbs(1, 512, True)


def test_weights_on_request_are_those_applied_also_where_decoding_would_absorb() -> None:
    attention, cache = layer(), LayerCache()
    x = draws(1, 9, 32)
    attention(x[:, :8], context=Context(causal=True, cache=cache))
    given = Context(causal=True, cache=cache)
    y, none = attention(x[:, 8:], context=given)
    cache.crop(8)
    same, weights = attention(x[:, 8:], context=given, return_attention_weights=True)
    assert none is None
    assert weights.shape == (1, 4, 1, 9)
    torch.testing.assert_close(same, y)


# ---- the cache, the counts ----


def test_a_cache_keeps_the_latent_and_the_shared_key_alone() -> None:
    """It does not grow with the heads: DeepSeek-V2's 576 numbers a token for 128 heads."""
    model = build("llama(d_model=32, n_layers=3, n_heads=4, vocab_size=7, attention=mla(kv_lora_rank=12))")
    cache = model.new_cache()
    with torch.no_grad():
        model(torch.zeros(1, 32, dtype=torch.long), cache=cache)
    assert count(model.spec).kv_bytes_per_token == 2 * 3 * (12 + 4)
    assert cache.n_bytes == 4 * 32 * 3 * (12 + 4)
    published = "mla(kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)"
    big = count(f"llama(d_model=5120, n_heads=128, n_layers=1, attention={published})")
    assert big.kv_bytes_per_token == 2 * 576


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("llama(d_model=32, n_heads=4, attention=mla(kv_heads=2))", "kv_heads: 2 given, but every head"),
        ("llama(d_model=32, n_heads=4, attention=mla(kv_heads=3))", "': attention.kv_heads: 3 given, but every head"),
        ("llama(d_model=32, n_heads=4, attention=mla(qk_norm=true))", "qk_norm: mla norms its latents"),
        ("llama(d_model=32, n_heads=4, attention=mla(qk_rope_head_dim=3))", "rope turns pairs of dimensions"),
        ("llama(attention=mla(kv_lora_rank=0))", "kv_lora_rank"),
        ("llama(attention=mla(kv_lora_dim=8))", "did you mean 'kv_lora_rank'"),
    ],
)
def test_what_does_not_fit_is_said(line: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        parse(line)


def test_without_rotation_the_rope_part_is_just_more_dimensions() -> None:
    parse("llama(d_model=32, n_heads=4, attention=mla(qk_rope_head_dim=3), position=none)")
    attention = layer(**ODD)
    x = draws(1, 6, 32)
    turned, plain = (
        attention(x, context=Context(encoding=encoding(attention, torch.arange(6), 6, code)))[0]
        for code in ("rope", "none")
    )
    assert not torch.allclose(turned, plain)
    torch.testing.assert_close(attention(x)[0], plain)


# ---- Hugging Face ----


def copy_weights(ours: MLAAttention, theirs: torch.nn.Module) -> None:
    names = {"wq": "q_proj", "wq_a": "q_a_proj", "q_norm": "q_a_layernorm", "wq_b": "q_b_proj", "wo": "o_proj"}
    names |= {"wkv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj"}
    state = theirs.state_dict()
    renamed = {f"{our}.{kind}": f"{their}.{kind}" for our, their in names.items() for kind in ("weight", "bias")}
    ours.load_state_dict({our: state.pop(their) for our, their in renamed.items() if their in state})
    assert not state


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("q_lora_rank", [None, 20])
@pytest.mark.parametrize("family", ["v2", "v3", "v3 half"])
@torch.no_grad()
def test_copied_weights_give_hugging_faces_output(family: str, q_lora_rank: int | None, bias: bool) -> None:
    """DeepSeek's attention modules themselves, at odd widths, whole and token by token from a cache."""
    from transformers import DeepseekV2Config, DeepseekV3Config
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    T = 33
    widths = {**ODD, "q_lora_rank": q_lora_rank}
    common: dict[str, Any] = {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "attention_bias": bias,
        "attn_implementation": "eager", "head_dim": 4, "num_hidden_layers": 1, **widths,
    }  # fmt: skip
    theirs: torch.nn.Module
    if family == "v2":
        config = DeepseekV2Config(**common)
        theirs, rotary = v2.DeepseekV2Attention(config, 0), v2.DeepseekV2RotaryEmbedding(config)
    else:
        config = DeepseekV3Config(**common, rope_interleave=family == "v3")
        theirs, rotary = v3.DeepseekV3Attention(config, 0), v3.DeepseekV3RotaryEmbedding(config)
    for n, parameter in enumerate(theirs.parameters()):
        parameter.copy_(0.3 * draws(*parameter.shape, seed=n) + (parameter.dim() == 1))
    ours = get_attention("mla", d_model=32, n_heads=4, bias=bias, **widths)
    copy_weights(ours, theirs)
    x = draws(2, T, 32, seed=7, dtype=torch.float32)
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    expected = theirs(x, attention_mask=mask, position_embeddings=rotary(x, torch.arange(T)[None]))[0]
    code = {"kind": "rope", "pairing": "half" if family == "v3 half" else "interleaved"}
    whole, _ = ours(x, context=Context(True, encoding(ours, torch.arange(T), T, code)))
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)
    cache, steps = LayerCache(), []
    for t in range(T):
        at = encoding(ours, torch.tensor([t]), t + 1, code)
        steps.append(ours(x[:, t : t + 1], context=Context(True, at, cache=cache))[0])
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-5, rtol=1e-5)
