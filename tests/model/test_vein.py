"""The vein: projector, tri-vein attention and its folding, vein-flow feed-forward, normal compensation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import headwise as hw
from headwise import kernels
from headwise.attention import Context
from headwise.attention.tva import TVA, TVASpec
from headwise.dims import Dims
from headwise.errors import HeadwiseError, SpecError
from headwise.ffn.vft import FEW, VFT, NormalCompensator, VFTSpec
from headwise.io.pretrained import load, save_pretrained
from headwise.model.surgery import fold
from headwise.vein import VeinInnerMap, VeinProjector, vein_parameters

WIDTHS = "d_model=32, n_layers=2, n_heads=4, vocab_size=61, max_seq_len=64"


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 61, shape)


# ---- the projector ----


@settings(max_examples=30)
@given(
    st.integers(2, 40).flatmap(lambda C: st.tuples(st.just(C), st.integers(1, C - 1))),
    st.sampled_from(["linear", "parameter"]),
)
def test_a_tied_orthogonal_start_is_an_orthogonal_projection(widths: tuple[int, int], implementation: Any) -> None:
    """UV is symmetric, equals its square, and so ε ≤ 1, with Pythagoras between what is kept and what is lost."""
    C, r = widths
    vein = VeinProjector(C, r, implementation)
    P = (vein.u_Cr @ vein.v_rC).detach()
    torch.testing.assert_close(P, P.T)
    torch.testing.assert_close(P @ P, P, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(P.trace(), torch.tensor(float(r)))
    x = torch.randn(2, 5, C)
    eps = vein.compute_reconstruction_error(x)
    assert ((eps >= 0) & (eps <= 1 + 1e-5)).all()
    torch.testing.assert_close(vein(x).norm(dim=-1) ** 2 + (eps * x.norm(dim=-1)) ** 2, x.norm(dim=-1) ** 2)
    assert vein.compute_reconstruction_error(vein(x)).max() < 1e-3


def test_an_untied_start_is_no_projection() -> None:
    """As document 000 draws them, V and U are independent: VU ≈ 0, and ε goes past 1."""
    vein = VeinProjector(768, 4, tied_start=False)
    assert (vein.v_rC @ vein.u_Cr).abs().max() < 0.2
    assert vein.compute_reconstruction_error(torch.randn(1, 50, 768)).mean() > 1


@pytest.mark.parametrize("init_method", ["orthogonal", "normal", "xavier"])
def test_both_implementations_start_alike_and_from_the_seed_alone(init_method: Any) -> None:
    def made(implementation: Any, seed: int) -> Tensor:
        vein = VeinProjector(24, 5, implementation, init_method)
        vein.initialise(torch.Generator().manual_seed(seed))
        return vein.v_rC.detach()

    assert torch.equal(made("linear", 1), made("parameter", 1))
    assert not torch.equal(made("linear", 1), made("linear", 2))


def test_a_models_vein_keeps_its_own_start() -> None:
    """The scheme for linear maps must not overwrite it."""
    model = hw.build(f"llama({WIDTHS}, attention=tva(4), ffn=vft(4))", seed=3)
    for name in ("attention", "ffn"):
        vein = model.get_submodule(f"stack.blocks.1.{name}.vein")
        assert isinstance(vein, VeinProjector)
        assert torch.equal(vein.v_rC, vein.u_Cr.T)
        torch.testing.assert_close(vein.v_rC @ vein.u_Cr, torch.eye(4))
    inner = model.get_submodule("stack.blocks.1.ffn.w_in")
    assert isinstance(inner, VeinInnerMap)
    assert 0.3 < inner.weight.std() * 2 < 2  # 1/√4, not the scheme's 0.02
    assert len(vein_parameters(model)) == 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_error_of_any_precision(dtype: torch.dtype) -> None:
    vein, x = VeinProjector(16, 3).to(dtype), torch.randn(2, 4, 16, dtype=dtype)
    eps = vein.compute_reconstruction_error(x)
    assert eps.dtype == torch.promote_types(dtype, torch.float32)
    assert vein.compute_reconstruction_error(torch.zeros(1, 1, 16, dtype=dtype)).item() == 0


def test_error_of_a_zero_vector_has_a_gradient() -> None:
    vein, x = VeinProjector(8, 2), torch.zeros(1, 3, 8, requires_grad=True)
    vein.compute_reconstruction_error(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("rank", [0, 8, 9, -1, True, 2.0])
def test_a_vein_is_narrower_than_what_it_projects(rank: Any) -> None:
    with pytest.raises(SpecError, match="a vein is narrower than d_model=8; allowed: 1 to 7"):
        VeinProjector(8, rank)


def test_wrong_names_are_told_together() -> None:
    with pytest.raises(SpecError, match=r"(?s)implementation: 'conv' given; allowed: linear, parameter.*init_method: "):
        VeinProjector(8, 2, "conv", "zeros")  # type: ignore[arg-type]


# ---- attention ----

WITH_ALL = ["tva(3)", "tva(3, kv_heads=2, qk_norm=true, bias=true)", "tva(2, head_dim=12, implementation=parameter)"]


@torch.no_grad()
@pytest.mark.parametrize("attention", [*WITH_ALL, "pattern(tva(4), softmax, tva(3, vein=model))"])
def test_a_folded_model_gives_the_same_logits(attention: str, tmp_path: Path) -> None:
    """Against the readable form too, which multiplies no maps together; and it counts, saves and loads as folded."""
    model = hw.build(f"llama({WIDTHS}, n_layers=3, attention={attention})".replace("n_layers=2, ", "")).eval()
    for parameter in model.parameters():  # norms away from 1, biases from 0, V from Uᵀ
        parameter.add_(0.05 * torch.randn_like(parameter))
    folded, tokens = fold(model), ids(2, 40)
    with kernels.naive():
        torch.testing.assert_close(folded(tokens), model(tokens), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(folded(tokens), model(tokens), atol=1e-5, rtol=1e-5)
    assert hw.count(folded.spec).params == sum(p.numel() for p in folded.parameters()) < hw.count(model.spec).params
    save_pretrained(folded, tmp_path / "folded")
    assert torch.equal(load(tmp_path / "folded").eval()(tokens), folded(tokens))
    with pytest.raises(HeadwiseError, match=r"nothing in .* folds"):
        fold(folded)


@torch.no_grad()
def test_folding_keeps_dtype_mode_and_the_old_model() -> None:
    model = hw.build(f"transformer({WIDTHS}, attention=tva(3))").bfloat16()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    folded = fold(model)
    assert folded.training
    assert {p.dtype for p in folded.parameters()} == {torch.bfloat16}
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert isinstance(folded.get_submodule("encoder.blocks.0.attention"), TVA)
    assert folded.get_submodule("decoder.blocks.1.attention").spec.folded  # type: ignore[union-attr]


def test_folded_weights_are_those_of_document_000() -> None:
    """147 k in place of 2.36 M at 768/12/4; the cache keeps r numbers a head for each of K and V."""
    dims = Dims(d_model=768, n_heads=12)
    wide, thin = TVASpec(rank=4), TVASpec(rank=4, folded=True)
    assert wide.param_count(dims) == 4 * 768**2 + 2 * 64 * 4 == 2_359_808
    assert thin.param_count(dims) == 4 * 768 * 12 * 4 == 147_456
    assert TVASpec(rank=8).kv_numbers_per_token(dims) == 2 * 12 * 8
    softmax = hw.parse("llama").attention.kv_numbers_per_token(dims)  # type: ignore[attr-defined]
    assert softmax == 8 * TVASpec(rank=8).kv_numbers_per_token(dims)


@torch.no_grad()
@pytest.mark.parametrize("vein", ["head", "model"])
def test_the_cache_holds_rank_numbers_a_head(vein: str) -> None:
    attention = hw.get_attention("tva", d_model=32, n_heads=4, rank=3, vein=vein)
    cache = attention.new_cache()
    attention(torch.randn(1, 16, 32), context=Context(causal=True, cache=cache))
    assert cache.n_bytes == 16 * 2 * 4 * 3 * 4  # tokens, K and V, heads, rank, float32


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_the_maps_are_multiplied_first_only_where_that_is_cheaper(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In decoding it would cost rank times the token's own work; the result is the same either way."""
    attention, x = hw.get_attention("tva", d_model=32, n_heads=4, rank=4), torch.randn(1, tokens, 32)
    assert attention._folding_pays(x) == (tokens == 50)
    fast = attention(x)[0]
    monkeypatch.setattr(TVA, "_folding_pays", lambda self, x: tokens != 50)
    torch.testing.assert_close(attention(x)[0], fast)


