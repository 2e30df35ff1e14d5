"""Claims are true as often as promised: simulated comparisons, scipy's own tests, and relations that must hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from headwise.errors import SettingsError
from headwise.lab import stats

ALPHA = 0.05
SIMULATIONS = 1000


def simulate(rng: np.random.Generator, effects: list[float], seeds: int, noise: float, shared: float = 0.2):
    """Losses near 2 nats: noise shared by all variants of a seed, private noise so that differences have sd `noise`."""
    common = 2.0 + shared * rng.standard_normal(seeds)
    rows = [common + noise / math.sqrt(2) * rng.standard_normal(seeds) for _ in range(len(effects) + 1)]
    return rows[0], [row + effect for row, effect in zip(rows[1:], effects, strict=True)]


def at_most(rate: float, n: int = SIMULATIONS) -> int:
    """A count that a process of this rate exceeds once in 1,000 times (the simulations are seeded as well)."""
    return int(scipy_stats.binom.ppf(0.999, n, rate))


@pytest.mark.parametrize("seeds", [5, 6, 12])
def test_a_comparison_of_equals_claims_a_winner_no_more_often_than_alpha(seeds: int) -> None:
    """A/A: four variants that differ by noise only, and a margin too narrow for 'equivalent' to come to the rescue."""
    rng = np.random.default_rng(seeds)
    false = 0
    for _ in range(SIMULATIONS):
        baseline, variants = simulate(rng, [0.0] * 4, seeds, noise=0.02)
        verdicts = [c.verdict for c in stats.assess(baseline, variants, margin=1e-5, alpha=ALPHA)]
        false += bool({"better", "worse"} & set(verdicts))
    assert false <= at_most(ALPHA)


def test_the_correction_is_needed_to_keep_that_promise() -> None:
    """Guards the test above: without Holm the same simulation breaks the limit, so it can tell the two apart."""
    rng = np.random.default_rng(0)
    false = 0
    for _ in range(SIMULATIONS):
        baseline, variants = simulate(rng, [0.0] * 4, 6, noise=0.02)
        false += any(c.p is not None and c.p < ALPHA for c in stats.assess(baseline, variants, margin=1e-5))
    assert false > at_most(ALPHA)


@pytest.mark.parametrize("side", [-1, 1])
def test_variants_at_the_edge_of_the_margin_are_called_equivalent_no_more_often_than_alpha(side: int) -> None:
    rng = np.random.default_rng(7)
    edge = side * 0.005 * 2.0
    false = 0
    for _ in range(SIMULATIONS):
        # No noise on the baseline's mean: the edge is then exactly where the true difference lies.
        common = np.full(8, 2.0)
        variants = [common + edge + 0.004 * rng.standard_normal(8) for _ in range(3)]
        false += any(c.verdict == "equivalent" for c in stats.assess(common, variants, alpha=ALPHA))
    assert 0 < false <= at_most(ALPHA)


@pytest.mark.parametrize("n_variants", [1, 3])
def test_a_difference_of_min_detectable_is_found_with_the_promised_power(n_variants: int) -> None:
    """One variant: 80 % to simulation error. Several: Holm's strictest step is assumed, so at least that."""
    rng = np.random.default_rng(11)
    seeds, sd, found = 6, 0.02, 0
    effect = sd * stats.smallest_effect(seeds, ALPHA / n_variants)
    for _ in range(SIMULATIONS):
        baseline, variants = simulate(rng, [effect] + [0.0] * (n_variants - 1), seeds, noise=sd)
        found += stats.assess(baseline, variants, margin=1e-5, alpha=ALPHA)[0].verdict == "worse"
    tolerance = 3.3 * math.sqrt(0.8 * 0.2 / SIMULATIONS)
    assert found / SIMULATIONS > 0.8 - tolerance
    if n_variants == 1:
        assert found / SIMULATIONS < 0.8 + tolerance


def test_min_detectable_is_that_of_the_strictest_step() -> None:
    rng = np.random.default_rng(2)
    baseline, variants = simulate(rng, [0.0] * 3, 7, noise=0.02)
    for c in stats.assess(baseline, variants, alpha=0.1):
        assert c.min_detectable == pytest.approx(c.sd * stats.smallest_effect(7, 0.1 / 3))


