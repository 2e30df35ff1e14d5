"""Swapped models: what stays is bit-identical, what is new starts as near to the old as its rank allows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import headwise as hw
from headwise.attention import Context
from headwise.data import Dataset, load_dataset
from headwise.errors import HeadwiseError
from headwise.model.base import LanguageModel
from headwise.model.surgery import layer_numbers, swap, swap_parts, swapped_spec
from headwise.registry import FAMILIES
from headwise.spec import parse
from headwise.start import (
    Start,
    bottleneck,
    fit_output,
    latent,
    least_squares,
    lift,
    reduced_rank,
    turned_alike,
    vein_basis,
)

WIDTHS = "d_model=32, n_layers=3, n_heads=4, vocab_size=61, max_seq_len=64"


def ids(rows: int = 2, length: int = 40, seed: int = 0, vocab_size: int = 61) -> Tensor:
    return torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def model_of(line: str, std: float = 0.2) -> LanguageModel:
    return hw.build(parse(line).replace(init_std=std), seed=1).eval()


def jiggle(model: LanguageModel) -> LanguageModel:
    """Move all parameters, so that norms are not ones and biases not zeros."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def same_logits(a: LanguageModel, b: LanguageModel, atol: float = 1e-5) -> None:
    more = {"encoder_ids": ids(seed=4)} if a.spec.architecture == "encoder_decoder" else {}
    wanted = a(ids(), **more)
    torch.testing.assert_close(b(ids(), **more), wanted, atol=atol * float(wanted.abs().max()), rtol=0)


# ---- what is equal stays equal ----


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (f"gpt2({WIDTHS}, attention=gqa(kv_heads=2))", {"attention": "gqa(kv_heads=2, dropout=0.1)"}),
        (f"llama({WIDTHS}, attention=gqa(kv_heads=2))", {"attention": "softmax"}),  # repeated heads
        (f"llama({WIDTHS}, attention=mqa)", {"attention": "gqa(kv_heads=2)"}),
        (f"llama({WIDTHS})", {"attention": "window(64)"}),
        (f"gpt2({WIDTHS})", {"attention": "gated"}),
        (f"llama({WIDTHS})", {"attention": "gated(gate=headwise)", "layers": "0,2"}),
        (f"gpt2({WIDTHS}, attention=gqa(kv_heads=2, scale=0.5))", {"attention": "gqa(kv_heads=2)"}),
        (f"llama({WIDTHS}, attention=softmax(qk_norm=true))", {"attention": "window(64, qk_norm=true, scale=0.7)"}),
        (f"gemma({WIDTHS}, attention=softmax(qk_norm=true))", {"attention": "softmax(qk_norm=true, scale=0.7)"}),
        (f"llama({WIDTHS}, attention=mqa(qk_norm=full))", {"attention": "gqa(kv_heads=2, qk_norm=full, scale=0.7)"}),
        (f"llama({WIDTHS}, attention=mla(q_lora_rank=9))", {"attention": "mla(q_lora_rank=9, scale=0.1)"}),
        (f"gpt2({WIDTHS})", {"ffn": "mlp(gelu_tanh, d_ff=200)"}),  # more neurons than before
        (f"llama({WIDTHS})", {"ffn": "moe(5, 2)"}),
        (f"llama({WIDTHS})", {"ffn": "moe(5, 2, d_ff=120, n_shared_experts=2)"}),
        (f"gpt2({WIDTHS}, ffn=mlp(silu))", {"ffn": "swiglu(d_ff=128)"}),  # a gate of what is always 1
        (f"gpt2({WIDTHS})", {"ffn": "moe(3, 1, gated=False, activation=gelu_tanh)"}),
        (f"transformer({WIDTHS}, n_encoder_layers=2)", {"attention": "softmax(dropout=0.1)", "layers": "0"}),
    ],
)
def test_the_same_function_in_another_mechanism_gives_the_same_logits(line: str, parts: dict[str, Any]) -> None:
    model = jiggle(model_of(line))
    new = swap(model, **parts, calibration=ids(4, 64))
    assert new.spec != model.spec
    same_logits(model, new)


