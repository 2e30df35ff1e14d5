"""Wasserstein-2 attention: the distances written out, the fast form against them, τ, widths, and half precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwise import kernels
from headwise.attention import Context
from headwise.attention.w2 import W2Attention, W2Spec
from headwise.cache import LayerCache
from headwise.dims import Dims
from headwise.errors import SpecError
from headwise.kernels.attention import sdpa
from headwise.kernels.w2 import fast
from headwise.kernels.w2 import naive as distances
from headwise.registry import ATTENTION, POSITION, get_attention
from headwise.spec import count, parse

DIMS = Dims(d_model=32, n_heads=4)


def draws(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(*, d_model: int = 32, n_heads: int = 4, std: float = 0.3, **fields: Any) -> W2Attention:
    """A layer in float64 whose every parameter is drawn, τ's among them."""
    attention = get_attention("w2", d_model=d_model, n_heads=n_heads, **fields).double()
    with torch.no_grad():
        for n, parameter in enumerate(attention.parameters()):
            parameter.copy_(std * draws(*parameter.shape, seed=n))
    return attention


def context(T: int, width: int, position: str = "none", **more: Any) -> Context:
    code = POSITION.build(position, DIMS)
    return Context(encoding=code.encode(torch.arange(T), T, width), **more)


# ---- what is computed ----


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def turned(mu: list[float], position: int) -> list[float]:
    """RoPE by hand: n is paired with n + D/2."""
    half = len(mu) // 2
    out = list(mu)
    for n in range(half):
        angle = position * 10000.0 ** (-2 * n / len(mu))
        a, b = mu[n], mu[n + half]
        out[n] = a * math.cos(angle) - b * math.sin(angle)
        out[n + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize("score", ["w2", "precision"])
def test_weights_are_those_of_the_formula_written_out_in_python(score: str) -> None:
    """Two Gaussians a pair: means that RoPE turns, deviations that it does not, τ of the head, GQA."""
    T, D_mu, D_sigma = 5, 4, 4
    attention = layer(score=score, tau="head", kv_heads=2)
    x = draws(1, T, 32, seed=9)
    _, weights = attention(x, context=context(T, 4, "rope", causal=True), return_attention_weights=True)
    q = (x @ attention.wq.weight.T).view(T, 4, D_mu + D_sigma).tolist()
    k = (x @ attention.wk.weight.T).view(T, 2, D_mu + D_sigma).tolist()
    for h in range(4):
        start = math.sqrt(6 * (D_mu + D_sigma / 16)) if score == "w2" else 2.0
        tau = start * math.exp(attention.log_tau[h].item()) + 1e-6
        for i in range(T):
            scores = []
            for j in range(i + 1):
                means = [turned(z[:D_mu], p) for z, p in ((q[i][h], i), (k[j][h // 2], j))]
                deviations = [[softplus(s) + 1e-4 for s in z[D_mu:]] for z in (q[i][h], k[j][h // 2])]
                if score == "w2":
                    distance = sum((a - b) ** 2 for pair in (means, deviations) for a, b in zip(*pair))
                else:
                    scaled = [[m / math.sqrt(s) for m, s in zip(*z)] for z in zip(means, deviations)]
                    distance = sum((a - b) ** 2 for a, b in zip(*scaled)) + sum(map(math.log, deviations[1]))
                scores.append(-distance / tau)
            total = sum(map(math.exp, scores))
            expected = [math.exp(s) / total for s in scores] + [0.0] * (T - 1 - i)
            torch.testing.assert_close(weights[0, h, i], torch.tensor(expected).double(), atol=1e-12, rtol=1e-6)


def test_a_distance_is_that_between_the_gaussians() -> None:
    """‖μ − μ'‖² + tr(Σ + Σ' − 2(ΣΣ')^½) of diagonal covariances, from numpy's side of the definition."""
    a, b = (draws(1, 1, 6, 8, seed=s) for s in (1, 2))
    a[..., 4:], b[..., 4:] = a[..., 4:].exp(), b[..., 4:].exp()
    scores = distances.scores(a, b, None, torch.ones(1, 1, 1))
    for i in range(6):
        for j in range(6):
            (mu, sd), (mu2, sd2) = a[0, 0, i].split(4), b[0, 0, j].split(4)
            trace = (sd.square() + sd2.square() - 2 * (sd.square() * sd2.square()).sqrt()).sum()
            torch.testing.assert_close(-scores[0, 0, i, j], (mu - mu2).square().sum() + trace)


def test_positions_turn_the_means_and_leave_the_deviations() -> None:
    attention = layer()
    x = draws(1, 7, 32)
    (q0, k0, v0), (q, k, v) = (attention._heads(x, context(7, 4, code)) for code in ("none", "rope"))
    assert torch.equal(q[..., 4:], q0[..., 4:])
    assert torch.equal(k[..., 4:], k0[..., 4:])
    assert torch.equal(v, v0)
    assert not torch.allclose(q[:, :, 1:, :4], q0[:, :, 1:, :4])
    assert q[..., 4:].min() > 0
    torch.testing.assert_close(q[..., :4].norm(dim=-1), q0[..., :4].norm(dim=-1))


# ---- the fast form ----


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    T = draw(st.sampled_from([1, 2, 5, 257]))
    return {
        "fields": {
            "kv_heads": draw(st.sampled_from([1, 2, 4])),
            "tau": draw(st.sampled_from(["layer", "head", "fixed"])),
            **draw(
                st.sampled_from([{}, {"score": "precision"}, {"sigma_dim": "head_dim"}, {"mu_dim": 2, "sigma_dim": 3}])
            ),
        },
        "T": T,
        "causal": draw(st.booleans()),
        "position": draw(st.sampled_from(["none", "rope", "alibi"])),
        "segments": draw(st.booleans()),
        "mask": draw(st.sampled_from([None, "bool", "float"])),
    }


@settings(max_examples=60)
@given(situations())
def test_fast_form_equals_the_distances_in_every_situation(case: dict[str, Any]) -> None:
    attention, T = layer(**case["fields"]), case["T"]
    x = draws(2, T, 32).requires_grad_()
    segments = torch.arange(T).div(3, rounding_mode="floor").expand(2, T)
    given = context(
        T, attention.mu_dim, case["position"], causal=case["causal"],
        segments=(segments, segments) if case["segments"] else None,
    )  # fmt: skip
    mask = None
    if case["mask"] == "bool":
        mask = (draws(1, 1, T, T, seed=3) > -0.5) | torch.eye(T, dtype=torch.bool)
    elif case["mask"] == "float":
        mask = draws(1, 4, T, T, seed=3)
    weight = draws(2, T, 32, seed=4)
    results = []
    for naive in (True, False):
        if naive:
            with kernels.naive():
                y, _ = attention(x, mask, context=given)
        else:
            y, _ = attention(x, mask, context=given)
        results.append((y, *torch.autograd.grad((y * weight).sum(), (x, *attention.parameters()))))
    torch.testing.assert_close(results[1], results[0], atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("fields", [{}, {"sigma_dim": "head_dim"}, {"score": "precision"}])
def test_fast_form_in_float32_is_within_1e_6_and_errs_no_more_than_the_distances(fields: dict[str, Any]) -> None:
    """At heads of 64, against float64. The precision score starts sharper, so both its forms err more."""
    attention = get_attention("w2", d_model=256, n_heads=4, **fields)
    x = draws(1, 700, 256)
    given = context(700, attention.mu_dim, "rope", causal=True)
    with torch.no_grad():
        quick = attention(x.float(), context=given)[0]
        with kernels.naive():
            plain = attention(x.float(), context=given)[0]
            exact = attention.double()(x, context=given)[0]
    if attention.score == "w2":
        torch.testing.assert_close(quick, plain, atol=1e-6, rtol=0)
    assert (quick - exact).norm() <= 1.2 * (plain - exact).norm()


def error_in_bf16(q: Tensor, k: Tensor, v: Tensor, tau: Tensor, *, split: bool) -> float:
    """Relative error of the fast form in bfloat16, against float64 distances of the same rounded points."""
    scores = distances.scores(q.double(), k.double(), None, tau.double())
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    exact = scores.masked_fill(~keep, -torch.inf).softmax(-1) @ v.double()
    if split:
        q2, k2 = fast.products(q, k, None, tau)
    else:
        q2, k2 = (t.to(q.dtype) for t in fast.products(q.float(), k.float(), None, tau))
    y = sdpa.attention(q2, k2, v, scale=1.0)
    return ((y.double() - exact).norm() / exact.norm()).item()


def test_key_term_keeps_its_bits_in_half_precision() -> None:
    """Points far from the origin: ‖k‖² is some 500 and moves a score by its rounding, unless it is split in two."""
    q, k, v = (draws(1, 2, 512, 32, seed=s, dtype=torch.float32) for s in range(3))
    q, k, v = ((t + shift).bfloat16() for t, shift in ((q, 4), (k, 4), (v, 0)))
    tau = torch.full((1, 1, 1), 6.0)
    split, whole = (error_in_bf16(q, k, v, tau, split=s) for s in (True, False))
    assert split < 0.03, f"{split:.3f}"
    assert whole > 5 * split, f"the measure must see a term that lost its bits: {whole:.3f} against {split:.3f}"


# ---- τ ----


@pytest.mark.parametrize("fields", [{}, {"sigma_dim": "head_dim"}])
def test_scores_start_at_the_scale_of_dot_products(fields: dict[str, Any]) -> None:
    """The spread of a query's scores over its keys, for projections' outputs of standard deviation ½."""
    T, D = 1500, 64
    attention = get_attention("w2", d_model=4 * D, n_heads=4, **fields)
    with torch.no_grad():
        for seed, w in enumerate((attention.wq.weight, attention.wk.weight), 1):
            w.copy_(0.5 / math.sqrt(4 * D) * draws(*w.shape, seed=seed))
        q, k, _ = attention._heads(draws(1, T, 4 * D, dtype=torch.float32), Context())
        scores = distances.scores(q, k, None, attention.temperature(q))
        plain = (draws(1, 4, T, D, seed=5) * 0.5) @ (draws(1, 4, T, D, seed=6) * 0.5).transpose(-1, -2) / math.sqrt(D)
    ours, theirs = ((s - s.mean(-1, keepdim=True)).square().mean().sqrt().item() for s in (scores, plain))
    assert ours == pytest.approx(theirs, rel=0.05)


def test_tau_is_learned_a_layer_or_a_head_or_not_at_all() -> None:
    x = draws(1, 9, 32)
    for tau, shape in (("layer", (1,)), ("head", (4,))):
        attention = get_attention("w2", d_model=32, n_heads=4, tau=tau).double()
        assert torch.equal(attention.log_tau, torch.zeros(shape, dtype=torch.float64)), "no random start"
        attention(x)[0].square().sum().backward()
        assert attention.log_tau.grad.shape == shape
        assert (attention.log_tau.grad != 0).all()
    fixed = get_attention("w2", d_model=32, n_heads=4, tau="fixed").double()
    assert fixed.log_tau is None
    assert not [name for name, _ in fixed.named_parameters() if "tau" in name]


def test_a_heads_tau_is_its_own_and_sharpens_its_weights() -> None:
    attention, x = layer(tau="head"), draws(1, 9, 32)
    _, before = attention(x, return_attention_weights=True)
    with torch.no_grad():
        attention.log_tau[2] -= 3.0
    _, after = attention(x, return_attention_weights=True)
    same = [h for h in range(4) if torch.equal(before[:, h], after[:, h])]
    assert same == [0, 1, 3]
    assert after[:, 2].max(-1).values.mean() > before[:, 2].max(-1).values.mean()
    assert (attention.temperature(x) > 0).all()


# ---- widths, counts, lines ----


def widths(d_model: int = 64, n_heads: int = 1, **fields: Any) -> tuple[int, int]:
    spec = ATTENTION.spec({"kind": "w2", **fields})
    assert isinstance(spec, W2Spec)
    return spec.widths(Dims(d_model, n_heads))


def test_widths_left_out_are_what_the_other_leaves() -> None:
    assert widths() == (32, 32)
    assert widths(sigma_dim=16) == (48, 16)
    assert widths(mu_dim=16) == (16, 48)
    assert widths(sigma_dim="head_dim") == widths(sigma_dim=64) == widths(mu_dim=64) == (64, 64)
    assert widths(mu_dim=10, sigma_dim=7) == (10, 7)
    assert widths(d_model=6) == (4, 2), "the means' width is even where it can be: RoPE turns pairs"


def test_the_matched_width_has_softmax_attentions_parameters_and_one_more() -> None:
    size = "d_model=768, n_heads=12, n_layers=1"
    softmax, matched, wide = (
        count(f"llama({size}, attention={kind})").params_by_part["attention"]
        for kind in ("softmax", "w2", "w2(sigma_dim=head_dim)")
    )
    assert softmax == 4 * 768**2
    assert matched == softmax + 1
    assert wide == softmax + 2 * 768**2 + 1


def test_a_cache_keeps_means_deviations_and_values() -> None:
    for fields, numbers in (({}, 2 * 16), ({"sigma_dim": "head_dim"}, 2 * 24)):
        attention = layer(kv_heads=2, **fields)
        cache = LayerCache()
        attention(draws(1, 32, 32), context=Context(causal=True, cache=cache))
        assert attention.spec.kv_numbers_per_token(DIMS) == numbers
        assert cache.n_bytes == 32 * numbers * 8


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("llama(attention=w2(sigma_dim=half))", "sigma_dim: 'half' given; a whole number of at least 1 or head_dim"),
        ("llama(attention=w2(sigma_dim=0))", "sigma_dim: 0 given"),
        ("llama(attention=w2(mu_dim=0))", "mu_dim"),
        ("llama(d_model=4, n_heads=4, position=none, attention=w2)", "heads of 2 at least"),
        ("llama(d_model=32, n_heads=4, attention=w2(mu_dim=3))", "rope turns pairs of dimensions"),
        ("llama(d_model=32, n_heads=4, attention=w2(score=precision, sigma_dim=2))", "divides μ by σ"),
        ("llama(attention=w2(score=entropy))", "allowed: precision, w2"),
    ],
)
def test_what_does_not_fit_is_said(line: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        parse(line)


def test_lines_with_w2_come_back_as_they_were() -> None:
    for line in ("llama(attention=w2(sigma_dim=head_dim))", "llama(attention=w2(mu_dim=16, sigma_dim=8, tau=head))"):
        assert parse(str(parse(line))) == parse(line)
    assert parse({"preset": "llama", "attention": {"kind": "w2", "sigma_dim": "8"}}).attention.sigma_dim == 8


def test_dropout_acts_in_training_only() -> None:
    attention, x = layer(dropout=0.5), draws(1, 9, 32)
    assert not torch.equal(attention(x)[0], attention(x)[0])
    attention.eval()
    assert torch.equal(attention(x)[0], attention(x)[0])
