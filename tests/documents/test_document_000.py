"""Every usage example of document 000 (vein-flow and tri-vein attention), against `headwise.blocks`.

Where the document prints a number that is wrong, the right one is asserted and the docstring says so.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headwise as hw
from headwise.attention.tva import TVASpec
from headwise.blocks import (
    NormalCompensator,
    TVAAttention,
    VeinProjector,
    VeinSubspaceShared,
    VFTBlock,
    VFTFeedForward,
    create_vft_block,
    get_attention,
    get_ffn,
    list_attention,
    list_ffn,
    recommend_rank,
    register_attn,
    register_ffn,
)
from headwise.blocks import vein as blocks
from headwise.dims import Dims
from headwise.errors import SpecError
from headwise.ffn.vft import VFTSpec
from headwise.registry import FFN
from headwise.spec import apply_flags, parse
from headwise.vein import vein_parameters


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 128, 768)


# ---- vein projector ----


@pytest.mark.parametrize("implementation", ["linear", "parameter"])
@pytest.mark.parametrize("init_method", ["orthogonal", "normal", "xavier"])
def test_projector_projects_reconstructs_and_measures(x: Tensor, implementation: Any, init_method: Any) -> None:
    """Both implementations hold the same 2·768·4 numbers; the document says the linear one has slightly more."""
    vein = VeinProjector(d_model=768, rank=4, implementation=implementation, init_method=init_method)
    z = vein.project(x)
    x_rec = vein.reconstruct(z)
    error = vein.compute_reconstruction_error(x)
    assert (z.shape, x_rec.shape, error.shape) == ((2, 128, 4), (2, 128, 768), (2, 128))
    torch.testing.assert_close(z, x @ vein.v_rC.T)
    torch.testing.assert_close(x_rec, z @ vein.u_Cr.T)
    torch.testing.assert_close(error, (x - x_rec).norm(dim=-1) / x.norm(dim=-1))
    torch.testing.assert_close(vein.compute_reconstruction_error(x, relative=False), (x - x_rec).norm(dim=-1))
    assert params(vein) == 6144


def test_compression_ratio() -> None:
    """d/(2r): 96 at 768/4; the document prints about 147."""
    vein = VeinProjector(d_model=768, rank=4)
    assert vein.get_compression_ratio() == 96 == 768 * 768 / params(vein)


def test_the_old_name_is_an_alias() -> None:
    assert VeinSubspaceShared is VeinProjector


# ---- tri-vein attention ----


def test_attention_returns_weights_on_request(x: Tensor) -> None:
    attn = TVAAttention(d_model=768, n_heads=12, rank=4, attn_dropout=0.1).eval()
    output, weights = attn(x, return_attention_weights=True)
    assert (output.shape, weights.shape) == ((2, 128, 768), (2, 12, 128, 128))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 12, 128))
    again, nothing = attn(x)
    assert nothing is None
    torch.testing.assert_close(again, output)


def test_attention_is_the_formula(x: Tensor) -> None:
    """q = V Wq x of each head, scale 1/√r, y = Wo concat(U A v)."""
    attn, vein = TVAAttention(768, 12, 4), None
    vein = attn.vein
    assert vein is not None
    assert (vein.d_model, vein.rank) == (64, 4)

    def heads(w: nn.Linear) -> Tensor:
        return vein.project(w(x).unflatten(-1, (12, 64))).transpose(1, 2)

    q, k, v = heads(attn.wq), heads(attn.wk), heads(attn.wv)
    y = (q @ k.mT / 4**0.5).softmax(-1) @ v
    torch.testing.assert_close(attn(x)[0], attn.wo(vein.reconstruct(y).transpose(1, 2).flatten(2)))


def test_attention_with_an_additive_causal_mask(x: Tensor) -> None:
    attn, T = TVAAttention(d_model=768, n_heads=12, rank=4), 128
    mask = torch.zeros(1, 1, T, T)
    mask[:, :, :, :] = torch.triu(torch.full((T, T), -torch.inf), diagonal=1)
    output, _ = attn(x, attn_mask=mask)
    changed = x.clone()
    changed[:, 100:] += 1
    torch.testing.assert_close(attn(changed, attn_mask=mask)[0][:, :100], output[:, :100])
    assert not torch.allclose(attn(x)[0], output)


def test_attentions_that_share_a_projector(x: Tensor) -> None:
    """The document's projector is as wide as the model, so all maps are r×r, inside the vein."""
    shared = VeinProjector(d_model=768, rank=4)
    attn1 = TVAAttention(d_model=768, n_heads=12, rank=4, vein_projector=shared)
    attn2 = TVAAttention(d_model=768, n_heads=12, rank=4, vein_projector=shared)
    assert attn1.vein is attn2.vein is shared
    assert params(nn.ModuleList([attn1, attn2])) == 6144 + 2 * 4 * 12 * 4 * 4
    z = shared.project(x)
    q, k, v = (w(z).unflatten(-1, (12, 4)).transpose(1, 2) for w in (attn1.wq, attn1.wk, attn1.wv))
    y = (q @ k.mT / 2).softmax(-1) @ v
    torch.testing.assert_close(attn1(x)[0], shared.reconstruct(attn1.wo(y.transpose(1, 2).flatten(2))))


