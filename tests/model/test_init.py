"""Initial values: the named schemes, tensor by tensor, and what they do not depend on."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headwise.attention import Attention, AttentionSpec
from headwise.errors import SpecError
from headwise.model import build
from headwise.registry import ATTENTION
from headwise.spec import ModelSpec, list_presets, parse

SMALL = "d_model=96, n_layers=3, n_heads=4, vocab_size=200, max_seq_len=64"
MATRICES = ("wq", "wk", "wv", "wo", "w_in", "w_out", "w_gate", "w_up", "head", "router", "wkv_a", "wkv_b")


def tensors(line: str | ModelSpec, **more: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in build(line, **more).named_parameters()}


def role(name: str) -> str:
    """embedding, matrix, residual (a matrix whose output joins the stream), norm or bias."""
    *_, module, kind = name.split(".")
    if module in ("embedding", "table"):
        return "embedding"
    if "norm" in module:
        return f"norm {kind}"
    if kind == "bias":
        return "bias"
    assert module in MATRICES, f"{name} has no role in this test"
    return "residual" if module in ("wo", "w_out") else "matrix"


def assert_std(name: str, tensor: Tensor, std: float) -> None:
    """The sample's standard deviation and mean are those of the scheme, within five standard errors."""
    n = tensor.numel()
    assert tensor.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name
    assert abs(tensor.mean().item()) < 5 * std / math.sqrt(n), name


def assert_norms_and_biases(name: str, tensor: Tensor, spec: ModelSpec) -> None:
    expected = {"norm weight": 1.0 - spec.dims.norm_unit_offset, "norm bias": 0.0, "bias": 0.0}[role(name)]
    assert torch.equal(tensor, torch.full_like(tensor, expected)), name


LINES = [
    *(f"{preset}({SMALL})" for preset in list_presets()),
    f"gpt2({SMALL}, attention=gqa(kv_heads=2), ffn=swiglu, tie_embeddings=False, head_bias=True)",
    f"transformer({SMALL}, n_encoder_layers=2, position=learned)",
    f"qwen3({SMALL}, order=sandwich, norm=layernorm, bias=True, embedding_norm=True)",
]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("std", [0.02, 0.3])
@pytest.mark.parametrize("scheme", ["normal", "gpt2"])
def test_normal_and_gpt2(scheme: str, std: float, line: str) -> None:
    """GPT-2's residual maps are smaller by √(2L), so that L layers of two additions keep the stream's size."""
    spec = parse(line).replace(init=scheme, init_std=std)
    for name, tensor in tensors(spec).items():
        match role(name):
            case "embedding" | "matrix":
                assert_std(name, tensor, std)
            case "residual":
                assert_std(name, tensor, std / math.sqrt(2 * 3) if scheme == "gpt2" else std)
            case _:
                assert_norms_and_biases(name, tensor, spec)


@pytest.mark.parametrize("line", LINES)
def test_xavier(line: str) -> None:
    """Uniform up to √(6/(in+out)), and embeddings that have unit size after the factor √C of 2017."""
    spec = parse(line).replace(init="xavier")
    for name, tensor in tensors(spec).items():
        match role(name):
            case "embedding":
                assert_std(name, tensor, 96**-0.5)
            case "matrix" | "residual":
                bound = math.sqrt(6 / sum(tensor.shape))
                assert 0.99 * bound < tensor.abs().max() <= bound, name
                assert_std(name, tensor, bound / math.sqrt(3))
            case _:
                assert_norms_and_biases(name, tensor, spec)


def test_every_scheme_is_tested_and_presets_name_theirs() -> None:
    assert set(get_args(ModelSpec.model_fields["init"].annotation)) == {"normal", "gpt2", "xavier"}
    schemes = {preset: parse(preset).init for preset in list_presets()}
    assert schemes == dict.fromkeys(schemes, "normal") | {"gpt2": "gpt2", "transformer": "xavier"}
    with pytest.raises(SpecError, match=r"init: unknown value 'kaiming'; allowed: gpt2, normal, xavier"):
        parse("gpt2(init=kaiming)")


def test_tied_embeddings_are_one_tensor_with_the_embeddings_values() -> None:
    tied, untied = build(f"gpt2({SMALL})"), build(f"gpt2({SMALL}, tie_embeddings=False)")
    assert tied.head.weight is tied.embedding.weight
    assert torch.equal(tied.embedding.weight, untied.embedding.weight)
    assert not torch.equal(untied.head.weight, untied.embedding.weight)


# ---- what the values depend on ----


def test_every_tensor_has_values_of_its_own() -> None:
    """Two layers that start alike would learn alike."""
    seen: dict[bytes, str] = {}
    for name, tensor in tensors(f"transformer({SMALL}, tie_embeddings=False)").items():
        if role(name) in ("matrix", "residual", "embedding"):
            start = tensor.flatten()[:64].numpy().tobytes()
            assert start not in seen, f"{name} = {seen[start]}"
            seen[start] = name
    assert len(seen) > 30