def test_the_number_of_seeds_asked_for_is_enough_for_a_verdict() -> None:
    """Both ways to a verdict: a difference beyond the margin, and one well inside it."""
    rng = np.random.default_rng(3)
    for effect, expected in [(0.02, "worse"), (0.001, "equivalent")]:
        total = stats.seeds_for_verdict(effect, 0.02, 0.01, ALPHA)
        assert total is not None
        decided = 0
        for _ in range(400):
            d = effect + 0.02 * rng.standard_normal(total)
            decided += stats.assess(np.full(total, 2.0), [2.0 + d], alpha=ALPHA)[0].verdict == expected
        assert abs(decided / 400 - 0.8) < 0.09
        assert stats.seeds_for_verdict(effect, 0.01, 0.01, ALPHA) <= total  # less noise never asks for more


def test_numbers_are_scipys() -> None:
    rng = np.random.default_rng(1)
    baseline, variants = simulate(rng, [0.03, -0.01], 7, noise=0.02)
    for row, c in zip(variants, stats.assess(baseline, variants), strict=True):
        test = scipy_stats.ttest_rel(row, baseline)
        interval = test.confidence_interval(0.95)
        assert c.p == pytest.approx(test.pvalue, rel=1e-9)
        assert c.ci95 == pytest.approx((interval.low, interval.high), rel=1e-9)
        margin = 0.005 * baseline.mean()
        above = scipy_stats.ttest_1samp(row - baseline, -margin, alternative="greater").pvalue
        below = scipy_stats.ttest_1samp(row - baseline, margin, alternative="less").pvalue
        single = stats.assess(baseline, [row])[0]
        assert single.p_equivalent == pytest.approx(max(above, below), rel=1e-9)
        d = row - baseline
        assert c.effect_size == pytest.approx(d.mean() / d.std(ddof=1) * (1 - 3 / (4 * 6 - 1)), rel=5e-3)
    mean = stats.mean_ci(list(baseline))
    expected = scipy_stats.t.interval(0.95, 6, baseline.mean(), scipy_stats.sem(baseline))
    assert mean.ci95 == pytest.approx(expected, rel=1e-9)


def test_power_is_that_of_the_noncentral_t() -> None:
    for effect, n in [(0.5, 5), (1.0, 6), (-1.0, 6), (0.3, 40)]:
        t = scipy_stats.t.ppf(0.975, n - 1)
        shift = abs(effect) * math.sqrt(n)
        expected = scipy_stats.nct.sf(t, n - 1, shift) + scipy_stats.nct.cdf(-t, n - 1, shift)
        assert stats.power_of_difference(effect, n, 0.05) == pytest.approx(expected, abs=1e-5)


# --- the decision rule ------------------------------------------------------------------------------------------------


def around(mean: float, sd: float, n: int) -> np.ndarray:
    """n differences with exactly this mean and standard deviation."""
    z = np.linspace(-1, 1, n)
    return mean + sd * (z - z.mean()) / z.std(ddof=1)


def verdict(d: np.ndarray, **options: float) -> stats.Comparison:
    return stats.assess(np.full(len(d), 2.0), [2.0 + d], **options)[0]


@pytest.mark.parametrize(
    ("mean", "sd", "n", "expected"),
    [
        (-0.05, 0.01, 6, "better"),
        (0.05, 0.01, 6, "worse"),
        (0.0, 0.001, 6, "equivalent"),
        (0.004, 0.0005, 8, "equivalent"),  # significant, but proven to be smaller than the margin of 0.01
        (0.012, 0.0005, 8, "worse"),
        (0.01, 0.02, 6, "undecided"),
        (-0.5, 0.001, 4, "undecided"),  # fewer than five seeds claim nothing, however clear they look
        (0.0, 0.0001, 4, "undecided"),
    ],
)
def test_decision(mean: float, sd: float, n: int, expected: str) -> None:
    c = verdict(around(mean, sd, n))
    assert c.verdict == expected
    assert (c.seeds_needed is not None) == (expected == "undecided")