@pytest.mark.parametrize("position", ["rope", "rope(pairing=interleaved)", "none", "learned"])
@pytest.mark.parametrize(
    "attention", ["tva(rank=8, head_dim=9)", "tva(rank=8, head_dim=9, folded=true)", "tva(rank=16, head_dim=20)"]
)
def test_a_vein_as_wide_as_the_head_loses_nothing(position: str, attention: str) -> None:
    """Heads of 8 in a vein of 8, or of 16 with every pair at the frequency it had."""
    if position.startswith("rope") and "16" in attention:
        attention = attention.replace("16", "8")
    model = jiggle(model_of(f"llama({WIDTHS}, position={position}, bias=true, attention=softmax(scale=0.5))"))
    same_logits(model, swap(model, attention, calibration=ids(4, 64)))


def test_queries_keys_and_values_in_one_vein_of_the_whole_stream_lose_little_when_it_is_wide() -> None:
    model = jiggle(model_of(f"llama({WIDTHS}, position=none)"))
    x, y = (swap(model, f"tva(rank={r}, vein=model)", calibration=ids(8, 64))(ids()) for r in (8, 31))
    wanted = model(ids())
    assert (y - wanted).norm() < 0.15 * (x - wanted).norm()


@pytest.mark.parametrize("line", [f"llama({WIDTHS}, position=none)", f"gpt2({WIDTHS})"])
def test_latents_of_full_rank_lose_nothing_where_no_norm_has_gains(line: str) -> None:
    """The latent's norm then divides by what all tokens have in common."""
    model = model_of(line)
    attention = "mla(kv_lora_rank=32, qk_rope_head_dim=2)"
    same_logits(model, swap(model, attention, calibration=ids(8, 64)), atol=2e-4)
    with_bias = jiggle(model_of(line))
    with torch.no_grad():
        for block in with_bias.stack.blocks:
            for norm in (block.attention_norm,):
                norm.weight.fill_(1)
                if hasattr(norm, "bias") and norm.bias is not None:
                    norm.bias.zero_()
            for name in ("wq", "wk"):
                if getattr(block.attention, name).bias is not None:
                    getattr(block.attention, name).bias.zero_()
    same_logits(with_bias, swap(with_bias, attention, calibration=ids(8, 64)), atol=2e-3)


def test_averaged_heads_are_exact_where_the_heads_of_a_group_are_equal() -> None:
    model = jiggle(model_of(f"gpt2({WIDTHS})"))
    with torch.no_grad():
        for block in model.stack.blocks:
            for name in ("wk", "wv"):
                for tensor in getattr(block.attention, name).parameters():
                    heads = tensor.view(2, 2, 8, -1)
                    heads[:, 1] = heads[:, 0]
    same_logits(model, swap(model, "gqa(kv_heads=2)"))
    new = swap(jiggle(model), "mqa")
    old_k = model.stack.blocks[1].attention.wk.weight.view(4, 8, 32)
    torch.testing.assert_close(new.stack.blocks[1].attention.wk.weight, old_k.mean(0))


# ---- what is not swapped ----


@pytest.mark.parametrize("line", [f"gpt2({WIDTHS})", f"transformer({WIDTHS})", f"llama({WIDTHS}, tie_embeddings=true)"])
def test_what_is_not_swapped_is_bit_identical_and_the_old_model_untouched(line: str) -> None:
    model = jiggle(model_of(line))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = swap(model, "tva(rank=4)", "vft(rank=8)", layers="1")
    after = new.state_dict()
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
        if ".blocks.1.attention." not in f".{name}" and ".blocks.1.ffn." not in f".{name}":
            assert torch.equal(after[name], tensor), name
    assert (new.head.weight is new.embedding.weight) == model.spec.tie_embeddings
    kinds = [type(block.ffn).__name__ for block in _stack(new).blocks]
    dense = type(_stack(model).blocks[0].ffn).__name__
    assert kinds == [dense, "VFT", dense]


