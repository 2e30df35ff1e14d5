"""The aligner as a whole: its shapes and parameters, its parts in order, its sides, and whose tensors get gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kv_models import drawn, kv_lines, small, tokens
from torch import Tensor

from headwise.distill import KVDimensionProjector, KVShape, MapProjectionAligner, TimeWarper
from headwise.distill.capture import capture
from headwise.distill.layer_map import layer_map
from headwise.distill.losses import kv_loss
from headwise.distill.stacking import flatten_kv_heads, unflatten_kv_heads
from headwise.errors import HeadwiseError, SettingsError

TEACHER, STUDENT = KVShape(5, 6, 3, 8, 10), KVShape(2, 4, 2, 4, 6)


def of_shape(shape: KVShape, T: int = 7, B: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and queries."""
    return (
        drawn(B, shape.n_layers, shape.kv_heads, T, shape.key_dim, seed=1, dtype=torch.float32),
        drawn(B, shape.n_layers, shape.kv_heads, T, shape.value_dim, seed=2, dtype=torch.float32),
        drawn(B, shape.n_layers, shape.n_heads, T, shape.key_dim, seed=3, dtype=torch.float32),
    )


def test_the_published_sizes() -> None:
    """Document 004's 24×32×64 → 12×16×64 with one P."""
    shapes = KVShape(24, 32, 32, 64, 64), KVShape(12, 16, 16, 64, 64)
    aligner = MapProjectionAligner(*shapes, mode="structured", share_dim_proj=True, init_uniform=True)
    assert sum(p.numel() for p in aligner.parameters()) == 13_824
    own = MapProjectionAligner(*shapes, share_dim_proj=False)
    assert sum(p.numel() for p in own.parameters()) == 3 * (16 * 32 + 16 * 64 * 64)
    k = torch.zeros(1, 24, 32, 3, 64)
    assert [x.shape for x in aligner(k, k, k, torch.zeros(1, 3, dtype=torch.int64))] == [(1, 12, 16, 3, 64)] * 3


sizes = st.integers(1, 4)


@given(
    st.sampled_from(["structured", "flat"]),
    st.sampled_from(["ratio", "uniform", "skip", "learned"]),
    st.sampled_from(["teacher", "student"]),
    st.tuples(sizes, sizes, sizes, sizes, sizes),
    st.tuples(sizes, sizes, sizes, sizes, sizes),
)
def test_shapes_come_out_whatever_the_two_models(
    mode: Any, layers: str, side: Any, theirs: tuple[int, ...], own: tuple[int, ...]
) -> None:
    teacher, student = (KVShape(n, h * g, h, e, d) for n, h, g, e, d in (theirs, own))
    aligner = MapProjectionAligner(teacher, student, mode, layer_map=layers, side=side)
    source, target = (teacher, student) if side == "teacher" else (student, teacher)
    segments, own_segments = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[0, 1, 1]])
    T, out = (5, 3) if side == "teacher" else (3, 5)
    k, v, q = aligner(*of_shape(source, T, 1), segments, own_segments)
    for made, wanted in zip((k, v, q), of_shape(target, out, 1)):
        assert made.shape == wanted.shape
        assert bool(made.isfinite().all())


def test_structured_is_layers_then_tokens_then_heads_and_widths() -> None:
    aligner = MapProjectionAligner(TEACHER, STUDENT, share_dim_proj=False, init_uniform=False)
    segments, own = torch.tensor([[0, 0, 0, 1, 1, 1, -1]] * 2), torch.tensor([[0, 0, 1, 1, 1, 1, -1]] * 2)
    k, v, q = of_shape(TEACHER)
    made = aligner(k, v, q, segments, own)
    rows = layer_map("ratio", 5, 2)
    for x, projector, result in zip((k, v, q), (aligner.keys, aligner.values, aligner.queries), made):
        means = torch.stack([sum(rows[s, t] * x[:, t] for t in range(5)) for s in range(2)], 1)
        assert projector is not None
        torch.testing.assert_close(result, projector(TimeWarper(segments, own)(means)))
    assert len({id(p) for p in aligner.parameters()}) == 6  # keys, values and queries apart