def test_equivalent_takes_precedence_over_significant() -> None:
    c = verdict(around(0.004, 0.0005, 8))
    assert c.p_holm is not None
    assert c.p_holm < 0.001
    assert c.verdict == "equivalent"
    assert verdict(around(0.004, 0.0005, 8), margin=0.0005).verdict == "worse"


def test_bit_identical_runs_are_equivalent_without_warnings() -> None:
    row = [1.9, 2.1, 2.0, 1.95, 2.05, 1.99]
    for n in (2, 4, 6):
        (c,) = stats.assess(row[:n], [row[:n]])
        assert (c.verdict, c.mean, c.p, c.p_holm, c.effect_size, c.min_detectable) == ("equivalent", 0, 1, 1, 0, 0)
    assert stats.assess(row[:1], [row[:1]])[0].verdict == "undecided"
    assert stats.assess(row, [row], margin=0)[0].verdict == "equivalent"


@pytest.mark.parametrize(("shift", "expected"), [(0.001, "equivalent"), (0.1, "worse"), (-0.1, "better")])
def test_a_constant_difference_is_taken_at_face_value(shift: float, expected: str) -> None:
    """Differences that vary by rounding only must not be divided by that rounding."""
    row = np.array([1.9, 2.1, 2.0, 1.95, 2.05])
    (c,) = stats.assess(row, [row + shift])
    assert (c.verdict, c.sd) == (expected, 0.0)
    assert c.p == 0
    assert stats.assess(row[:3], [row[:3] + 0.1])[0].verdict == "undecided"


def test_failed_runs_drop_their_pair_only() -> None:
    baseline = [2.0, 2.1, None, 1.9, 2.0, 2.05, 1.95]
    variant = [1.8, math.nan, 1.9, 1.71, 1.82, 1.84, 1.76]
    (c,) = stats.assess(baseline, [variant])
    (kept,) = stats.assess([2.0, 1.9, 2.0, 2.05, 1.95], [[1.8, 1.71, 1.82, 1.84, 1.76]])
    assert (c.n, c.verdict) == (5, "better")
    assert c.mean == pytest.approx(kept.mean, rel=1e-12)
    assert c.p == pytest.approx(kept.p, rel=1e-9)


@pytest.mark.parametrize("rows", [([2.0], [2.1]), ([None], [2.1]), ([2.0, None], [None, 2.0]), ([], [])])
def test_too_little_to_say_anything(rows: tuple[list, list]) -> None:
    (c,) = stats.assess(rows[0], [rows[1]])
    assert c.verdict == "undecided"
    assert c.seeds_needed == 5 - c.n
    assert c.p is None
    assert c.min_detectable is None


def test_an_absurd_number_of_seeds_is_capped() -> None:
    c = verdict(around(0.0099, 1.0, 6))
    assert (c.verdict, c.seeds_needed, c.seeds_capped) == ("undecided", stats.MAX_SEEDS_NEEDED, True)
    assert not verdict(around(0.02, 0.02, 6)).seeds_capped


@pytest.mark.parametrize(
    "options", [{"alpha": 0.0}, {"alpha": 0.7}, {"margin": -1.0}, {"margin": math.nan}, {"power": 1.0}]
)
def test_settings_out_of_range_are_named(options: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=next(iter(options))):
        stats.assess([2.0], [[2.0]], **options)


def test_rows_of_different_lengths_are_refused() -> None:
    with pytest.raises(SettingsError, match="3 losses, the baseline 2"):
        stats.assess([1.0, 2.0], [[1.0, 2.0, 3.0]])


# --- relations --------------------------------------------------------------------------------------------------------

differences = st.lists(st.floats(-0.2, 0.2), min_size=2, max_size=12).map(lambda x: np.round(x, 6))


@given(differences)
@settings(deadline=None)
def test_turning_the_differences_round_turns_the_verdict_round(d: np.ndarray) -> None:
    forth, back = verdict(d), verdict(-d)
    mirror = {"better": "worse", "worse": "better"}
    assert back.verdict == mirror.get(forth.verdict, forth.verdict)
    assert back.p == pytest.approx(forth.p, rel=1e-6)
    assert back.seeds_needed == forth.seeds_needed