def _stack(model: LanguageModel) -> Any:
    return model.decoder if model.spec.architecture == "encoder_decoder" else model.stack


def test_the_line_says_what_the_model_is() -> None:
    spec = parse(f"llama({WIDTHS})")
    assert str(swapped_spec(spec, ffn="moe", layers="0-2").ffn.kind) == "moe"
    some = swapped_spec(spec, "window(8)", "vft(rank=4)", layers=[1])
    assert [some.ffn.at(i).kind for i in range(3)] == ["swiglu", "vft", "swiglu"]
    assert [some.attention.at(i).kind for i in range(3)] == ["softmax", "window", "softmax"]
    assert parse(str(some)) == some
    back = swapped_spec(some, ffn="swiglu", layers="1")
    assert back.ffn == spec.ffn
    turns = swapped_spec(spec, "pattern(window(4), softmax)")
    assert [turns.attention.at(i).kind for i in range(3)] == ["window", "softmax", "window"]


def test_device_dtype_and_mode_are_kept() -> None:
    model = model_of(f"llama({WIDTHS})").bfloat16().train()
    model.activation_checkpointing = True
    new = swap(model, "tva(rank=4)", "vft(rank=8)")
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert new.training
    assert new.activation_checkpointing
    assert model.training


def test_swapping_draws_nothing_from_the_global_generator_and_repeats() -> None:
    model = model_of(f"llama({WIDTHS})")
    state = torch.get_rng_state()
    first, second = (swap(model, "tva(rank=4)", "moe(4, 2, rank=8)").state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_swapped_layers_train() -> None:
    new = swap(model_of(f"llama({WIDTHS})"), "tva(rank=4)", "vft(rank=8, s_normals=1, tau=0.0)").train()
    new(ids()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in new.parameters())


EVERY = [
    (family, kind, example)
    for family in ("attention", "ffn")
    for kind in FAMILIES[family].list()
    for example in (FAMILIES[family].get(kind).spec.examples or (kind,))[:1]
]


@pytest.mark.parametrize(("family", "example"), [(f, e) for f, _, e in EVERY], ids=[e for _, _, e in EVERY])
def test_every_mechanism_can_be_put_in_and_taken_out_again(family: str, example: str) -> None:
    model = model_of(f"llama({WIDTHS})")
    new, parts = swap_parts(model, **{family: example}, layers="0,2", calibration=ids(4, 64))
    assert new(ids()).isfinite().all()
    assert all(part.start for part in parts)
    back = swap(new, **{family: {"attention": "softmax", "ffn": "swiglu"}[family]}, calibration=ids(4, 64))
    assert back.spec == model.spec
    assert back(ids()).isfinite().all()


# ---- mistakes ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to put in was given; give attention, ffn or both"),
        ({"ffn": "vft(rank=32)"}, r"ffn\.rank: 32 given, but a vein is narrower than d_model=32; allowed: 1 to 31"),
        ({"attention": "tva(rank=8)"}, r"attention\.rank: 8 given, .* head_dim=8; allowed: 1 to 7"),
        ({"ffn": "mo"}, r"ffn: unknown ffn 'mo'.*allowed"),
        ({"ffn": "moe", "layers": "0-3"}, r"layers: '0-3' given, but this model has layers 0 to 2"),
        ({"ffn": "moe", "layers": "2-1"}, r"layers: '2-1' given"),
        ({"ffn": "moe", "layers": "first"}, r"layers: 'first' given; write numbers and ranges, as 0-3,5"),
        ({"ffn": "moe", "layers": []}, "layers: none given; write numbers and ranges, as 0-3,5, or leave layers out"),
        ({"ffn": "moe", "layers": [-1]}, r"layers: -1 given"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadwiseError, match=message) as caught:
        swap(model_of(f"llama({WIDTHS})"), **arguments)
    assert "\n" not in str(caught.value)


@given(st.sets(st.integers(0, 11), min_size=1))
def test_layers_are_read_as_they_are_written(chosen: set[int]) -> None:
    assert layer_numbers(",".join(map(str, chosen)), 12) == chosen
    assert layer_numbers(f"{min(chosen)}-{max(chosen)}", 12) == set(range(min(chosen), max(chosen) + 1))
    assert layer_numbers(chosen, 12) == chosen
    assert layer_numbers(None, 12) == set(range(12))


# ---- a model that was trained ----


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset("shakespeare", "char")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def trained(request: pytest.FixtureRequest, dataset: Dataset) -> LanguageModel:
    line = f"{request.param}(d_model=32, n_layers=2, n_heads=2)"
    settings = {"steps": 150, "seq_len": 32, "batch_size": 16, "lr": 4e-3, "threads": 1, "eval_every": 0}
    return hw.train(line, dataset=dataset, progress=False, **settings).model


def windows(tokens: Any, rows: int) -> Tensor:
    return torch.tensor([int(i) for i in tokens.array[: rows * 33]]).view(rows, 33)


@torch.no_grad()
def loss(model: LanguageModel, dataset: Dataset) -> float:
    batch = windows(dataset.val, 150)
    return torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).item()