def test_gradients_reach_both_maps_of_every_pair() -> None:
    for line in ("tva(3)", "tva(3, vein=model)"):
        model = hw.build(f"llama({WIDTHS}, attention={line})")
        model(ids(2, 30)).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tva(8)", "attention.rank: 8 given, but a vein is narrower than head_dim=8; allowed: 1 to 7"),
        ("tva(32, vein=model)", "attention.rank: 32 given, but a vein is narrower than d_model=32; allowed: 1 to 31"),
        ("tva(4, vein=model, folded=true)", "attention.folded: only vein=head folds"),
    ],
)
def test_lines_that_make_no_vein(line: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        hw.build(f"llama({WIDTHS}, attention={line})")


def test_a_model_wide_layer_does_not_fold() -> None:
    attention = hw.get_attention("tva", d_model=32, n_heads=4, rank=3, vein="model")
    with pytest.raises(HeadwiseError, match=r"tva\(vein=model\) does not fold"):
        attention.fold()
    with pytest.raises(SpecError, match="this layer needs no vein: it is folded"):
        TVA(TVASpec(rank=3, folded=True), Dims(32, 4), VeinProjector(8, 3))


# ---- the feed-forward and its compensation ----


@pytest.mark.parametrize("stabilizer", ["full", "diagonal", "none"])
def test_stabilizers_count_what_they_hold(stabilizer: Any) -> None:
    dims = Dims(d_model=768, n_heads=1)
    held = {"full": 591_360, "diagonal": 768, "none": 0}[stabilizer]
    spec = VFTSpec(rank=4, stabilizer=stabilizer)
    assert spec.param_count(dims) == 6_292 + held == sum(p.numel() for p in VFT(spec, dims).parameters())


def test_a_diagonal_stabilizer_starts_as_nothing() -> None:
    spec, dims, x = VFTSpec(rank=4, stabilizer="diagonal"), Dims(16, 1), torch.randn(2, 3, 16)
    ffn = VFT(spec, dims)
    assert ffn.stabilizer is not None
    assert torch.equal(ffn.stabilizer(x), torch.zeros_like(x))
    torch.nn.init.ones_(ffn.stabilizer.weight)  # type: ignore[arg-type]
    torch.testing.assert_close(ffn.stabilizer(x), F.layer_norm(x, (16,)))


def test_no_directions_are_the_identity() -> None:
    x = torch.randn(2, 3, 16)
    assert NormalCompensator(16, s=0)(x, torch.ones(2, 3)) is x
    assert not list(NormalCompensator(16, s=0).parameters())


@pytest.mark.parametrize("share", [0.0, 0.1, FEW, 0.5, 1.0])
def test_few_tokens_over_the_threshold_are_computed_alone(share: float) -> None:
    """The sparse path equals the dense one, values and gradients, and computes no more tokens than it must."""
    compensator, eps = NormalCompensator(16, s=2, tau=0.5).double(), torch.zeros(4, 10)
    eps.view(-1)[: round(40 * share)] = 1.0
    eps = eps.view(-1)[torch.randperm(40)].view(4, 10)
    x, seen = torch.randn(4, 10, 16, dtype=torch.float64, requires_grad=True), []
    compensator.gate.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[:-1].numel()))

    def run() -> tuple[Tensor, ...]:
        y = compensator(x, eps)
        return (y, *torch.autograd.grad(y.square().sum(), [x, *compensator.parameters()]))

    sparse = run()
    with kernels.naive():
        dense = run()
    torch.testing.assert_close(sparse, dense)
    assert seen == [round(40 * share) if share <= FEW else 40, 40]
    assert torch.equal(sparse[0][eps < 0.5], x[eps < 0.5])
    if share:
        assert not torch.allclose(sparse[0][eps > 0.5], x[eps > 0.5])


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_only_the_soft_gate_teaches_the_vein(gate: Any) -> None:
    """A hard gate passes no gradient through ε, as published; a soft one does, and comes near it when it is steep."""
    ffn = VFT(VFTSpec(rank=3, s_normals=1, tau=0.9, gate=gate, stabilizer="none"), Dims(16, 1)).train()
    x, h = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    out = ffn.finish(x, h)
    out.square().sum().backward()
    grads = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in ffn.vein.parameters()]
    assert grads == [gate == "soft"] * 2
    assert set(ffn.metrics) == {"eps_mean", "eps_max", "eps_frac_over_tau"}
    assert all(v.dim() == 0 and not v.requires_grad for v in ffn.metrics.values())