def test_between_equal_shapes_a_uniform_start_changes_nothing() -> None:
    aligner = MapProjectionAligner(TEACHER, TEACHER)
    for made, before in zip(aligner(*of_shape(TEACHER)), of_shape(TEACHER)):
        torch.testing.assert_close(made, before)


def test_flat_is_the_projector_on_heads_side_by_side() -> None:
    aligner = MapProjectionAligner(TEACHER, STUDENT, mode="flat", layer_map="skip", queries=False)
    k, v, _ = of_shape(TEACHER)
    made, _, none = aligner(k, v)
    assert none is None
    chosen = k[:, [2, 4]]  # the last of each group
    torch.testing.assert_close(made, unflatten_kv_heads(aligner.keys(flatten_kv_heads(chosen)), 2))
    with pytest.raises(HeadwiseError, match="queries given to an aligner without projectors for them"):
        aligner(k, v, of_shape(TEACHER)[2])


@pytest.mark.parametrize("mode", ["structured", "flat"])
@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("call", kv_lines())
def test_the_teacher_gets_no_gradient_and_the_students_keys_and_values_do(mode: Any, side: Any, call: str) -> None:
    teacher, student = small("attention=gqa(kv_heads=1)"), small(f"attention={call}")
    teacher.requires_grad_(side == "teacher")  # whatever the caller forgot
    aligner = MapProjectionAligner(teacher, student, mode, side=side, queries=False, layer_map="learned")
    with capture(teacher, {"keys", "values"}) as theirs, capture(student, {"keys", "values"}) as own:
        teacher(tokens(2, 9))
        student(tokens(2, 9))
    t_k, t_v, s_k, s_v = (
        torch.stack([x for x in xs if x is not None], 1) for xs in (theirs.keys, theirs.values, own.keys, own.values)
    )
    if side == "teacher":
        t_k, t_v, _ = aligner(t_k, t_v)
    else:
        s_k, s_v, _ = aligner(s_k, s_v)
    loss = kv_loss("mse")
    (loss(s_k, t_k, None) + loss(s_v, t_v, None)).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in aligner.parameters())
    for block in student.decoding_stack().blocks:
        names = ("wkv_a", "wkv_b") if hasattr(block.attention, "wkv_a") else ("wk", "wv")
        for name in names:
            assert getattr(block.attention, name).weight.grad.abs().sum() > 0


def test_a_frozen_aligner_is_the_uniform_one_and_learns_nothing() -> None:
    aligner = MapProjectionAligner(TEACHER, STUDENT, init_uniform=False).frozen()
    torch.testing.assert_close(aligner.keys.heads_SH, layer_map("ratio", 3, 2))
    assert not any(p.requires_grad for p in aligner.parameters())
    assert not any(x.requires_grad for x in aligner(*of_shape(TEACHER)) if x is not None)


def test_a_trained_map_of_layers_is_stochastic_and_a_given_one_is_taken() -> None:
    learned = MapProjectionAligner(TEACHER, STUDENT, layer_map="learned")
    k, v, _ = of_shape(TEACHER)
    learned(k, v)[0].square().sum().backward()
    assert learned.learned is not None
    assert learned.learned.logits_ST.grad is not None
    assert learned.layers_OI is None
    rows = torch.tensor([[0.0, 1, 0, 0, 0], [0.5, 0, 0, 0, 0.5]])
    made = MapProjectionAligner(TEACHER, TEACHER, layer_map=torch.eye(5)[[1, 0, 2, 3, 4]])(k, v)[0]
    torch.testing.assert_close(made, k[:, [1, 0, 2, 3, 4]])
    assert MapProjectionAligner(TEACHER, STUDENT, layer_map=rows)(k, v)[0].shape[1] == 2
    with pytest.raises(SettingsError, match=r"\[2, 5\] whose rows add up to 1 is wanted, but one of \[2, 5\] was"):
        MapProjectionAligner(TEACHER, STUDENT, layer_map=2 * rows)
    with pytest.raises(SettingsError, match="layer map cka needs"):
        MapProjectionAligner(TEACHER, STUDENT, layer_map="cka")