@pytest.mark.parametrize(
    ("family", "calls", "near"),
    [
        ("attention", ["tva(rank=2)", "tva(rank=6)", "tva(rank=10)", "tva(rank=15)"], 0.05),
        ("attention", ["tva(rank=4, vein=model)", "tva(rank=12, vein=model)", "tva(rank=28, vein=model)"], 0.2),
        ("attention", ["mqa", "softmax(bias=true)"], 0.01),
        ("ffn", ["vft(rank=2)", "vft(rank=10)", "vft(rank=31)"], 0.1),
        (
            "ffn",
            ["vft(rank=2, stabilizer=none)", "vft(rank=10, stabilizer=none)", "vft(rank=31, stabilizer=none)"],
            0.1,
        ),
        ("ffn", ["moe(4, 2, rank=2)", "moe(4, 2, rank=10)", "moe(4, 2, rank=31)"], 0.2),
        ("ffn", ["mlp(d_ff=8)", "mlp(d_ff=32)", "mlp(d_ff=200)"], 0.1),
    ],
)
def test_the_loss_after_a_swap_falls_with_the_rank(
    trained: LanguageModel, dataset: Dataset, family: str, calls: list[str], near: float
) -> None:
    calibration = windows(dataset.train, 120)[:, :-1]
    before = loss(trained, dataset)
    after = [loss(swap(trained, **{family: call}, calibration=calibration), dataset) for call in calls]
    # Near the old loss there is no more to win, and the sample that the parts are fitted to shows in the third digit.
    assert all(wider < narrower + 2e-3 for narrower, wider in pairwise(after))
    assert after[-1] < after[0]
    assert after[-1] < before + near
    anew = loss(_reset(trained, family), dataset)
    assert after[0] < anew, "better than to start anew"


def _reset(model: LanguageModel, family: str) -> LanguageModel:
    """The model with the parts of a family as they are before training."""
    fresh = hw.build(model.spec, seed=9)
    tensors = {n: t for n, t in fresh.state_dict().items() if f".{family}." in n}
    fresh.load_state_dict(model.state_dict() | tensors)
    return fresh.eval()


def test_fitting_to_text_beats_fitting_to_noise(trained: LanguageModel, dataset: Dataset) -> None:
    text = windows(dataset.train, 120)[:, :-1]
    for parts in ({"ffn": "vft(rank=6)"}, {"ffn": "mlp(relu, d_ff=32)"}, {"attention": "deltanet"}):
        fitted, not_fitted = (loss(swap(trained, **parts, calibration=c), dataset) for c in (text, None))
        assert fitted < not_fitted, parts


