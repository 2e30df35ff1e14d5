"""Document 003 (Wasserstein-2 attention): its quick start and its four verifications, with values asserted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise as hw
from headwise.blocks import RotaryEmbedding, W2Attention, W2Config, W2TransformerBlock
from headwise.errors import HeadwiseError

CONFIG = W2Config(hidden_size=32, num_attention_heads=4, intermediate_size=48)


def explicit_attention(attention: W2Attention, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """S = −(‖Rμq − Rμk‖² + ‖σq − σk‖²)/(τ + ε), pair by pair."""
    B, T, C = x_BTC.shape
    H, D = attention.n_heads, C // attention.n_heads

    def gaussians(weight: Tensor) -> tuple[Tensor, Tensor]:
        mu, sigma_raw = (x_BTC @ weight.T).view(B, T, H, 2 * D).transpose(1, 2).split(D, dim=-1)
        swapped = torch.cat([-mu[..., D // 2 :], mu[..., : D // 2]], dim=-1)
        return mu * cos + swapped * sin, torch.log1p(sigma_raw.exp()) + 1e-4

    (mu_q, sigma_q), (mu_k, sigma_k) = gaussians(attention.wq.weight), gaussians(attention.wk.weight)
    distance = (mu_q[:, :, :, None] - mu_k[:, :, None]).square().sum(-1)
    distance = distance + (sigma_q[:, :, :, None] - sigma_k[:, :, None]).square().sum(-1)
    assert attention.log_tau is not None
    weights = (-distance / (attention.first_tau * attention.log_tau.exp() + 1e-6)).softmax(-1)
    v = (x_BTC @ attention.wv.weight.T).view(B, T, H, D).transpose(1, 2)
    return (weights @ v).transpose(1, 2).reshape(B, T, C) @ attention.wo.weight.T


def explicit_block(block: W2TransformerBlock, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    x_BTC = x_BTC + explicit_attention(block.attention, norm(x_BTC, block.attention_norm.weight), cos, sin)
    h_BTC = norm(x_BTC, block.ffn_norm.weight)
    gate = h_BTC @ block.ffn.w_gate.weight.T
    return x_BTC + (gate * gate.sigmoid() * (h_BTC @ block.ffn.w_up.weight.T)) @ block.ffn.w_out.weight.T


def drawn(module: Any) -> Any:
    """The module in float64 with every parameter drawn, gains near 1."""
    generator = torch.Generator().manual_seed(0)
    module = module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values + (1 if "norm" in name else 0))
    return module


def inputs(T: int = 11, seed: int = 1) -> Tensor:
    return torch.randn(2, T, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_quick_start() -> None:
    """As the document writes it; the imports alone are ours."""

    # 1. a configuration
    class Config:
        hidden_size = 512
        num_attention_heads = 8
        intermediate_size = 2048
        rms_norm_eps = 1e-6

    config = Config()
    bs, seq_len = 2, 64

    # 2. the model
    block = W2TransformerBlock(config)
    head_dim = config.hidden_size // config.num_attention_heads
    rope = RotaryEmbedding(head_dim)

    # 3. one residual stream
    hidden_states = torch.randn(bs, seq_len, config.hidden_size)

    # 4. positions, computed outside so that blocks share them
    cos, sin = rope(hidden_states, seq_len=seq_len)

    # 5. forward
    out_hidden = block(hidden_states=hidden_states, rotary_emb_outputs=(cos, sin))

    assert out_hidden.shape == (2, 64, 512)
    exact = explicit_block(block.double(), hidden_states.double(), cos.double(), sin.double())
    torch.testing.assert_close(out_hidden.double(), exact, atol=1e-5, rtol=1e-5)


def test_verification_1_rope_shapes() -> None:
    cos, sin = RotaryEmbedding(8)(inputs(), seq_len=11)
    assert cos.shape == sin.shape == (11, 8)
    position, pair = torch.arange(11.0, dtype=torch.float64)[:, None], torch.arange(4.0, dtype=torch.float64)
    angles = position * 10000.0 ** (-2 * pair / 8)
    torch.testing.assert_close(cos, torch.cat([angles.cos(), angles.cos()], -1))
    torch.testing.assert_close(sin, torch.cat([angles.sin(), angles.sin()], -1))
    assert RotaryEmbedding(8)(inputs())[0].shape == (11, 8), "the input's own length where none is given"
    assert RotaryEmbedding(8)(inputs().bfloat16())[0].dtype == torch.float32, "half precision would blur positions"
    with pytest.raises(HeadwiseError, match="an even width"):
        RotaryEmbedding(7)


def test_verification_2_attention_forward() -> None:
    attention, x = drawn(W2Attention(CONFIG)), inputs()
    cos, sin = RotaryEmbedding(8)(x)
    y = attention(x, rotary_emb_outputs=(cos, sin))
    torch.testing.assert_close(y, explicit_attention(attention, x, cos, sin))
    flat = torch.zeros(11, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(x), explicit_attention(attention, x, flat + 1, flat))
    batched = attention(x, rotary_emb_outputs=(cos.expand(2, 11, 8), sin.expand(2, 11, 8)))
    torch.testing.assert_close(batched, y)


def test_verification_3_block_forward() -> None:
    block, x = drawn(W2TransformerBlock(CONFIG)), inputs()
    cos, sin = RotaryEmbedding(8)(x)
    torch.testing.assert_close(block(x, (cos, sin)), explicit_block(block, x, cos, sin))


def test_verification_4_gradients() -> None:
    """Every parameter's gradient is that of the explicit distances, and none is zero."""
    block, x = drawn(W2TransformerBlock(CONFIG)), inputs().requires_grad_()
    cos, sin = RotaryEmbedding(8)(x)
    weight = inputs(seed=5)
    parameters = dict(block.named_parameters())
    ours, explicit = (
        torch.autograd.grad((y * weight).sum(), (x, *parameters.values()))
        for y in (block(x, (cos, sin)), explicit_block(block, x, cos, sin))
    )
    for name, a, b in zip(("x", *parameters), ours, explicit):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
        assert a.abs().max() > 0, name


