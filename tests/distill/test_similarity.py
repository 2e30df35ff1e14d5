"""Cosine and CKA against their definitions, and the control: a collapsed target is met by anything, and it shows."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_models import drawn
from torch import Tensor

from headwise.distill import KVShape, MapProjectionAligner
from headwise.distill.layer_map import layer_map
from headwise.distill.losses import kv_loss
from headwise.distill.similarity import cka_matrix, cosine, likeness, linear_cka, shuffled
from headwise.errors import HeadwiseError


def mask_of(T: int, lengths: list[int]) -> Tensor:
    return torch.arange(T)[None] < torch.tensor(lengths)[:, None]


@given(st.integers(0, 20), st.lists(st.integers(1, 4), min_size=3, max_size=3))
@settings(max_examples=30)
def test_cosine_is_the_mean_over_heads_and_tokens_of_a_layer(seed: int, lengths: list[int]) -> None:
    s, t, mask = drawn(3, 2, 2, 4, 5, seed=seed), drawn(3, 2, 2, 4, 5, seed=seed + 1), mask_of(4, lengths)
    for layer in range(2):
        each = [
            float(s[b, layer, h, i] @ t[b, layer, h, i] / (s[b, layer, h, i].norm() * t[b, layer, h, i].norm()))
            for b, h, i in itertools.product(range(3), range(2), range(4))
            if mask[b, i]
        ]
        assert float(cosine(s, t, mask)[layer]) == pytest.approx(sum(each) / len(each), abs=1e-5)
    assert float(cosine(s, s)[0]) == pytest.approx(1)


def naive_cka(x_NF: Tensor, y_NG: Tensor) -> float:
    """By the Gram matrices, HSIC(K, L)/√(HSIC(K, K)·HSIC(L, L))."""
    n = len(x_NF)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n

    def hsic(a: Tensor, b: Tensor) -> float:
        return float(((centre @ a @ centre) * (centre @ b @ centre)).sum())

    k, gram = x_NF @ x_NF.T, y_NG @ y_NG.T
    return hsic(k, gram) / (hsic(k, k) * hsic(gram, gram)) ** 0.5


@given(st.integers(0, 20))
@settings(max_examples=20)
def test_cka_is_that_of_the_gram_matrices(seed: int) -> None:
    x, y = drawn(2, 3, 2, 6, 3, seed=seed), drawn(2, 2, 4, 6, 2, seed=seed + 1)
    mask = mask_of(6, [6, 4])

    def tokens_of(t: Tensor, layer: int) -> Tensor:
        return torch.cat([t[b, layer, :, i].flatten()[None] for b in range(2) for i in range(6) if mask[b, i]])

    matrix = cka_matrix(x, y, mask)
    assert matrix.shape == (3, 2)
    for i, j in itertools.product(range(3), range(2)):
        assert float(matrix[i, j]) == pytest.approx(naive_cka(tokens_of(x, i), tokens_of(y, j)), abs=1e-5)
    torch.testing.assert_close(linear_cka(x[:, :2], y, mask), matrix[:2].diagonal())


def test_cka_is_blind_to_turning_and_stretching_and_zero_for_a_constant() -> None:
    x = drawn(2, 2, 1, 50, 4)
    turned = 3 * x @ torch.linalg.qr(drawn(4, 4, seed=9))[0] + 7
    torch.testing.assert_close(linear_cka(x, turned), torch.ones(2))
    assert linear_cka(x, torch.ones_like(x)).tolist() == [0.0, 0.0]
    assert float(linear_cka(x, drawn(2, 2, 1, 50, 4, seed=1)).max()) < 0.3


def test_cka_finds_the_layers_that_a_student_was_made_of() -> None:
    teacher = drawn(2, 6, 3, 40, 4)
    student = teacher[:, [1, 3, 4], :2] + 0.1 * drawn(2, 3, 2, 40, 4, seed=1)
    chosen = layer_map("cka", 6, 3, cka_matrix(student, teacher))
    assert chosen.argmax(-1).tolist() == [1, 3, 4]


def test_the_control_pairs_each_sequence_with_another() -> None:
    target, mask = drawn(3, 1, 1, 4, 2), mask_of(4, [4, 2, 3])
    other, both = shuffled(target, mask)
    assert [next(n for n in range(3) if torch.equal(other[b], target[n])) for b in range(3)] == [2, 0, 1]
    assert both is not None
    assert both.sum(1).tolist() == [3, 2, 2]  # tokens that both have
    with pytest.raises(HeadwiseError, match="give a batch of 2 at least"):
        shuffled(target[:1])


def test_a_faithful_student_stands_out_from_the_control() -> None:
    target = drawn(6, 2, 2, 20, 8)
    found = likeness(target + 0.3 * drawn(6, 2, 2, 20, 8, seed=1), target)
    assert set(found) == {"cosine", "cosine_shuffled", "cka", "cka_shuffled"}
    assert all(len(values) == 2 for values in found.values())
    assert min(found["cosine"]) > 0.9 > 0.2 > max(map(abs, found["cosine_shuffled"]))
    assert min(found["cka"]) > 0.8 > 0.5 > max(found["cka_shuffled"])


@pytest.mark.parametrize(("side", "collapses"), [("teacher", True), ("student", False)])
def test_a_trained_projector_on_the_teachers_side_collapses_and_the_control_tells(side: str, collapses: bool) -> None:
    """A student whose keys hold nothing of its text: each is one constant and a little noise, the teacher's are noise.

    The teacher's projector learns to give that constant, and its cosine rises, against shuffled teachers as well. The
    student's cannot make the teacher's tensors anything else than they are.
    """
    torch.manual_seed(0)
    shape, T = KVShape(2, 2, 2, 4, 4), 16
    teacher = drawn(8, 2, 2, T, 4, dtype=torch.float32) + 1.0
    student = (1.0 + 0.05 * drawn(8, 2, 2, T, 4, seed=1, dtype=torch.float32)) * torch.tensor([1.0, -2.0, 3.0, 0.5])
    aligner = MapProjectionAligner(shape, shape, mode="flat", side=side, queries=False)  # type: ignore[arg-type]

    def pair() -> tuple[Tensor, Tensor]:
        if side == "teacher":
            return student, aligner(teacher, teacher)[0]
        return aligner(student, student)[0], teacher

    optimiser = torch.optim.AdamW(aligner.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        kv_loss("cosine")(*pair(), None).backward()
        optimiser.step()
    found = likeness(*pair())
    assert (min(found["cosine"]) > 0.98) == collapses
    gap = max(a - b for a, b in zip(found["cosine"], found["cosine_shuffled"]))
    assert gap < 0.02  # nothing was learned of any text, whatever the cosine


def test_what_cannot_be_compared_is_an_error() -> None:
    x = drawn(2, 2, 1, 4, 2)
    with pytest.raises(HeadwiseError, match="align the two first"):
        cosine(x, x[:, :1])
    with pytest.raises(HeadwiseError, match="2 layers and 1 given; align them, or ask for cka_matrix"):
        linear_cka(x, x[:, :1])
    with pytest.raises(HeadwiseError, match="of the same tokens are wanted"):
        cka_matrix(x, x[..., :3, :])