def test_a_projector_of_a_heads_width_is_shared_too(x: Tensor) -> None:
    shared = VeinProjector(d_model=64, rank=4)
    attn = TVAAttention(768, 12, 4, vein_projector=shared)
    assert attn.spec.vein == "head"
    assert attn(x)[0].shape == x.shape
    with pytest.raises(SpecError, match="a projector of rank 5 and width 64 given, but this layer needs rank 4"):
        TVAAttention(768, 12, 4, vein_projector=VeinProjector(64, 5))


# ---- feed-forward ----


def test_feed_forward(x: Tensor) -> None:
    ffn = VFTFeedForward(d_model=768, rank=4, r_hidden=16, activation="silu", dropout=0.1).eval()
    z = F.silu(F.linear(ffn.vein.project(x), ffn.w_in.weight, ffn.w_in.bias))
    inside = ffn.vein.reconstruct(F.linear(z, ffn.w_out.weight, ffn.w_out.bias))
    assert ffn.stabilizer is not None
    torch.testing.assert_close(ffn(x), inside + ffn.stabilizer(x))
    without = VFTFeedForward(d_model=768, rank=4, use_stabilizer=False)
    assert without.stabilizer is None
    assert without(x).shape == x.shape
    with pytest.raises(SpecError, match=r"activation: unknown value 'tanh'.*allowed: gelu, gelu_tanh"):
        VFTFeedForward(768, 4, activation="tanh")


def test_parameters_of_the_feed_forwards() -> None:
    """The document claims about 30,000 times fewer; it counts neither vein nor stabilizer. It is 750 times without the
    stabilizer and 7.9 times as published."""
    standard = params(get_ffn("standard", d_model=768, d_ff=3072))
    published, bare = params(VFTFeedForward(768, 4)), params(VFTFeedForward(768, 4, use_stabilizer=False))
    assert (standard, published, bare) == (4_718_592, 597_652, 6_292)
    assert round(standard / bare) == 750
    assert round(standard / published, 1) == 7.9


# ---- normal compensation ----


def test_compensator_corrects_the_tokens_over_the_threshold(x: Tensor) -> None:
    vein = VeinProjector(768, 4)
    x[0, :64] = vein(x[0, :64])  # in the vein: nothing is lost
    eps = vein.compute_reconstruction_error(x)
    compensator = NormalCompensator(d_model=768, s=1, tau=0.18, alpha_scale=0.5)
    output = compensator(x, eps)
    assert torch.equal(output[0, :64], x[0, :64])
    alpha = 0.5 * torch.sigmoid(compensator.gate(F.layer_norm(x, (768,))))
    expected = x + alpha * (x @ compensator.v_sC.T) * compensator.u_sC
    torch.testing.assert_close(output[1], expected[1])
    assert params(compensator) == 3 * 768 + 1


def test_after_a_norm_the_documents_absolute_error_is_always_over_its_threshold(x: Tensor) -> None:
    """‖x‖ is √768 ≈ 27.7 there. The document prints ε of 0.12 to 0.45, which only a relative error can be."""
    vein = VeinProjector(768, 4)
    h = F.layer_norm(x, (768,))
    assert vein.compute_reconstruction_error(h, relative=False).min() > 20
    assert vein.compute_reconstruction_error(h).max() <= 1


# ---- the block ----


