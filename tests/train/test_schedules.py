"""Learning rates: their bounds, their corners, their direction."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.train import TrainSettings
from headwise.train.schedules import make_schedule

KINDS = ("cosine", "linear", "wsd", "constant")


@given(
    kind=st.sampled_from(KINDS),
    steps=st.integers(1, 400),
    warmup_share=st.floats(0, 1),
    lr=st.floats(1e-5, 1),
    end_share=st.floats(0, 1),
)
def test_every_schedule_warms_up_then_never_rises_and_keeps_its_bounds(
    kind: Any, steps: int, warmup_share: float, lr: float, end_share: float
) -> None:
    warmup = int(warmup_share * steps)
    settings = TrainSettings(schedule=kind, steps=steps, warmup=warmup, lr=lr, min_lr=lr * end_share)
    rate = make_schedule(settings)
    rates = [rate(step) for step in range(steps)]
    rise, fall = rates[:warmup], rates[warmup:]
    assert all(earlier < later for earlier, later in pairwise(rise))
    assert all(earlier >= later - 1e-12 for earlier, later in pairwise(fall))
    assert all(0 < value <= lr * (1 + 1e-9) for value in rise)
    assert all(settings.final_lr * (1 - 1e-9) <= value <= lr * (1 + 1e-9) for value in fall)
    if fall:
        assert fall[0] == lr
    if kind == "constant":
        assert set(fall) <= {lr}


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_schedule_ends_at_min_lr(kind: Any) -> None:
    rate = make_schedule(TrainSettings(schedule=kind, steps=100, warmup=10, lr=1.0, min_lr=0.1))
    assert rate(100) == pytest.approx(0.1)


def test_cosine_is_halfway_in_the_middle() -> None:
    rate = make_schedule(TrainSettings(steps=110, warmup=10, lr=1.0, min_lr=0.0))
    assert rate(60) == pytest.approx(0.5)
    assert rate(35) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_is_flat_until_it_decays() -> None:
    rate = make_schedule(TrainSettings(schedule="wsd", steps=100, warmup=5, lr=1.0, min_lr=0.0, decay_fraction=0.25))
    assert {rate(step) for step in range(5, 76)} == {1.0}
    assert rate(80) == pytest.approx(0.8)


def test_a_wsd_decay_that_would_start_in_the_warm_up_starts_after_it() -> None:
    rate = make_schedule(TrainSettings(schedule="wsd", steps=10, warmup=8, lr=1.0, min_lr=0.0, decay_fraction=1.0))
    assert rate(8) == 1.0
    assert rate(9) == pytest.approx(0.5)


def test_defaults_are_a_tenth_and_a_twentieth() -> None:
    settings = TrainSettings(lr=2e-3, steps=200)
    assert settings.final_lr == pytest.approx(2e-4)
    assert settings.warmup_steps == 10