def test_a_steep_soft_gate_is_the_hard_one() -> None:
    hard, soft = NormalCompensator(16, tau=0.5), NormalCompensator(16, tau=0.5, gate="soft", temperature=1e-4)
    soft.load_state_dict(hard.state_dict())
    x, eps = torch.randn(2, 9, 16), torch.rand(2, 9).round(decimals=1) + 0.03
    torch.testing.assert_close(soft(x, eps), hard(x, eps))


def test_the_stream_is_compensated_by_the_error_of_the_layers_input() -> None:
    """In a model: ε is that of the normed input h, and only tokens that the vein loses are touched."""
    model = hw.build(
        f"llama({WIDTHS}, n_layers=1, ffn=vft(4, s_normals=1, tau=0.93))".replace("n_layers=2, ", "")
    ).eval()
    ffn, seen = model.get_submodule("stack.blocks.0.ffn"), {}
    assert isinstance(ffn, VFT)
    ffn.compensator.register_forward_hook(lambda module, args, out: seen.update(x=args[0], eps=args[1], out=out))
    ffn.register_forward_hook(lambda module, args, out: seen.update(h=args[0]))
    model(ids(2, 30))
    torch.testing.assert_close(seen["eps"], ffn.vein.compute_reconstruction_error(seen["h"]))
    over = seen["eps"] > 0.93
    assert 0 < over.sum() < over.numel()
    assert torch.equal(seen["out"][~over], seen["x"][~over])
    assert (seen["out"][over] != seen["x"][over]).any(-1).all()