def test_block_with_metrics(x: Tensor) -> None:
    block = VFTBlock(
        d_model=768, n_heads=12, rank=4, r_hidden=16, s_normals=1, tau=0.18,
        attn_dropout=0.1, ffn_dropout=0.1, activation="silu",
    ).eval()  # fmt: skip
    output, metrics = block(x, return_metrics=True)
    assert output.shape == x.shape
    assert set(metrics) == {"eps_mean", "eps_max", "eps_frac_over_tau", "rank"}
    assert metrics["rank"] == 4
    assert 0 < metrics["eps_mean"] <= metrics["eps_max"] <= 1
    assert 0 <= metrics["eps_frac_over_tau"] <= 1
    again, nothing = block(x)
    assert torch.equal(again, output)
    assert nothing == {}


def test_block_is_its_parts(x: Tensor) -> None:
    """x += attn(LN x); h = LN x; x += ffn(h); x compensated where ε(h) > τ."""
    block = create_vft_block(d_model=768, n_heads=12, rank=4)
    y = x + block.attention(block.attention_norm(x))[0]
    h = block.ffn_norm(y)
    y = block.ffn.compensator(y + block.ffn(h), block.ffn.vein.compute_reconstruction_error(h))
    torch.testing.assert_close(block(x)[0], y)


def test_a_model_of_blocks() -> None:
    """The document's VFTModel, smaller. Its blocks are bidirectional unless a mask is given, as here."""

    class VFTModel(nn.Module):
        def __init__(self, vocab_size: int, d_model: int, n_layers: int, n_heads: int, rank: int) -> None:
            super().__init__()
            self.embed = nn.Embedding(vocab_size, d_model)
            self.blocks = nn.ModuleList(create_vft_block(d_model, n_heads, rank) for _ in range(n_layers))
            self.norm = nn.LayerNorm(d_model)
            self.lm_head = nn.Linear(d_model, vocab_size)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            T = input_ids.shape[1]
            causal = torch.ones(T, T, dtype=torch.bool).tril()
            for block in self.blocks:
                x, _ = block(x, attn_mask=causal)
            return self.lm_head(self.norm(x))

    model, ids = VFTModel(50, 64, 3, 4, 4), torch.randint(50, (2, 9))
    logits = model(ids)
    assert logits.shape == (2, 9, 50)
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % 50
    assert torch.equal(model(changed)[:, :5], logits[:, :5])
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- the registry ----


def test_lists_hold_the_documents_names() -> None:
    assert {"tva", "standard"} <= set(list_attention())
    assert {"vft", "standard"} <= set(list_ffn())


def test_modules_by_name(x: Tensor) -> None:
    attn, std_attn = (
        get_attention("tva", d_model=768, n_heads=12, rank=4),
        get_attention("standard", d_model=768, n_heads=12),
    )
    assert params(attn) == params(TVAAttention(768, 12, 4)) == 2_359_808
    assert params(std_attn) == 4 * 768 * 768
    for module in (attn, std_attn):
        output, weights = module(x)
        assert output.shape == x.shape
        assert weights is None
    assert get_ffn("vft", d_model=768, rank=4)(x).shape == x.shape
    assert get_ffn("standard", d_model=768, d_ff=3072)(x).shape == x.shape
    with pytest.raises(SpecError, match="unknown attention 'tvaa' \\(did you mean 'tva'\\?\\)"):
        get_attention("tvaa", d_model=768, n_heads=12)