def test_equal_tokens_and_segments_change_no_bit() -> None:
    aligner = MapProjectionAligner(TEACHER, STUDENT)
    segments = torch.tensor([[0, 0, 1, 1, 1, 2, -1], [0, 1, 1, 1, 2, 2, 2]])
    k, v, q = of_shape(TEACHER)
    for one, other in zip(aligner(k, v, q), aligner(k, v, q, segments, segments.clone())):
        assert torch.equal(one, other)


def test_what_does_not_fit_is_an_error() -> None:
    k, v, q = of_shape(TEACHER)
    aligner = MapProjectionAligner(TEACHER, STUDENT)
    with pytest.raises(HeadwiseError, match=r"values of the teacher are .* the aligner was made for \[B,5,3,T,10\]"):
        aligner(k, k)
    with pytest.raises(HeadwiseError, match=r"keys of the student .* \[B,2,2,T,4\]"):
        MapProjectionAligner(TEACHER, STUDENT, side="student")(k, v)
    with pytest.raises(HeadwiseError, match="give segment_ids too"):
        aligner(k, v, q, None, torch.zeros(2, 7, dtype=torch.int64))
    with pytest.raises(SettingsError, match="unknown projection 'flatt'"):
        MapProjectionAligner(TEACHER, STUDENT, mode="flatt")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="unknown side 'both'"):
        MapProjectionAligner(TEACHER, STUDENT, side="both")  # type: ignore[arg-type]


# ---- the flat projector ----


def test_the_flat_projector_is_norm_linear_silu_linear() -> None:
    projector = KVDimensionProjector(3, 2, 4, 5, mlp_ratio=4).double()
    x = drawn(2, 3, 7, 12)
    h = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    h = h @ projector.up.weight.T + projector.up.bias
    assert h.shape[-1] == 4 * 10
    expected = (h * h.sigmoid()) @ projector.down.weight.T + projector.down.bias
    torch.testing.assert_close(projector(x), expected)


def test_the_flat_projector_without_hidden_numbers_is_linear_behind_its_norm() -> None:
    projector = KVDimensionProjector(3, 2, 4, 5, mlp_ratio=0).double()
    x = drawn(2, 3, 7, 12)
    torch.testing.assert_close(projector(x), projector.down(projector.norm(x)))
    assert sum(p.numel() for p in projector.parameters()) == 2 * 12 + 12 * 10 + 10


def test_elastic_widths_are_nested_and_each_is_trained() -> None:
    projector = KVDimensionProjector(2, 2, 4, 4, mlp_ratio=3, use_elastic=True)
    x = drawn(2, 7, 8, dtype=torch.float32)
    projector.eval()
    full = projector(x)
    outs = []
    for parts in (1, 2, 3):
        projector.parts = parts
        outs.append(projector(x))
        small_one = KVDimensionProjector(2, 2, 4, 4, mlp_ratio=parts)
        small_one.load_state_dict(
            {
                name: t[: parts * 8] if name.startswith("up") else t[:, : parts * 8] if name == "down.weight" else t
                for name, t in projector.state_dict().items()
            }
        )
        torch.testing.assert_close(outs[-1], small_one(x))
    assert torch.equal(outs[-1], full)
    projector.parts = None
    torch.manual_seed(0)
    drawn_ones = [projector.train()(x) for _ in range(12)]
    assert all(any(torch.equal(made, each) for each in outs) for made in drawn_ones)
    assert len({tuple(made.flatten().tolist()) for made in drawn_ones}) == 3


def test_dropout_and_impossible_ratios() -> None:
    projector = KVDimensionProjector(2, 2, 4, 4, dropout=0.5)
    x = drawn(2, 7, 8, dtype=torch.float32)
    assert not torch.equal(projector(x), projector(x))
    assert torch.equal(projector.eval()(x), projector(x))
    with pytest.raises(SettingsError, match="mlp_ratio=1 given; at least 2 for an elastic projector is wanted"):
        KVDimensionProjector(2, 2, 4, 4, mlp_ratio=1, use_elastic=True)
    with pytest.raises(SettingsError, match="mlp_ratio=-1"):
        KVDimensionProjector(2, 2, 4, 4, mlp_ratio=-1)
    with pytest.raises(HeadwiseError, match="8 numbers a token are wanted, but 4 were given; flatten the heads"):
        projector(torch.zeros(2, 2, 7, 4))