@given(differences, st.sampled_from([2.0**k for k in (-20, -3, 1, 10)]))
@settings(deadline=None)
def test_the_unit_of_the_loss_does_not_matter(d: np.ndarray, unit: float) -> None:
    base = np.linspace(1.9, 2.1, len(d))
    (plain,) = stats.assess(base, [base + d])
    (scaled,) = stats.assess(base * unit, [(base + d) * unit])
    assert (scaled.verdict, scaled.seeds_needed) == (plain.verdict, plain.seeds_needed)
    assert scaled.p_holm == plain.p_holm


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=8))
def test_holm_is_the_textbook_definition(p_values: list[float | None]) -> None:
    adjusted = stats.holm(p_values)
    filled = [1.0 if p is None else p for p in p_values]
    ordered = sorted(range(len(filled)), key=lambda i: filled[i])
    for rank, i in enumerate(ordered):
        naive = max(min(1.0, (len(filled) - j) * filled[ordered[j]]) for j in range(rank + 1))
        assert adjusted[i] == (None if p_values[i] is None else pytest.approx(naive, rel=1e-12))
    known = [(p, a) for p, a in zip(p_values, adjusted, strict=True) if p is not None and a is not None]
    assert all(p <= a <= 1 for p, a in known)
    assert [a for _, a in sorted(known)] == sorted(a for _, a in known)


@given(differences, st.floats(0.001, 0.05), st.floats(1.1, 4))
@settings(deadline=None)
def test_a_wider_margin_never_makes_equivalence_harder(d: np.ndarray, margin: float, factor: float) -> None:
    narrow, wide = verdict(d, margin=margin), verdict(d, margin=margin * factor)
    assert wide.p_equivalent <= narrow.p_equivalent
    assert not (narrow.verdict == "equivalent" and wide.verdict != "equivalent")


# --- ratios -----------------------------------------------------------------------------------------------------------


def test_ratios_are_of_neighbouring_rounds() -> None:
    """A machine that slows to a third during the measurement leaves the ratio alone."""
    slowing = np.linspace(1, 1 / 3, 9)
    summary = stats.ratio_summary(1500 * slowing, 1000 * slowing)
    assert summary is not None
    assert (summary.ratio, summary.lo, summary.hi) == pytest.approx((1.5, 1.5, 1.5))


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=20))
def test_ratio_interval_holds_the_median_and_mirrors(pairs: list[tuple[float, float]]) -> None:
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    forth, back = stats.ratio_summary(a, b), stats.ratio_summary(b, a)
    assert forth is not None
    assert back is not None
    assert forth.lo <= forth.ratio <= forth.hi
    assert back.lo == pytest.approx(1 / forth.hi)
    assert back.hi == pytest.approx(1 / forth.lo)


@pytest.mark.parametrize("rounds", [6, 9, 15, 20])
def test_ratio_interval_covers_the_true_median(rounds: int) -> None:
    rng = np.random.default_rng(rounds)
    missed = 0
    for _ in range(SIMULATIONS):
        ratios = 1.2 * np.exp(0.1 * rng.standard_t(3, rounds))
        summary = stats.ratio_summary(ratios, np.ones(rounds))
        missed += not summary.lo <= 1.2 <= summary.hi
    assert missed <= at_most(0.05)
    if rounds == 20:
        assert summary.lo > ratios.min()  # and it is narrower than the whole range where it can be


def test_ratios_of_nothing() -> None:
    assert stats.ratio_summary([], []) is None
    assert stats.ratio_summary([math.nan, 0.0], [1.0, 1.0]) is None
    single = stats.ratio_summary([3.0, math.nan], [2.0, 1.0])
    assert single == stats.RatioSummary(1.5, None, None, 1)
    assert stats.mean_ci([]) == stats.Mean(0, None, None)
    assert stats.mean_ci([2.0, None]) == stats.Mean(1, 2.0, None)
