"""Mixture of experts: Mixtral's values and balance loss, nothing dropped, honest counts, the same graph compiled."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import headwise as hw
from headwise import kernels
from headwise.dims import Dims
from headwise.errors import SpecError
from headwise.ffn.moe import MoE, MoESpec
from headwise.kernels.grouped import fast
from headwise.kernels.grouped import naive as definition
from headwise.lab.match import match
from headwise.spec import count, parse


def moe(seed: int = 0, *, d_model: int = 16, dropout: float = 0.0, **fields: Any) -> MoE:
    torch.manual_seed(seed)
    layer: MoE = hw.get_ffn("moe", d_model=d_model, **{"d_ff": 12, **fields})
    return layer


def x_of(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_copied_weights_give_the_values_and_gradients_of_transformers_mixtral() -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=16, intermediate_size=12, num_local_experts=6, num_experts_per_tok=2)
    theirs = MixtralSparseMoeBlock(config)
    ours = moe(n_experts=6, top_k=2)
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        for e, expert in enumerate(ours.experts):
            theirs.experts.gate_up_proj[e].copy_(torch.cat([expert.w_gate.weight, expert.w_up.weight]))
            theirs.experts.down_proj[e].copy_(expert.w_out.weight)
    x = x_of(3, 29, 16)
    ours_x, theirs_x = (x.clone().requires_grad_() for _ in range(2))
    ours_y, theirs_y = ours(ours_x), theirs(theirs_x)
    torch.testing.assert_close(ours_y, theirs_y, atol=1e-6, rtol=1e-5)
    ours_y.square().sum().backward()
    theirs_y.square().sum().backward()
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.router.weight.grad, theirs.gate.weight.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", [True, False])
def test_copied_weights_give_the_values_and_gradients_of_transformers_deepseek_v3(norm: bool) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=16, moe_intermediate_size=12, n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2,
        n_shared_experts=2, routed_scaling_factor=1.7, norm_topk_prob=norm,
    )  # fmt: skip
    theirs = DeepseekV3MoE(config)
    ours = moe(
        n_experts=12, top_k=3, n_groups=4, topk_groups=2, n_shared_experts=2, routed_scaling_factor=1.7,
        scoring="sigmoid", correction_bias=True, norm_topk_prob=norm,
    )  # fmt: skip
    assert ours.correction_bias is not None
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.gate.e_score_correction_bias.copy_(0.3 * x_of(12))
        ours.correction_bias.copy_(0.3 * x_of(12))
        for e, expert in enumerate(ours.experts):
            theirs.experts.gate_up_proj[e].copy_(torch.cat([expert.w_gate.weight, expert.w_up.weight]))
            theirs.experts.down_proj[e].copy_(expert.w_out.weight)
        for name, own in {"gate_proj": "w_gate", "up_proj": "w_up", "down_proj": "w_out"}.items():
            getattr(theirs.shared_experts, name).weight.copy_(getattr(ours.shared, own).weight)
    x = x_of(3, 29, 16)
    ours_x, theirs_x = (x.clone().requires_grad_() for _ in range(2))
    ours_y, theirs_y = ours(ours_x), theirs(theirs_x)
    torch.testing.assert_close(ours_y, theirs_y, atol=1e-6, rtol=1e-5)
    ours_y.square().sum().backward()
    theirs_y.square().sum().backward()
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.router.weight.grad, theirs.gate.weight.grad, atol=1e-5, rtol=1e-4)


def test_the_correction_bias_keeps_its_precision_and_no_optimizer_sees_it() -> None:
    layer = moe(n_experts=6, correction_bias=True)
    assert "correction_bias" not in dict(layer.named_parameters())
    layer.correction_bias.copy_(x_of(6))
    layer.bfloat16()
    assert torch.equal(layer.correction_bias, x_of(6))
    assert layer.router.weight.dtype == torch.bfloat16


def test_the_parameters_of_published_mixtures_that_a_token_meets() -> None:
    """12.9 of Mixtral's 46.7 billion, 37 of DeepSeek V3's 671."""
    assert count("mixtral(size='8x7b')").active_params == 46_702_792_704 - 32 * 6 * 3 * 4096 * 14336
    assert 37.0e9 < count("deepseek_v3(size='671b')").active_params < 38.0e9
    dense = count("transformer")
    assert dense.active_params == dense.params


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_balance_loss_is_that_of_transformers_and_of_the_formula(top_k: int) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layer = moe(n_experts=6, top_k=top_k, aux_loss_coef=0.3, z_loss_coef=0).train()
    x = x_of(3, 29, 16)
    layer(x)
    scores = layer.router(x).flatten(0, 1)
    assert layer.aux_loss is not None
    expected = 0.3 * load_balancing_loss_func((scores,), 6, top_k)
    torch.testing.assert_close(layer.aux_loss, expected)
    probs, f = scores.softmax(-1), torch.zeros(6)
    for e in probs.topk(top_k).indices.flatten().tolist():
        f[e] += 1 / len(probs)
    torch.testing.assert_close(layer.aux_loss, 0.3 * 6 * (f * probs.mean(0)).sum())


def test_the_z_loss_is_the_mean_square_of_the_log_partition() -> None:
    layer = moe(n_experts=6, aux_loss_coef=0, z_loss_coef=0.5).train()
    x = x_of(2, 9, 16)
    layer(x)
    torch.testing.assert_close(layer.aux_loss, 0.5 * layer.router(x).logsumexp(-1).square().mean())


def test_balance_is_least_and_metrics_say_so_where_all_experts_are_chosen_equally() -> None:
    layer = moe(d_model=4, n_experts=4, top_k=1, aux_loss_coef=1, z_loss_coef=0).train()
    with torch.no_grad():
        layer.router.weight.copy_(5 * torch.eye(4))
    layer(torch.eye(4).repeat(3, 1)[None])
    torch.testing.assert_close(layer.aux_loss, torch.tensor(1.0))
    assert layer.metrics["load_max"] == 1
    balanced = layer.metrics["router_entropy"].item()
    layer(torch.eye(4)[:1].repeat(12, 1)[None])
    assert layer.aux_loss is not None
    assert layer.aux_loss > 3
    assert layer.metrics["load_max"] == 4
    assert layer.metrics["router_entropy"].item() == pytest.approx(balanced)
    p = torch.tensor([5.0, 0, 0, 0]).softmax(0)
    assert balanced == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)
    with torch.no_grad():
        layer.router.weight.zero_()
    layer(torch.eye(4)[None])
    assert layer.metrics["router_entropy"].item() == pytest.approx(math.log(4))


def test_losses_and_metrics_are_of_training_only_and_reach_the_trainer() -> None:
    model = hw.build("llama(d_model=16, n_layers=2, n_heads=2, ffn=moe(4, 2, d_ff=8))")
    ids = torch.arange(12)[None]
    model.train()(ids)
    loss, metrics = model.aux_loss(), model.metrics()
    assert loss is not None
    assert set(metrics) == {f"stack.blocks.{i}.ffn.{name}" for i in (0, 1) for name in ("load_max", "router_entropy")}
    loss.backward()
    assert all(block.ffn.router.weight.grad.abs().sum() > 0 for block in model.stack.blocks)
    model.eval()(ids)
    assert model.aux_loss() is None
    assert model.metrics() == metrics, "a record is written after the evaluation"
    run = hw.train(
        model.spec, steps=2, seq_len=8, batch_size=2, threads=1, log_every=1, val_fraction=0.01, progress=False
    )
    assert all(record["stack.blocks.1.ffn.load_max"] >= 1 for record in run.history)


@settings(max_examples=40)
@given(
    n_tokens=st.integers(1, 40), n_experts=st.integers(1, 9), k=st.integers(1, 9), width=st.sampled_from([1, 3, 8]),
    seed=st.integers(0, 99), lean=st.sampled_from([0.0, 3.0]),
)  # fmt: skip
def test_the_sorted_and_the_operator_form_equal_the_definition(
    n_tokens: int, n_experts: int, k: int, width: int, seed: int, lean: float
) -> None:
    """Values and gradients in float64, experts without a token among them (`lean` sends most to the first ones)."""
    k = min(k, n_experts)
    x, scores = x_of(n_tokens, 5, seed=seed, dtype=torch.float64), x_of(n_tokens, n_experts, seed=seed + 1)
    index = (scores - lean * torch.arange(n_experts)).topk(k).indices
    weights = x_of(n_tokens, k, seed=seed + 2, dtype=torch.float64)
    maps = [x_of(width, 5, seed=seed + 3 + e, dtype=torch.float64) for e in range(n_experts)]

    def grads(form: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weights, *maps)]
        experts = [lambda rows, w=w: F.linear(rows, w).tanh() for w in leaves[2:]]

        def grouped(rows: Tensor, expert_M: Tensor, counts_E: Tensor) -> Tensor:
            assert torch.equal(expert_M.bincount(minlength=n_experts), counts_E)
            return fast.grouped_linear(rows, leaves[2:], counts_E).tanh()

        if form == "naive":
            y = definition.mixture(torch.stack([each(leaves[0]) for each in experts]), index, leaves[1])
        else:
            with mock.patch("torch.compiler.is_compiling", return_value=form == "operator"):
                y = fast.mixture(leaves[0], index, leaves[1], experts, grouped)
        (y * x_of(*y.shape, seed=7, dtype=torch.float64)).sum().backward()
        assert all(leaf.grad is not None for leaf in leaves), "an expert without tokens has gradients too"
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    exact = grads("naive")
    for form in ("slices", "operator"):
        for found, wanted in zip(grads(form), exact):
            torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-10)


def test_the_operator_keeps_torchs_own_rules() -> None:
    """Schema, fake tensors and autograd registration, as torch checks them."""
    x, counts = x_of(7, 4).requires_grad_(), torch.tensor([3, 0, 4])
    weights = [x_of(5, 4, seed=s).requires_grad_() for s in range(3)]
    torch.library.opcheck(fast._linear, (x, weights, counts))


@pytest.mark.parametrize(
    "fields",
    [{"n_experts": 5}, {"gated": False, "bias": True, "n_shared_experts": 1}, {"rank": 4, "norm_topk_prob": False}],
)
def test_every_form_of_the_layer_agrees_under_autocast_as_well(fields: dict[str, Any]) -> None:
    layer, x = moe(**fields), x_of(2, 33, 16)
    with kernels.naive():
        exact = layer(x)
    for autocast, bound in ((False, 1e-6), (True, 0.02)):
        for compiling in (False, True):
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=autocast),
                mock.patch("torch.compiler.is_compiling", return_value=compiling),
            ):
                y = layer(x)
            assert (y.float() - exact).abs().max() <= bound * exact.abs().max()


def test_no_token_is_dropped_however_crowded_an_expert_is() -> None:
    layer = moe(n_experts=4, top_k=1)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 1
    x = x_of(1, 50, 16).abs()
    torch.testing.assert_close(layer(x), layer.experts[2](x))


def test_one_expert_is_a_dense_feed_forward_and_shared_experts_are_always_on() -> None:
    layer, x = moe(n_experts=1, top_k=1, n_shared_experts=2), x_of(2, 7, 16)
    assert layer.shared is not None
    assert layer.shared.w_up.out_features == 24
    torch.testing.assert_close(layer(x), layer.experts[0](x) + layer.shared(x))


def test_weights_are_probabilities_or_sum_to_one() -> None:
    x = x_of(11, 16)
    for norm in (True, False):
        layer = moe(n_experts=5, top_k=3, norm_topk_prob=norm)
        index, weights = layer.route(x)
        probs = layer.router(x).softmax(-1).gather(-1, index)
        torch.testing.assert_close(weights, probs / probs.sum(-1, keepdim=True) if norm else probs)


def test_experts_in_the_vein_see_what_the_vein_keeps_and_the_router_all() -> None:
    layer, x = moe(n_experts=3, top_k=1, rank=4, d_ff=None), x_of(2, 7, 16)
    assert layer.vein is not None
    assert layer.experts[0].w_up.weight.shape == (16, 4)
    index, _ = layer.route(x.flatten(0, 1))
    wanted = torch.stack([layer.vein.reconstruct(layer.experts[e](layer.vein.project(row)))
                          for e, row in zip(index[:, 0].tolist(), x.flatten(0, 1))])  # fmt: skip
    torch.testing.assert_close(layer(x).flatten(0, 1), wanted)


def test_an_expert_without_tokens_is_not_called_in_decoding() -> None:
    layer, called = moe(n_experts=6, top_k=2), []
    for e, expert in enumerate(layer.experts):
        expert.register_forward_hook(lambda *_, e=e: called.append(e))
    with torch.no_grad():
        layer(x_of(1, 1, 16))
    assert len(called) == 2


@settings(max_examples=25)
@given(
    n_experts=st.integers(1, 6), top_k=st.integers(1, 6), shared=st.integers(0, 2), d_ff=st.integers(1, 20),
    gated=st.booleans(), rank=st.sampled_from([None, 3]),
)  # fmt: skip
def test_flops_are_those_of_the_active_experts(
    n_experts: int, top_k: int, shared: int, d_ff: int, gated: bool, rank: int | None
) -> None:
    top_k = min(top_k, n_experts)
    fields = {"n_experts": n_experts, "top_k": top_k, "n_shared_experts": shared, "gated": gated, "rank": rank}
    layer, dims, x = moe(d_ff=d_ff, **fields), Dims(16, 2), x_of(1, 12, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() == 12 * layer.spec.flops_per_token(dims, 64, causal=True)
    assert layer.spec.param_count(dims) == sum(p.numel() for p in layer.parameters())
    one = sum(p.numel() for p in layer.experts[0].parameters())
    assert layer.spec.active_param_count(dims) == layer.spec.param_count(dims) - (n_experts - top_k) * one


def test_matching_takes_the_experts_width() -> None:
    base = parse("llama(d_model=64, n_layers=2, n_heads=4)").resolve()
    line = parse("llama(d_model=64, n_layers=2, n_heads=4, ffn=moe(4, 2))").resolve()
    for how, quantity in (("params", "params"), ("flops", "flops_per_token")):
        found = match(line, base, how, 64)
        assert found.reached
        assert found.note.startswith("ffn.d_ff 176 → ")
        assert getattr(count(found.spec), quantity) == pytest.approx(getattr(count(base), quantity), rel=0.02)


def test_what_cannot_be_is_said_in_one_line() -> None:
    with pytest.raises(SpecError, match=r"ffn\.top_k: 5 given, but there are n_experts=4; choose at most that"):
        parse("llama(d_model=64, n_heads=4, ffn=moe(4, 5))")
    with pytest.raises(SpecError, match=r"ffn\.rank: 64 given, .* allowed: 1 to 63"):
        parse("llama(d_model=64, n_heads=4, ffn=moe(rank=64))")


def test_dropout_acts_on_the_output() -> None:
    layer = MoE(MoESpec(n_experts=2, top_k=1, d_ff=4), Dims(8, 2, dropout=0.5)).train()
    y = layer(x_of(1, 50, 8))
    assert 0.3 < (y == 0).float().mean() < 0.7
