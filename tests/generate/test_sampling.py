"""Drawing tokens: what each knob keeps, and that every value is a probability."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.errors import SettingsError
from headwise.generate import Sampling

LOGITS = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12).map(torch.tensor)


@given(
    logits=LOGITS,
    temperature=st.floats(0, 5),
    top_k=st.none() | st.integers(1, 20),
    top_p=st.none() | st.floats(0.01, 1),
)
def test_any_choice_of_knobs_gives_probabilities_that_keep_the_likeliest(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    probs = Sampling(temperature, top_k, top_p).probabilities(logits)
    assert probs.shape == logits.shape
    assert bool((probs >= 0).all())
    assert float(probs.sum()) == pytest.approx(1, abs=1e-5)
    assert float(probs[logits >= logits.max() - 1e-3].max()) > 0
    if top_k is not None:
        assert int((probs > 0).sum()) <= top_k


def test_greedy_is_the_maximum() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0])
    assert Sampling(temperature=0).pick(logits, torch.Generator()) == 1
    assert Sampling(temperature=0).probabilities(logits).tolist() == [0, 1, 0]


def test_top_k_keeps_exactly_k_even_among_equals() -> None:
    assert int((Sampling(top_k=2).probabilities(torch.zeros(5)) > 0).sum()) == 2


def test_top_p_keeps_the_fewest_that_reach_p() -> None:
    logits = torch.tensor([0.1, 0.5, 0.4]).log()
    assert Sampling(top_p=0.49).probabilities(logits).tolist() == pytest.approx([0, 1, 0])
    assert Sampling(top_p=0.51).probabilities(logits).tolist() == pytest.approx([0, 5 / 9, 4 / 9])
    assert Sampling(top_p=1.0).probabilities(logits).tolist() == pytest.approx([0.1, 0.5, 0.4])


def test_temperature_sharpens_and_a_tiny_one_does_not_overflow() -> None:
    logits = torch.tensor([30.0, 29.0])
    assert float(Sampling(2.0).probabilities(logits)[0]) == pytest.approx(1 / (1 + torch.e**-0.5))
    for tiny in (1e-40, 5e-324):
        assert Sampling(tiny).probabilities(logits).tolist() == [1, 0]


def test_draws_follow_the_probabilities() -> None:
    """20,000 draws of p = 0.3: the share lies within 0.013 (four standard deviations) but for 6 seeds in 100,000; the
    seed is fixed."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.tensor([0.3, 0.7]).log()
    draws = [Sampling().pick(logits, generator) for _ in range(20_000)]
    assert draws.count(0) / len(draws) == pytest.approx(0.3, abs=0.013)


def test_wrong_knobs_are_named_all_at_once() -> None:
    with pytest.raises(SettingsError, match=r"temperature.*top_k.*top_p"):
        Sampling(-1.0, 0, 1.5)