def test_a_mechanism_of_ones_own(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    monkeypatch.setattr(blocks, "_own", {"attention": {}, "ffn": {}})

    @register_attn("my_custom_attn")
    class CustomAttention(nn.Module):
        def __init__(self, d_model: int, n_heads: int, **kwargs: Any) -> None:
            super().__init__()
            self.mix = nn.Linear(d_model, d_model)

        def forward(self, x: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
            return self.mix(x.mean(1, keepdim=True)).expand_as(x), None

    register_ffn("my_ffn")(nn.Identity)
    attn = get_attention("my_custom_attn", d_model=768, n_heads=12)
    assert isinstance(attn, CustomAttention)
    assert attn(x)[0].shape == x.shape
    assert "my_custom_attn" in list_attention()
    assert get_ffn("my_ffn")(x) is x
    with pytest.raises(hw.HeadwiseError, match="'tva' is registered already"):
        register_attn("tva")


def test_the_command_lines_flags() -> None:
    """`--attn.impl tva --ffn.impl vft --vft.rank 4 --model.d_model 768`."""
    flags = {"attn.impl": "tva", "ffn.impl": "vft", "vft.rank": "4", "model.d_model": "768"}
    assert str(apply_flags(parse("llama"), flags)) == "llama(d_model=768, attention=tva(4), ffn=vft(4))"
    argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "headwise", "show", "llama", *argv, "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "tva(4)" in done.stdout


# ---- usage examples ----


def test_example_1_a_single_block() -> None:
    block = VFTBlock(d_model=512, n_heads=8, rank=4)
    x = torch.randn(4, 64, 512)
    output, metrics = block(x, return_metrics=True)
    assert output.shape == x.shape
    assert f"{metrics['eps_mean']:.4f}".startswith("0.9")  # a random vein of 4 keeps little of 512 dimensions
    assert f"{metrics['eps_frac_over_tau']:.2%}" == "100.00%"


def test_example_2_attention_replaced_in_ones_own_block() -> None:
    class MyTransformerBlock(nn.Module):
        def __init__(self, d_model: int, n_heads: int, rank: int = 4) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
            self.attn = TVAAttention(d_model, n_heads, rank)
            self.ffn = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

        def forward(self, x: Tensor) -> Tensor:
            attn_out, _ = self.attn(self.norm1(x))
            x = x + attn_out
            return x + self.ffn(self.norm2(x))

    block, x = MyTransformerBlock(64, 4), torch.randn(2, 10, 64)
    output = block(x)
    output.sum().backward()
    assert output.shape == x.shape
    before = output.detach()
    block.attn = block.attn.fold()  # type: ignore[assignment]
    torch.testing.assert_close(block(x), before, atol=1e-5, rtol=1e-5)


def test_example_3_an_encoder() -> None:
    class VFTEncoder(nn.Module):
        def __init__(self, vocab_size: int, d_model: int, n_layers: int, n_heads: int = 8, rank: int = 4) -> None:
            super().__init__()
            self.embed = nn.Embedding(vocab_size, d_model)
            self.pos_embed = nn.Parameter(torch.randn(1, 512, d_model) * 0.02)
            self.layers = nn.ModuleList(VFTBlock(d_model, n_heads, rank) for _ in range(n_layers))
            self.norm = nn.LayerNorm(d_model)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids) + self.pos_embed[:, : input_ids.size(1), :]
            for layer in self.layers:
                x, _ = layer(x)
            return self.norm(x)

    encoder, input_ids = VFTEncoder(300, d_model=128, n_layers=3), torch.randint(300, (2, 128))
    output = encoder(input_ids)
    assert output.shape == (2, 128, 128)
    later = input_ids.clone()
    later[:, -1] = (later[:, -1] + 1) % 300
    assert not torch.allclose(encoder(later)[:, 0], output[:, 0]), "an encoder sees what comes later"


def test_example_3_as_a_line() -> None:
    """The whole encoder–decoder that the example's title speaks of."""
    spec = parse("transformer(d_model=64, n_layers=2, n_heads=4, attention=tva(rank=4), ffn=vft(rank=4, s_normals=1))")
    model = hw.build(spec)
    logits = model(torch.randint(65, (2, 7)), encoder_ids=torch.randint(65, (2, 11)))
    assert logits.shape == (2, 7, 65)
    assert params(model) == hw.count(spec).params


def test_example_4_half_standard_half_vein() -> None:
    class StandardLayer(nn.Module):
        def __init__(self, d_model: int, n_heads: int) -> None:
            super().__init__()
            self.attn = get_attention("standard", d_model=d_model, n_heads=n_heads)
            self.ffn = get_ffn("standard", d_model=d_model)
            self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            x = x + self.attn(self.norm1(x))[0]
            return x + self.ffn(self.norm2(x)), None

    class HybridModel(nn.Module):
        def __init__(self, d_model: int, n_layers: int, n_heads: int, rank: int = 4) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                StandardLayer(d_model, n_heads) if i < n_layers // 2 else VFTBlock(d_model, n_heads, rank)
                for i in range(n_layers)
            )

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x, _ = layer(x)
            return x

    model, x = HybridModel(96, n_layers=4, n_heads=6), torch.randn(2, 8, 96)
    assert model(x).shape == x.shape
    half = params(model.layers[0])
    assert half == 12 * 96 * 96 + 4 * 96
    assert params(model) == 2 * half + 2 * params(VFTBlock(96, 6, 4))
    line = "llama(d_model=96, n_layers=4, n_heads=6, attention=pattern(softmax, softmax, tva(4), tva(4)))"
    assert [parse(line).attention.at(i).kind for i in range(4)] == ["softmax", "softmax", "tva", "tva"]


