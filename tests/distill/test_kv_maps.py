"""Maps of layers and heads: every row a mean, none empty, and the projector as its definition says."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kv_models import drawn
from torch import Tensor

from headwise.distill.head_map import HeadwiseMapProjector
from headwise.distill.layer_map import KINDS, LearnedLayerMap, group_means, layer_map
from headwise.errors import HeadwiseError, SettingsError

counts = st.integers(1, 17)


def naive_group_means(n_in: int, n_out: int) -> Tensor:
    """The same by cutting every item into n_out equal pieces and every n_in pieces into a group."""
    pieces = [item for item in range(n_in) for _ in range(n_out)]
    groups = [pieces[g * n_in : (g + 1) * n_in] for g in range(n_out)]
    return torch.tensor([[group.count(item) / n_in for item in range(n_in)] for group in groups])


@given(counts, counts)
def test_group_means_are_those_of_equal_pieces(n_in: int, n_out: int) -> None:
    torch.testing.assert_close(group_means(n_in, n_out), naive_group_means(n_in, n_out))


def test_where_groups_come_out_even_they_are_plain_means() -> None:
    expected = torch.zeros(3, 12)
    for row in range(3):
        expected[row, 4 * row : 4 * row + 4] = 0.25
    assert torch.equal(group_means(12, 3), expected)
    assert torch.equal(group_means(2, 4), torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]))


@given(counts, counts, st.sampled_from(KINDS), st.integers(0, 9))
def test_every_layer_map_is_row_stochastic_in_order_and_never_empty(n_t: int, n_s: int, kind: str, seed: int) -> None:
    similarity = drawn(n_s, n_t, seed=seed)
    matrix = layer_map(kind, n_t, n_s, similarity)
    assert matrix.shape == (n_s, n_t)
    assert bool((matrix >= 0).all())
    torch.testing.assert_close(matrix.sum(-1), torch.ones(n_s))
    places = matrix @ torch.arange(n_t).float()
    assert bool((places.diff() >= -1e-5).all())  # later layers learn from later ones
    if kind in ("uniform", "skip", "cka"):
        assert bool(((matrix == 0) | (matrix == 1)).all())
    if n_t == n_s and kind in ("ratio", "uniform", "skip"):
        assert torch.equal(matrix, torch.eye(n_t))


def test_single_layers_are_the_ones_that_the_names_say() -> None:
    def chosen(kind: str, n_t: int, n_s: int) -> list[int]:
        return layer_map(kind, n_t, n_s).argmax(-1).tolist()

    assert chosen("uniform", 12, 4) == [0, 4, 7, 11]  # of 0, 3⅔, 7⅓, 11
    assert chosen("skip", 12, 4) == [2, 5, 8, 11]
    assert chosen("uniform", 5, 1) == chosen("skip", 5, 1) == [4]
    assert chosen("uniform", 2, 4) == chosen("skip", 2, 4) == [0, 0, 1, 1]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_cka_takes_the_best_of_all_maps_in_order(n_t: int, n_s: int, seed: int) -> None:
    similarity = drawn(n_s, n_t, seed=seed)
    best = max(
        sum(float(similarity[row, at]) for row, at in enumerate(each))
        for each in itertools.combinations_with_replacement(range(n_t), n_s)
    )
    assert float((layer_map("cka", n_t, n_s, similarity).double() * similarity).sum()) == pytest.approx(best)


def test_a_learned_map_starts_near_ratio_and_stays_stochastic() -> None:
    learned = LearnedLayerMap(6, 3)
    torch.testing.assert_close(learned(), group_means(6, 3), rtol=0, atol=0.01)
    (learned() * drawn(3, 6).float()).sum().backward()
    with torch.no_grad():
        assert learned.logits_ST.grad is not None
        learned.logits_ST -= 50 * learned.logits_ST.grad
    torch.testing.assert_close(learned().sum(-1), torch.ones(3))
    assert not torch.allclose(learned(), group_means(6, 3), atol=0.1)


def test_impossible_layer_maps_are_errors() -> None:
    with pytest.raises(SettingsError, match=r"unknown layer map 'ration'.*did you mean 'ratio'"):
        layer_map("ration", 4, 2)
    with pytest.raises(SettingsError, match=r"cka needs the CKA of each pair of layers, \[2,4\], but \[4, 2\]"):
        layer_map("cka", 4, 2, torch.ones(4, 2))
    with pytest.raises(SettingsError, match=r"\[2,4\], but none was given"):
        layer_map("cka", 4, 2)
    with pytest.raises(SettingsError, match="0 teacher layers"):
        layer_map("ratio", 0, 2)


# ---- heads ----

heads = st.integers(1, 5)


@given(heads, heads, heads, heads, st.booleans(), st.booleans())
def test_a_projector_mixes_heads_then_widths(H: int, K: int, D: int, E: int, share: bool, uniform: bool) -> None:
    projector = HeadwiseMapProjector(H, K, D, E, share, uniform).double()
    x = drawn(2, 3, H, 4, D)
    m, p = projector.heads_SH, projector.widths_DE
    expected = torch.empty(2, 3, K, 4, E, dtype=torch.float64)
    for b, layer, k, t in itertools.product(range(2), range(3), range(K), range(4)):
        mixed = sum(m[k, h] * x[b, layer, h, t] for h in range(H))
        expected[b, layer, k, t] = (p if share else p[k]) @ mixed
    torch.testing.assert_close(projector(x), expected)
    assert sum(each.numel() for each in projector.parameters()) == K * H + E * D * (1 if share else K)


@given(st.integers(1, 9), st.integers(1, 9))
def test_a_uniform_start_averages_groups_of_heads(H: int, K: int) -> None:
    projector = HeadwiseMapProjector(H, K, 4, 4)
    assert torch.equal(projector.heads_SH, group_means(H, K))
    x = drawn(1, 1, H, 2, 4, dtype=torch.float32)
    torch.testing.assert_close(projector(x), torch.einsum("kh,blhtd->blktd", group_means(H, K), x))
    if H == K:
        torch.testing.assert_close(projector(x), x)  # nothing to change


@pytest.mark.parametrize(("D", "E"), [(8, 4), (4, 8)])
def test_widths_start_orthonormal_and_alike_in_all_heads(D: int, E: int) -> None:
    p = HeadwiseMapProjector(3, 2, D, E, share_dim_proj=False).widths_DE
    gram = p[0] @ p[0].T if E < D else p[0].T @ p[0]
    torch.testing.assert_close(gram, torch.eye(min(D, E)))
    assert torch.equal(p[0], p[1])


def test_a_drawn_start_differs_in_the_head_map_alone() -> None:
    torch.manual_seed(3)
    drawn_start = HeadwiseMapProjector(4, 2, 8, 8, init_uniform=False)
    assert float(drawn_start.heads_SH.detach().abs().max()) <= 0.5
    assert not torch.allclose(drawn_start.heads_SH, group_means(4, 2), atol=0.05)
    assert torch.equal(drawn_start.widths_DE, torch.eye(8))


def test_other_heads_than_the_projectors_are_an_error() -> None:
    with pytest.raises(HeadwiseError, match=r"\[…,4,T,8\] is wanted, but \[1, 2, 8, 5, 4\] was given"):
        HeadwiseMapProjector(4, 2, 8, 8)(torch.zeros(1, 2, 8, 5, 4))