def test_metrics_are_taken_in_training_only_and_by_layer() -> None:
    model = hw.build(f"llama({WIDTHS}, ffn=vft(4))")
    model.eval()(ids(1, 9))
    assert model.metrics() == {}
    model.train()(ids(1, 9))
    names = {f"stack.blocks.{n}.ffn.{m}" for n in (0, 1) for m in ("eps_mean", "eps_max", "eps_frac_over_tau")}
    metrics = model.metrics()
    assert set(metrics) == names
    assert 0 < metrics["stack.blocks.0.ffn.eps_mean"] <= metrics["stack.blocks.0.ffn.eps_max"] <= 1


def test_absolute_errors_grow_with_the_width() -> None:
    ffn = VFT(VFTSpec(rank=4, error="absolute"), Dims(768, 1))
    h = F.layer_norm(torch.randn(1, 20, 768), (768,))
    assert (ffn.eps(h) / 768**0.5 - VFT(VFTSpec(rank=4), Dims(768, 1)).eps(h)).abs().max() < 0.02


@pytest.mark.parametrize("fields", [{"s": -1}, {"tau": -0.1}, {"gate": "firm"}, {"gate": "soft", "temperature": 0.0}])
def test_a_compensator_of_impossible_values(fields: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(reversed(fields))):
        NormalCompensator(16, **fields)