def test_example_5_how_much_is_computed() -> None:
    """At T=128, d=768, r=4 the document claims 192× for attention, 2000× for the feed-forward, 100× for the block.

    Counted in multiplications, with folded attention: 16×, 752× (7.9× with the published stabilizer), and 9.6× for both
    together. Measured times are on the page of `tva`.
    """
    dims = Dims(d_model=768, n_heads=12)
    standard = get_attention("standard", d_model=768, n_heads=12).spec.flops_per_token(dims, 128, causal=False)
    folded = TVASpec(rank=4, folded=True).flops_per_token(dims, 128, causal=False)
    assert standard / folded == 16
    std_ffn = FFN.spec({"kind": "standard", "d_ff": 3072}).flops_per_token(dims, 128, causal=False)
    vft_ffn = {s: VFTSpec(rank=4, stabilizer=s).flops_per_token(dims, 128, causal=False) for s in ("full", "none")}
    assert round(std_ffn / vft_ffn["none"]) == 752
    assert round(std_ffn / vft_ffn["full"], 1) == 7.9
    assert round((standard + std_ffn) / (folded + vft_ffn["full"]), 1) == 9.6


def test_example_6_how_many_parameters() -> None:
    """A standard block has 7.08 M, as the document says. A VFT block has 2.96 M, not about 1.5 M: the maps of its heads
    are as large as ever until they are folded, and then it has 0.75 M."""
    standard = params(get_attention("standard", d_model=768, n_heads=12)) + params(get_ffn("standard", d_model=768))
    block = VFTBlock(d_model=768, n_heads=12, rank=4)
    assert (standard, params(block)) == (7_077_888, 2_962_837)
    assert round(standard / params(block), 2) == 2.39
    block.attention = block.attention.fold()  # type: ignore[assignment]
    assert params(block.attention) == 4 * 768 * 12 * 4 == 147_456
    assert params(block) == 750_485
    assert round(standard / params(block), 1) == 9.4


# ---- best practice ----


def test_practice_1_the_recommended_rank() -> None:
    """√d/4, between 2 and 32. The document's comments print 4, 8 and 16; the rule gives 6, 11 and 16."""
    assert [recommend_rank(d) for d in (768, 2048, 4096)] == [6, 11, 16]
    assert (recommend_rank(16), recommend_rank(10**6)) == (2, 32)
    with pytest.raises(SpecError, match="a width of at least 3 is wanted, not 2"):
        recommend_rank(2)


@pytest.mark.parametrize("s", [0, 1, 2, 3])
def test_practice_2_directions_and_threshold(s: int) -> None:
    """A lower τ corrects more tokens; where too many are corrected, raise it, not lower it as the document says."""
    x = torch.randn(2, 16, 64)
    corrected = []
    for tau in (0.25, 0.9, 1.0):
        block = VFTBlock(64, 4, 4, s_normals=s, tau=tau)
        corrected.append(block(x, return_metrics=True)[1]["eps_frac_over_tau"])
        assert params(block.ffn.compensator) == s * (3 * 64 + 1)
    assert corrected[0] == 1.0
    assert corrected[0] >= corrected[1] >= corrected[2] == 0.0


def test_practice_3_warnings_from_the_error() -> None:
    """The two conditions the document watches, on a block whose vein holds nothing of its input, and one that holds all
    of it."""
    x = torch.randn(4, 32, 64)
    block = VFTBlock(d_model=64, n_heads=4, rank=4)
    _, metrics = block(x, return_metrics=True)
    assert metrics["eps_mean"] > 0.3
    assert metrics["eps_frac_over_tau"] > 0.5
    block.ffn_norm = nn.Identity()  # type: ignore[assignment]
    nn.init.zeros_(block.attention.wo.weight)  # so that h = x
    _, metrics = block(block.ffn.vein(x), return_metrics=True)
    assert metrics["eps_max"] < 1e-5
    assert metrics["eps_frac_over_tau"] == 0