def test_another_seed_gives_other_values_and_the_same_seed_the_same() -> None:
    zero, again, one = (tensors(f"llama({SMALL})", seed=s) for s in (0, 0, 1))
    assert all(torch.equal(zero[name], again[name]) for name in zero)
    assert not any(torch.equal(zero[name], one[name]) for name in zero if role(name) in ("matrix", "residual"))


VARIANTS = [
    "llama",
    "gpt2(position=rope)",
    "gpt2(norm=rmsnorm)",
    "gpt2(ffn=swiglu)",
    "gpt2(attention=gqa(kv_heads=2))",
    "gpt2(attention=pattern(window(8), softmax))",
    "gpt2(order=post)",
    "gpt2(architecture=encoder)",
    "gpt2(n_layers=2)",
    "gpt2(n_layers=5)",
    "gpt2(bias=false, tie_embeddings=false, embedding_norm=true)",
    "gpt2(dropout=0.1)",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_share_the_values_of_the_tensors_in_which_they_agree(variant: str) -> None:
    """So that a comparison starts from the same point wherever it can; the scheme is the same, here `normal`."""
    base = parse(f"gpt2({SMALL}, init=normal)")
    spec = parse(variant)
    widths = {"d_model": 96, "n_heads": 4, "vocab_size": 200, "max_seq_len": 64, "n_layers": spec.n_layers or 3}
    ours, theirs = tensors(base), tensors(spec.replace(**widths, init="normal"))
    agree = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    assert "embedding.weight" in agree
    assert "stack.blocks.1.attention.wo.weight" in agree
    assert all(torch.equal(ours[name], theirs[name]) for name in agree)


def test_depth_changes_only_the_residual_maps_of_gpt2() -> None:
    shallow, deep = tensors(f"gpt2({SMALL})"), tensors(parse(f"gpt2({SMALL})").replace(n_layers=12))
    for name, tensor in shallow.items():
        factor = math.sqrt(3 / 12) if role(name) == "residual" else 1.0
        torch.testing.assert_close(deep[name], factor * tensor, rtol=1e-6, atol=0)


def test_the_global_generators_are_neither_read_nor_moved() -> None:
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[union-attr]
        values.append(tensors(f"llama({SMALL})"))
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[union-attr]
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])


def test_what_was_built_before_does_not_matter() -> None:
    one, two = f"gpt2({SMALL})", f"llama({SMALL}, attention=mqa)"
    first = tensors(one), tensors(two)
    second = tensors(two), tensors(one)
    for a, b in ((first[0], second[1]), (first[1], second[0])):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_precision_only_rounds_the_values() -> None:
    full, half = tensors(f"llama({SMALL})"), tensors(f"llama({SMALL})", dtype=torch.bfloat16)
    assert all(torch.equal(full[name].to(torch.bfloat16), half[name]) for name in full)


def test_meta_has_shapes_and_no_values() -> None:
    real, meta = tensors(f"llama({SMALL})"), tensors(f"llama({SMALL})", device="meta")
    assert {name: t.shape for name, t in real.items()} == {name: t.shape for name, t in meta.items()}
    assert all(t.is_meta for t in meta.values())


# ---- mechanisms with a rule of their own ----


class OwnSpec(AttentionSpec):
    """Softmax attention with two tensors that no scheme knows."""

    kind: Literal["test_own"] = "test_own"


class OwnAttention(Attention):
    """`level` follows the module's rule; `drawn` keeps what it was made with."""

    def __init__(self, spec: OwnSpec, dims: Any) -> None:
        super().__init__(spec, dims)
        self.level = nn.Parameter(torch.empty(50))
        self.drawn = nn.Parameter(torch.rand(50))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        self.level.copy_(torch.rand(50, generator=generator) + 7)


@pytest.fixture
def own() -> Iterator[None]:
    ATTENTION.list()
    ATTENTION.register(OwnSpec)(OwnAttention)
    yield
    del ATTENTION._entries["test_own"]


@pytest.mark.usefixtures("own")
def test_a_mechanism_may_have_a_rule_of_its_own() -> None:
    """Its other tensors follow the scheme, and all of them the seed alone."""
    line = f"gpt2({SMALL}, attention=test_own)"
    plain, values = tensors(f"gpt2({SMALL})"), tensors(line)
    assert all(torch.equal(plain[name], values[name]) for name in plain)
    level = "stack.blocks.0.attention.level"
    assert values[level].min() >= 7
    assert values[level].max() <= 8
    assert not torch.equal(values[level], values["stack.blocks.1.attention.level"])
    torch.manual_seed(99)
    again, other = tensors(line), tensors(line, seed=1)
    assert all(torch.equal(values[name], again[name]) for name in values)
    for name in (level, "stack.blocks.0.attention.drawn"):
        assert not torch.equal(values[name], other[name])