def test_the_block_is_a_layer_of_the_line() -> None:
    """The same tensors in a model built from a line give the same numbers, causal or not."""
    for causal, architecture in ((False, "encoder"), (True, "decoder")):
        block = drawn(W2TransformerBlock(SimpleNamespace(**vars(CONFIG) | {"is_causal": causal})))
        model = hw.build(
            f"llama(architecture={architecture}, d_model=32, n_heads=4, n_layers=1, vocab_size=7, "
            "attention=w2(sigma_dim=head_dim), ffn=swiglu(d_ff=48))"
        ).double()
        model.stack.blocks[0].load_state_dict(block.state_dict())
        ids = torch.randint(7, (2, 11), generator=torch.Generator().manual_seed(0))
        x = model.embedding(ids)
        y = block(x, RotaryEmbedding(8)(x))
        torch.testing.assert_close(model(ids), model.head(model.stack.final_norm(y)))


def test_masks_of_every_shape_keep_out_what_they_should() -> None:
    block, x = drawn(W2TransformerBlock(CONFIG)), inputs()
    rotary = RotaryEmbedding(8)(x)
    padding = torch.ones(2, 11, dtype=torch.long)
    padding[:, 8:] = 0
    alone = block(x[:, :8], tuple(t[:8] for t in rotary))
    for mask in (padding, padding.bool(), padding.double(), padding[:, None, None], padding[:, None, None].bool()):
        torch.testing.assert_close(block(x, rotary, attention_mask=mask)[:, :8], alone)
    assert block(x, rotary, attention_mask=padding).isfinite().all()
    triangle = torch.full((11, 11), -torch.inf, dtype=torch.float64).triu(1)
    causal = drawn(W2TransformerBlock(SimpleNamespace(**vars(CONFIG) | {"is_causal": True})))
    torch.testing.assert_close(block(x, rotary, attention_mask=triangle), causal(x, rotary))
    torch.testing.assert_close(block(x, rotary, attention_mask=triangle[None, None] == 0), causal(x, rotary))


def test_scores_may_be_matched_in_width_and_have_a_tau_a_head() -> None:
    config = SimpleNamespace(**vars(CONFIG) | {"mu_dim": 4, "sigma_dim": 4, "tau": "head"})
    block = W2TransformerBlock(config)
    softmax = hw.get_attention("softmax", d_model=32, n_heads=4)
    n_matched, n_softmax = (sum(p.numel() for p in m.parameters()) for m in (block.attention, softmax))
    assert n_matched == n_softmax + 4
    x = inputs().float()
    assert block(x, RotaryEmbedding(4)(x)).shape == x.shape


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(HeadwiseError, match=r"intermediate_size: missing"):
        W2TransformerBlock(SimpleNamespace(hidden_size=32, num_attention_heads=4))
    with pytest.raises(HeadwiseError, match="hidden_size: a positive whole number is wanted, not '32'"):
        W2Attention(SimpleNamespace(hidden_size="32", num_attention_heads=4, intermediate_size=8))
    block, x = W2TransformerBlock(CONFIG), inputs().float()
    with pytest.raises(HeadwiseError, match=r"cos is \[9, 8\], but the means are \[11 tokens, 8\]"):
        block(x, RotaryEmbedding(8)(x, seq_len=9))
    with pytest.raises(HeadwiseError, match=r"use RotaryEmbedding\(8\)"):
        block(x, RotaryEmbedding(16)(x))
