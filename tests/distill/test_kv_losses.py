"""The losses against their definitions, and their size: the same whatever the batch, layers, heads and tokens."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_models import drawn
from torch import Tensor

from headwise.distill import StructuralKVLoss, create_structural_loss, kv_loss
from headwise.distill.losses import attention_kl, hidden_loss, logit_kd, masked_mean
from headwise.errors import HeadwiseError, SettingsError

KINDS = ("mse", "cosine", "smooth_l1")


def naive_distance(kind: str, s: Tensor, t: Tensor) -> float:
    """Of two vectors."""
    if kind == "cosine":
        return 1 - float(s @ t / (s.norm() * t.norm()))
    gaps = (s - t).abs().tolist()
    if kind == "mse":
        return sum(g * g for g in gaps) / len(gaps)
    return sum(g * g / 2 if g < 1 else g - 0.5 for g in gaps) / len(gaps)


def mask_of(B: int, T: int, lengths: list[int]) -> Tensor:
    return torch.arange(T)[None] < torch.tensor(lengths[:B])[:, None]


@settings(max_examples=40)
@given(st.sampled_from(KINDS), st.integers(0, 9), st.lists(st.integers(0, 4), min_size=2, max_size=2))
def test_a_kv_loss_is_the_mean_over_heads_layers_and_tokens_that_count(
    kind: str, seed: int, lengths: list[int]
) -> None:
    s, t = drawn(2, 3, 2, 4, 5, seed=seed), drawn(2, 3, 2, 4, 5, seed=seed + 100)
    mask = mask_of(2, 4, lengths)
    each = [
        naive_distance(kind, s[b, layer, h, i], t[b, layer, h, i])
        for b, layer, h, i in itertools.product(range(2), range(3), range(2), range(4))
        if mask[b, i]
    ]
    assert float(kv_loss(kind)(s, t, mask)) == pytest.approx(sum(each) / len(each) if each else 0.0)
    torch.testing.assert_close(kv_loss(kind)(s, t, None), kv_loss(kind)(s, t, torch.ones(2, 4, dtype=torch.bool)))


def repeated(x: Tensor, axis: int, times: int) -> Tensor:
    return x.repeat_interleave(times, axis) if axis != 3 else x.repeat(1, 1, 1, times, 1)


@given(st.sampled_from(KINDS), st.integers(0, 3), st.integers(2, 4))
def test_the_size_of_a_loss_does_not_depend_on_batch_layers_heads_or_tokens(kind: str, axis: int, times: int) -> None:
    s, t = drawn(2, 3, 2, 4, 5), drawn(2, 3, 2, 4, 5, seed=1)
    more = kv_loss(kind)(repeated(s, axis, times), repeated(t, axis, times), None)
    torch.testing.assert_close(more, kv_loss(kind)(s, t, None))


@given(st.integers(0, 2), st.integers(2, 4))
def test_the_size_of_the_structural_loss_does_not_either(axis: int, times: int) -> None:
    tensors = [drawn(2, 3, 2, 4, 5, seed=n) for n in range(6)]
    loss, _ = StructuralKVLoss()(*tensors)
    more, _ = StructuralKVLoss()(*(repeated(x, axis, times) for x in tensors))
    torch.testing.assert_close(more, loss)


def test_longer_texts_of_alike_rows_cost_the_same() -> None:
    """Over T the size cannot be equal to the bit, for rows see more keys; it stays what rows of that length cost."""

    def kl(T: int) -> float:
        torch.manual_seed(T)
        return float(attention_kl(*(torch.randn(4, 4, 4, T, 8) for _ in range(4))))

    small, large = kl(32), kl(256)
    assert small / 2 < large < small * 2  # a sum over rows would be eight times as much


def naive_kl(s_q: Tensor, s_k: Tensor, t_q: Tensor, t_k: Tensor, mask: Tensor, tau: float) -> float:
    """Of one key/value head a group of query heads, row by row over the keys it sees."""
    B, L, H, T, D = s_q.shape
    group, rows = H // s_k.shape[2], []
    for b, layer, h, i in itertools.product(range(B), range(L), range(H), range(T)):
        if not mask[b, i]:
            continue
        seen = [j for j in range(i + 1) if mask[b, j]]

        def weights(
            q: Tensor, k: Tensor, at: tuple[int, ...] = (b, layer, h, i), seen: list[int] = seen
        ) -> list[float]:
            b, layer, h, i = at
            scores = [float(q[b, layer, h, i] @ k[b, layer, h // group, j]) / (math.sqrt(D) * tau) for j in seen]
            total = sum(map(math.exp, scores))
            return [math.exp(score) / total for score in scores]

        p, q = weights(t_q, t_k), weights(s_q, s_k)
        rows.append(sum(x * math.log(x / y) for x, y in zip(p, q)))
    return sum(rows) / len(rows)


@given(st.integers(0, 20), st.sampled_from([0.5, 1.0, 3.0]), st.integers(1, 5), st.booleans())
@settings(max_examples=40)
def test_the_structural_loss_is_its_formula(seed: int, tau: float, length: int, before: bool) -> None:
    s_k, s_v, t_k, t_v = (drawn(2, 2, 2, 5, 3, seed=seed + n) for n in range(4))
    s_q, t_q = drawn(2, 2, 4, 5, 3, seed=seed + 50), drawn(2, 2, 4, 5, 3, seed=seed + 51)
    mask = mask_of(2, 5, [5, length])
    mask = mask.flip(1) if before else mask  # padding before the text, or behind it
    loss, metrics = create_structural_loss(alpha_k=0.7, alpha_v=1.3, alpha_attn=0.4, temperature=tau)(
        s_k, s_v, s_q, t_k, t_v, t_q, mask
    )
    kl = naive_kl(s_q, s_k, t_q, t_k, mask, tau)
    cos_k, cos_v = (1 - float(kv_loss("cosine")(s, t, mask)) for s, t in ((s_k, t_k), (s_v, t_v)))
    assert float(loss) == pytest.approx(0.7 * (1 - cos_k) + 1.3 * (1 - cos_v) + 0.4 * tau**2 * kl)
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(
        {"cos_k": cos_k, "cos_v": cos_v, "kl_attn": kl}
    )


def test_equal_caches_cost_nothing() -> None:
    k, v, q = drawn(2, 3, 2, 6, 4), drawn(2, 3, 2, 6, 5), drawn(2, 3, 4, 6, 4)
    loss, metrics = StructuralKVLoss()(k, v, q, k, v, q)
    assert abs(float(loss)) < 1e-12
    assert float(metrics["kl_attn"]) == 0.0
    for kind in KINDS:
        assert abs(float(kv_loss(kind)(k, k, None))) < 1e-12


def test_rows_see_no_later_key_and_no_padding() -> None:
    """Only what a row may see changes its part of the KL: keys after it and padding do not."""
    tensors = {name: drawn(1, 1, 1, 6, 4, seed=n) for n, name in enumerate(("s_q", "s_k", "t_q", "t_k"))}
    first_three = torch.tensor([[True, True, True, False, False, False]])
    before = attention_kl(**tensors, mask_BT=first_three)
    for name in tensors:
        changed = {**tensors, name: tensors[name].clone()}
        changed[name][..., 3:, :] = 99.0
        torch.testing.assert_close(attention_kl(**changed, mask_BT=first_three), before)
        changed[name][..., 1, :] = 99.0
        assert not torch.allclose(attention_kl(**changed, mask_BT=first_three), before)
    later = tensors["s_k"].clone().requires_grad_()
    attention_kl(tensors["s_q"], later, tensors["t_q"], tensors["t_k"], first_three).backward()
    assert later.grad is not None
    assert float(later.grad[..., 3:, :].abs().sum()) == 0
    alone = torch.tensor([[False, True, True, False, False, False]])  # padding before as well
    assert math.isfinite(float(attention_kl(**tensors, mask_BT=alone)))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_counts_for_nothing(kind: str) -> None:
    s, t = drawn(2, 1, 1, 4, 3).requires_grad_(), drawn(2, 1, 1, 4, 3, seed=1)
    mask = mask_of(2, 4, [4, 2])
    before = float(kv_loss(kind)(s, t, mask).detach())
    t[1, ..., 2:, :] = 1e9
    loss = kv_loss(kind)(s, t, mask)
    loss.backward()
    assert float(loss.detach()) == before
    assert s.grad is not None
    assert float(s.grad[1, ..., 2:, :].abs().sum()) == 0
    assert float(masked_mean(s[..., 0], torch.zeros(2, 4, dtype=torch.bool)).detach()) == 0.0


def test_gradients_of_the_structural_loss_are_right_and_half_precision_is_widened() -> None:
    tensors = [drawn(1, 2, 2, 3, 4, seed=n) for n in range(6)]
    s_k, s_v, s_q = (x.requires_grad_() for x in tensors[:3])
    torch.autograd.gradcheck(
        lambda k, v, q: StructuralKVLoss(temperature=2.0)(k, v, q, *tensors[3:])[0], (s_k, s_v, s_q)
    )
    halves = [x.detach().bfloat16() for x in tensors]
    loss, _ = StructuralKVLoss()(*halves)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, StructuralKVLoss()(*(x.float() for x in halves))[0])


def test_a_weight_of_zero_leaves_its_term_out() -> None:
    k, v = drawn(1, 1, 1, 3, 4), drawn(1, 1, 1, 3, 4, seed=1)
    loss, metrics = StructuralKVLoss(alpha_attn=0)(k, v, None, v, v, None)
    assert set(metrics) == {"cos_k", "cos_v"}
    torch.testing.assert_close(loss, kv_loss("cosine")(k, v, None))


def test_logits_are_compared_over_the_vocabulary_at_a_temperature() -> None:
    s, t = drawn(2, 3, 7).requires_grad_(), drawn(2, 3, 7, seed=1).requires_grad_()
    mask = mask_of(2, 3, [3, 1])
    each = []
    for b, i in itertools.product(range(2), range(3)):
        if mask[b, i]:
            p, q = (t[b, i] / 2).softmax(-1), (s[b, i] / 2).softmax(-1)
            each.append(4 * float((p * (p / q).log()).sum().detach()))
    loss = logit_kd(s, t, mask, tau=2.0)
    assert float(loss.detach()) == pytest.approx(sum(each) / 4)
    loss.backward()
    assert t.grad is None
    assert s.grad is not None
    assert float(s.grad[1, 1:].abs().sum()) == 0
    assert abs(float(logit_kd(s, s, mask, tau=3.0).detach())) < 1e-12
    with pytest.raises(HeadwiseError, match=r"is \[2, 3, 7\] and its target \[2, 3, 6\]"):
        logit_kd(s, t[..., :6])


def test_hidden_states_are_compared_as_a_share_of_the_targets_size() -> None:
    s, t = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5, seed=1)
    mask = mask_of(2, 4, [4, 1])
    shares = []
    for layer in range(3):
        gap, size = (s - t)[:, layer][mask], t[:, layer][mask]
        shares.append(float(gap.square().sum() / size.square().sum()))
    assert float(hidden_loss(s, t, mask)) == pytest.approx(sum(shares) / 3)
    assert float(hidden_loss(torch.zeros_like(t), t)) == pytest.approx(1.0)
    assert float(hidden_loss(t, t)) == 0.0
    torch.testing.assert_close(hidden_loss(1e3 * s, 1e3 * t, mask), hidden_loss(s, t, mask))


def test_what_cannot_be_compared_is_an_error() -> None:
    k, q = drawn(1, 2, 2, 3, 4), drawn(1, 2, 4, 3, 4)
    with pytest.raises(HeadwiseError, match=r"is \[1, 2, 2, 3, 4\] and its target \[1, 1, 2, 3, 4\]; align the two"):
        kv_loss("mse")(k, k[:, :1], None)
    with pytest.raises(HeadwiseError, match="needs queries of both"):
        StructuralKVLoss()(k, k, q, k, k, None)
    with pytest.raises(SettingsError, match=r"unknown kv loss 'mes'.*did you mean 'mse'"):
        kv_loss("mes")
    given: Any
    for given in ({"alpha_k": -1.0}, {"temperature": 0.0}):
        with pytest.raises(SettingsError, match="weights of at least 0 and a temperature above 0"):
            create_structural_loss(**given)