def test_practice_4_replacing_part_by_part() -> None:
    """Feed-forward, then attention, then the whole block; as lines, they differ by one part each."""

    class Phase(nn.Module):
        def __init__(self, attention: nn.Module, ffn: nn.Module) -> None:
            super().__init__()
            self.attn, self.ffn = attention, ffn
            self.norm1, self.norm2 = nn.LayerNorm(768), nn.LayerNorm(768)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.norm1(x))[0]
            return x + self.ffn(self.norm2(x))

    x = torch.randn(1, 8, 768)
    phase1 = Phase(get_attention("standard", d_model=768, n_heads=12), get_ffn("vft", d_model=768, rank=4))
    phase2 = Phase(get_attention("tva", d_model=768, n_heads=12, rank=4), get_ffn("vft", d_model=768, rank=4))
    phase3 = VFTBlock(768, 12, 4)
    assert phase1(x).shape == phase2(x).shape == phase3(x)[0].shape == x.shape
    assert params(phase1) == 4 * 768 * 768 + 597_652 + 4 * 768
    assert params(phase2) - params(phase1) == 2 * 64 * 4  # unfolded, the vein comes on top
    assert params(phase3) - params(phase2) == 3 * 768 + 1  # the compensation
    lines = ["llama", "llama(ffn=vft(4))", "llama(attention=tva(4), ffn=vft(4))"]
    lines.append("llama(attention=tva(4), ffn=vft(4, s_normals=1))")
    assert [str(parse(line)) for line in lines] == [*lines[:3], lines[3]]
    counts = [hw.count(line).params for line in lines]
    assert counts[1] < counts[0]


def test_practice_5_a_smaller_learning_rate_for_the_vein() -> None:
    block = VFTBlock(64, 4, 4)
    vein = vein_parameters(block)
    others = [p for name, p in block.named_parameters() if name not in vein]
    optimizer = torch.optim.AdamW([{"params": list(vein.values()), "lr": 1e-4}, {"params": others, "lr": 5e-4}])
    assert set(vein) == {f"{part}.vein.{map_}.weight" for part in ("attention", "ffn") for map_ in "UV"}
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    block(torch.randn(2, 8, 64))[0].square().mean().backward()
    optimizer.step()
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in block.named_parameters()}
    assert all(moved[name] < 1.5e-4 for name in vein)
    assert moved["attention.wq.weight"] > 4e-4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the vein keeps what matters and the rest is left behind. " * 60)
    return str(path)


LINE = "llama(d_model=16, n_layers=2, n_heads=2, attention=tva(4), ffn=vft(4, s_normals=1))"
QUICK: dict[str, Any] = {"steps": 6, "seq_len": 16, "batch_size": 2, "threads": 1, "log_every": 1, "lr": 5e-3}


def test_practice_5_as_training_settings(text: str) -> None:
    """Learning rate, frozen start and τ on a schedule: `headwise train LINE --vein-lr 0.2 --vein-freeze 3
    --tau-schedule 0.25,0.18,0.10`."""
    started = hw.build(hw.train(LINE, data=text, **{**QUICK, "steps": 1}).spec, seed=0)
    frozen = hw.train(LINE, data=text, vein_freeze=6, **QUICK).model
    for name, parameter in vein_parameters(frozen).items():
        assert torch.equal(parameter, started.get_parameter(name))
    assert not torch.equal(frozen.get_parameter("embedding.weight"), started.get_parameter("embedding.weight"))
    result = hw.train(LINE, data=text, vein_lr=0.2, vein_freeze=3, tau_schedule=(0.25, 0.18, 0.10), **QUICK)
    assert result.model.stack.blocks[0].ffn.compensator.tau == 0.10  # type: ignore[union-attr, index]
    moved = [(p - started.get_parameter(name)).abs().max().item() for name, p in vein_parameters(result.model).items()]
    assert 0 < max(moved) < 3 * 0.2 * 5e-3


def test_practice_5_the_error_of_every_layer_is_logged(text: str) -> None:
    """The document's loop over modules, and what a run logs by itself."""
    result = hw.train(LINE, data=text, **QUICK)
    for record in result.history:
        for layer in range(2):
            assert 0 < record[f"stack.blocks.{layer}.ffn.eps_mean"] <= record[f"stack.blocks.{layer}.ffn.eps_max"] < 1.5
            assert 0 <= record[f"stack.blocks.{layer}.ffn.eps_frac_over_tau"] <= 1
    model, x = nn.Sequential(VFTBlock(32, 4, 4), VFTBlock(32, 4, 4)), torch.randn(1, 5, 32)
    lines = []
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, VFTBlock):
                x, metrics = module(x, return_metrics=True)
                lines.append(f"{name}: eps_mean={metrics['eps_mean']:.4f}")
    assert [line[:12] for line in lines] == ["0: eps_mean=", "1: eps_mean="]


def test_questions_experts_inside_the_vein() -> None:
    """ "MoE can be built in the vein": a field of the mixture here."""
    spec = parse("llama(d_model=32, n_layers=1, n_heads=4, ffn=moe(4, 2, rank=8))")
    model = hw.build(spec)
    assert params(model) == hw.count(spec).params
    assert vein_parameters(model)
