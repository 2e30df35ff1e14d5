"""Drawing tokens: each step as transformers' processors take it, and always probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from headwise.errors import HeadwiseError, SettingsError
from headwise.generate import History, Sampling
from headwise.generate.sampling import draw

LOGITS = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12).map(torch.tensor)
IDS = st.lists(st.integers(0, 29), max_size=8)
# The order in which transformers' `generate` puts its processors and warpers.
THEIRS: dict[str, Any] = {
    "logit_bias": lambda bias: SequenceBiasLogitsProcessor({(i,): b for i, b in bias.items()}),
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
}
KNOBS = {
    "logit_bias": st.dictionaries(st.integers(0, 29), st.floats(-5, 5), min_size=1, max_size=5),
    "repetition_penalty": st.floats(0.5, 2),
    "temperature": st.floats(0.1, 3),
    "top_k": st.integers(1, 30),
    "top_p": st.floats(0.05, 0.95),
    "min_p": st.floats(0.01, 0.9),
    "typical_p": st.floats(0.05, 0.95),
}


@given(st.fixed_dictionaries({}, optional=KNOBS), IDS, IDS, st.integers(0, 2**32))
def test_any_knobs_together_give_what_transformers_gives(
    knobs: dict[str, Any], prompt: list[int], new: list[int], seed: int
) -> None:
    logits = 3 * torch.randn(1, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    theirs = LogitsProcessorList([THEIRS[name](knobs[name]) for name in THEIRS if name in knobs])
    wanted = theirs(torch.tensor([prompt + new], dtype=torch.int64), logits.clone())[0].softmax(0)
    found = Sampling(**knobs).probabilities(logits[0], History(prompt, new))
    assert torch.allclose(found, wanted, atol=1e-6)
    assert torch.equal(found > 0, wanted > 0)


@given(IDS, st.floats(-2, 2), st.floats(-2, 2))
def test_penalties_of_frequency_and_presence_are_openais(new: list[int], frequency: float, presence: float) -> None:
    """mu[j] - c[j]·frequency - (c[j] > 0)·presence, c the times in the new text; the prompt does not count."""
    logits = torch.randn(30, dtype=torch.float64)
    found = Sampling(frequency_penalty=frequency, presence_penalty=presence).scores(logits, History([1, 2, 3], new))
    for i in range(30):
        assert float(found[i]) == pytest.approx(
            float(logits[i]) - new.count(i) * frequency - (new.count(i) > 0) * presence
        )


@given(
    logits=LOGITS,
    temperature=st.floats(0, 5),
    top_k=st.none() | st.integers(1, 20),
    top_p=st.none() | st.floats(0.01, 1),
    min_p=st.none() | st.floats(0, 1),
    typical_p=st.none() | st.floats(0.01, 1),
)
def test_any_choice_of_knobs_gives_probabilities(logits: torch.Tensor, **knobs: Any) -> None:
    probs = Sampling(**knobs).probabilities(logits)
    assert probs.shape == logits.shape
    assert bool((probs >= 0).all())
    assert float(probs.sum()) == pytest.approx(1, abs=1e-9)
    assert int((probs > 0).sum()) >= 1


def test_greedy_is_the_maximum_of_what_biases_and_penalties_leave() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0])
    generator = torch.Generator()
    assert Sampling(temperature=0).pick(logits, generator) == 1
    assert Sampling(temperature=0).probabilities(logits).tolist() == [0, 1, 0]
    assert Sampling(temperature=0, logit_bias={1: -math.inf}).pick(logits, generator) == 2
    assert Sampling(temperature=0, repetition_penalty=4).pick(logits, generator, History([1])) == 2
    assert Sampling(temperature=0, presence_penalty=2.5).pick(logits, generator, History([], [1])) == 2
    assert Sampling(temperature=0).pick(logits, generator, History(), torch.tensor([True, False, False])) == 0


def test_top_k_keeps_what_ties_with_the_kth() -> None:
    assert int((Sampling(top_k=2).probabilities(torch.tensor([1.0, 0, 0, -1])) > 0).sum()) == 3


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


@given(st.lists(st.sampled_from([0.0, 1e-300, 1e-9, 0.5]), min_size=1, max_size=9), st.integers(0, 1000))
def test_what_has_no_probability_is_never_drawn(weights: list[float], seed: int) -> None:
    if any(weights):
        assert weights[draw(torch.tensor(weights, dtype=torch.float64), torch.Generator().manual_seed(seed))] > 0


def test_a_request_draws_by_seed_and_number() -> None:
    def first(seed: int, index: int) -> float:
        return float(torch.rand((), generator=Sampling(seed=seed).generator(index)))

    assert first(1, 2) == first(1, 2)
    assert len({first(seed, index) for seed in range(10) for index in range(10)}) == 100
    assert first(2**63 - 1, 0) != first(2**62, 0)


def test_wrong_knobs_are_named_all_at_once() -> None:
    with pytest.raises(SettingsError) as error:
        Sampling(-1.0, 0, 1.5, 2.0, 0.0, 0.0, math.inf, math.nan, {-1: 0.0, 2: math.inf}, -1)
    named = [problem.partition(":")[0] for problem in error.value.problems]
    assert named == [*Sampling.__dataclass_fields__]
    with pytest.raises(SettingsError, match="token 9 is not in the vocabulary of 3"):
        Sampling(logit_bias={9: 1.0}).probabilities(torch.zeros(3))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_leave_nothing_to_choose_are_one_line(temperature: float) -> None:
    sampling = Sampling(temperature, logit_bias={0: -math.inf, 1: -math.inf})
    with pytest.raises(HeadwiseError, match="no token is left"):
        sampling.pick(torch.zeros(2), torch.Generator())
    with pytest.raises(HeadwiseError, match="NaN"):
        sampling.pick(torch.tensor([0.0, math.nan]), torch.Generator())