@torch.no_grad()
def test_an_output_map_is_fitted_where_that_helps_on_sequences_not_fitted_to() -> None:
    old, new = (model_of(f"llama({WIDTHS})").stack.blocks[0].attention for _ in range(2))
    new.wo.weight.normal_()
    x = torch.randn(16, 40, 32)
    wanted = old(x, context=Context(causal=True))[0]

    def run() -> Tensor:
        return new(x, context=Context(causal=True))[0]

    assert fit_output(new, run, wanted)
    torch.testing.assert_close(new.wo.weight, old.wo.weight, atol=1e-4, rtol=0)
    assert not fit_output(new, run, wanted), "it is fitted already"
    new.wo.weight.zero_()
    assert not fit_output(new, run, torch.randn(16, 40, 32)), "nothing can be learnt of noise"
    assert not new.wo.weight.any()


# ---- the maths of low rank ----


@settings(max_examples=25)
@given(d=st.integers(1, 7), r=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_bottleneck_is_the_best_of_its_rank(d: int, r: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(2, d, generator=generator)
    a, b = (torch.randn(50, d, generator=generator, dtype=torch.float64) * size for size in sizes)
    left, right = bottleneck(a.T @ a / 50, b.T @ b / 50, r)
    exact = a @ b.T
    found = (a @ left.T) @ (b @ right.T).T
    values = torch.linalg.svdvals(exact)
    wanted = values[r:].square().sum().sqrt()
    torch.testing.assert_close((exact - found).norm(), wanted, atol=1e-6 * float(values[0]), rtol=1e-6)


def test_fits_are_those_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((80, 5), (7, 5)))
    noise = torch.randn(80, 7, generator=generator, dtype=torch.float64)
    y = x @ w.T + 3 + 0.1 * noise
    weight, bias = least_squares(x, y, True)
    assert bias is not None
    exact = torch.linalg.lstsq(torch.cat([x, torch.ones(80, 1)], 1), y).solution
    torch.testing.assert_close(torch.cat([weight.T, bias[None]]), exact, atol=1e-6, rtol=1e-6)
    errors = []
    for rank in (1, 3, 6):
        u, inner, b = reduced_rank(x, y, rank, True)
        assert b is not None
        torch.testing.assert_close(u.T @ u, torch.eye(rank, dtype=torch.float64))
        errors.append((y - (x @ inner.T + b) @ u.T).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx((y - x @ weight.T - bias).norm().item(), rel=1e-3)


def test_the_active_subspace_is_where_a_function_varies() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(9, 2, generator=generator))[0].T

    class Ridge(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ directions.T) @ torch.ones(2, 9)

    start = Start(torch.randn(500, 9, generator=generator))
    v = vein_basis(Ridge(), start, 2)
    torch.testing.assert_close((v.float() @ directions.T).norm(), torch.tensor(2.0**0.5), atol=1e-2, rtol=0)
    lifted = lift(directions, v, start)
    torch.testing.assert_close((lifted @ v).float(), directions, atol=1e-2, rtol=0)


def test_a_latent_of_constant_size_is_found_where_there_is_one() -> None:
    x = torch.nn.functional.normalize(torch.randn(400, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    weight = torch.randn(11, 6, generator=torch.Generator().manual_seed(1)).double()
    into, back = latent(weight, 6, Start(x))
    c = x.double() @ into.T
    torch.testing.assert_close(c.square().mean(-1), torch.ones(400, dtype=torch.float64))
    torch.testing.assert_close(c @ back.T, x.double() @ weight.T, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize(("old", "new"), [(16, 8), (8, 16), (8, 8), (12, 8), (16, 5), (16, 2)])
def test_turned_pairs_go_where_their_frequency_is(pairing: Any, old: int, new: int) -> None:
    start = Start(torch.zeros(1, 1), pairing)
    chosen = turned_alike(old, new, start)
    kept = min(old, new)
    assert (chosen.sum(0) <= 1).all()
    assert chosen.sum() in (kept, kept - kept % 2)
    for i, (a, b) in enumerate(start.pairs(new - new % 2)):
        for j, (c, d) in enumerate(start.pairs(old)):
            assert chosen[a, c] == chosen[b, d]
            if chosen[a, c]:
                assert abs(2 * i / (new - new % 2) - 2 * j / old) <= 1 / min(old, new)
