"""The statistics of a comparison: paired differences to a baseline, and what may be claimed from them.

All runs of one seed see the same batches, so a seed gives one difference per variant, loss(variant) − loss(baseline)
(nats a token; **negative is better**), in which the noise that they share cancels. Over the n seeds that both finished,
with mean d, standard deviation s (n − 1 in the denominator) and standard error e = s/√n:

* 95 % t-interval  d ± t(0.975, n−1)·e, and the two-sided paired t-test p of "no difference" (= scipy.stats.ttest_rel).
* `p_holm`: these p's corrected over all variants of the comparison (Holm 1979), so that the chance of *any* false
  "better" or "worse" in one comparison is at most α, whatever the dependence between variants.
* `p_equivalent`: TOST (Schuirmann 1987): the larger p of the two one-sided t-tests against −margin and +margin,
  Holm-corrected in the same way. The margin in nats is `margin` (default 0.5 %) × the baseline's mean loss.
* `effect_size`: Cohen's d_z = d/s with Hedges' exact small-sample correction (n ≥ 3).
* `min_detectable`: the difference that the t-test finds with 80 % probability at this n and s (noncentral t), at the
  level α/k of Holm's strictest step for k variants: the promise holds whatever the other variants do.

The decision, in this order:

1. n < 5: "undecided". Four seeds cannot show that the differences are anything like normal, which all tests assume.
   Only bit-identical losses in every pair (n ≥ 2) are "equivalent" all the same: nothing is left to be estimated.
2. p_equivalent < α: "equivalent", **even if p_holm < α as well**. With enough seeds every difference is significant;
   the margin is the user's own statement of what is too small to matter, so a difference proven to be smaller must not
   be sold as "better". The interval and p_holm still show it, and the sentence in the report says so.
3. p_holm < α: "better" or "worse", by the sign. This claims the direction, not that the difference exceeds the margin.
4. Otherwise "undecided", with `seeds_needed`: how many more seeds until either test would succeed with 80 % probability
   if the observed d and s were the true ones (an estimate from few seeds, hence "≈").

Differences with no spread at all (s below rounding of the losses) are taken at face value: p is 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import special
from scipy.optimize import brentq

from headwise.errors import SettingsError

MIN_SEEDS = 5
MAX_SEEDS_NEEDED = 1000  # beyond this, the honest answer is "more than you will run"
POWER = 0.8
ROUNDING = 1e-12  # relative to the losses: spread below it is arithmetic, not noise


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % t-interval (None below two values)."""

    n: int
    mean: float | None
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class RatioSummary:
    """The median of per-round ratios and an interval of at least 95 % (93.75 % at five rounds, less below)."""

    ratio: float
    lo: float | None
    hi: float | None
    rounds: int


@dataclass(frozen=True)
class Comparison:
    """One variant against the baseline; the fields are defined at the head of this file."""

    n: int
    mean: float | None
    sd: float | None
    ci95: tuple[float, float] | None
    relative: float | None
    p: float | None
    p_holm: float | None
    p_equivalent: float | None
    effect_size: float | None
    min_detectable: float | None
    verdict: Literal["better", "worse", "equivalent", "undecided"]
    seeds_needed: int | None = None
    seeds_capped: bool = False


def mean_ci(values: Sequence[float | None]) -> Mean:
    """Mean and 95 % t-interval of the finite ones among `values`."""
    x = _finite(values)
    if len(x) == 0:
        return Mean(0, None, None)
    mean = float(x.mean())
    if len(x) == 1:
        return Mean(1, mean, None)
    half = _t_quantile(0.975, len(x) - 1) * _sd(x, _scale(x)) / math.sqrt(len(x))
    return Mean(len(x), mean, (mean - half, mean + half))


def assess(
    baseline: Sequence[float | None],
    variants: Sequence[Sequence[float | None]],
    *,
    margin: float = 0.005,
    alpha: float = 0.05,
    power: float = POWER,
) -> list[Comparison]:
    """Judge every variant against the baseline.

    `baseline` and each of `variants` hold one loss a seed, in the same order of seeds; None or NaN is a failed run, and
    its pair is dropped. `margin` is relative to the baseline's mean loss. Raises SettingsError for rows of different
    lengths or settings out of range.
    """
    return assess_pairs([(baseline, losses) for losses in variants], margin=margin, alpha=alpha, power=power)


def assess_pairs(
    pairs: Sequence[tuple[Sequence[float | None], Sequence[float | None]]],
    *,
    margin: float = 0.005,
    alpha: float = 0.05,
    power: float = POWER,
) -> list[Comparison]:
    """As `assess`, each variant against a baseline of its own: pairs (baseline, variant) of one loss a seed.

    All pairs are one family of tests: Holm's correction is over all of them. Raises what `assess` raises.
    """
    if not 0 < alpha < 0.5:
        raise SettingsError(f"alpha = {alpha}: the error rate must lie between 0 and 0.5 (0.05 is usual)")
    if not 0 < power < 1:
        raise SettingsError(f"power = {power}: must lie between 0 and 1 (0.8 is usual)")
    if not (margin >= 0 and math.isfinite(margin)):
        raise SettingsError(
            f"margin = {margin}: give the largest relative difference that does not matter, such as 0.005"
        )
    first_pass, margins = [], []
    for baseline, losses in pairs:
        base, row = _as_floats(baseline), _as_floats(losses)
        if row.shape != base.shape:
            raise SettingsError(f"a variant has {len(row)} losses, the baseline {len(base)}; give one a seed to both")
        mean_base = mean_ci(list(base)).mean
        margins.append(0.0 if mean_base is None else margin * abs(mean_base))
        first_pass.append(_paired(base, row, margins[-1], mean_base))
    strict = alpha / max(1, len(first_pass))
    p_holm = holm([c.p for c in first_pass])
    p_equivalent = holm([c.p_equivalent for c in first_pass])
    return [
        _decide(replace(c, p_holm=ph, p_equivalent=pe), margin_nats, alpha, strict, power)
        for c, margin_nats, ph, pe in zip(first_pass, margins, p_holm, p_equivalent, strict=True)
    ]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction, in the order given. A test that could not be made (None) still counts as one."""
    m = len(p_values)
    filled = np.array([1.0 if p is None else p for p in p_values])
    order = np.argsort(filled, kind="stable")
    stepped = np.maximum.accumulate(filled[order] * (m - np.arange(m)))
    adjusted = np.empty(m)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [None if p is None else float(a) for p, a in zip(p_values, adjusted, strict=True)]


def ratio_summary(variant: Sequence[float], baseline: Sequence[float]) -> RatioSummary | None:
    """Ratio variant/baseline of measurements taken in turn: entry i of both belongs to round i.

    The median over rounds ignores the odd disturbed one. Its interval is the distribution-free one between order
    statistics (the sign test inverted): from six rounds on it covers at least 95 %; with fewer it is the whole range.
    None where no round has two positive, finite measurements.
    """
    rounds = min(len(variant), len(baseline))
    a, b = np.asarray(variant[:rounds], dtype=float), np.asarray(baseline[:rounds], dtype=float)
    good = np.isfinite(a) & np.isfinite(b) & (a > 0) & (b > 0)
    ratios = np.sort(a[good] / b[good])
    n = len(ratios)
    if n == 0:
        return None
    if n == 1:
        return RatioSummary(float(ratios[0]), None, None, 1)
    # The largest number of ratios that may lie outside on either side: P(Binomial(n, ½) < cut + 1) ≤ 2.5 %.
    cut = max((c for c in range(1, n // 2) if special.bdtr(c - 1, n, 0.5) <= 0.025), default=1)
    return RatioSummary(float(np.median(ratios)), float(ratios[cut - 1]), float(ratios[n - cut]), n)


# --- power ------------------------------------------------------------------------------------------------------------


def power_of_difference(effect: float, n: int, alpha: float) -> float:
    """Probability that the two-sided paired t-test at level alpha rejects, for a true effect d/s and n ≥ 2 pairs.

    This is the noncentral t's, P(|T| > t) = E_r[Φ(δ − t·r) + Φ(−δ − t·r)] with δ = |d/s|·√n and r = ŝ/s, the estimated
    over the true standard deviation: taken as this integral over r, since the distribution function of the noncentral t
    gives NaN far out in its tails.
    """
    shift, cut = abs(effect) * math.sqrt(n), _t_quantile(1 - alpha / 2, n - 1)
    r, weights = _sd_ratio(n - 1)
    return float(weights @ (special.ndtr(shift - cut * r) + special.ndtr(-shift - cut * r)))


def power_of_equivalence(mean: float, sd: float, n: int, margin: float, alpha: float) -> float:
    """Probability that TOST at level alpha succeeds within ±margin, for a true mean and sd of n ≥ 2 differences.

    It succeeds where the estimated mean lies within ±(margin − t·ŝ/√n): exact, by the same integral over r = ŝ/s.
    """
    e, cut = sd / math.sqrt(n), _t_quantile(1 - alpha, n - 1)
    r, weights = _sd_ratio(n - 1)
    room = np.maximum(margin / e - cut * r, 0.0)
    return float(weights @ (special.ndtr(room - mean / e) - special.ndtr(-room - mean / e)))


@lru_cache(maxsize=1024)
def _sd_ratio(df: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes r = √(χ²/df) and weights, so that weights @ f(r) is the mean of f (Gauss–Legendre in r's probability)."""
    x, weights = special.roots_legendre(256)
    return np.sqrt(2 * special.gammaincinv(df / 2, (x + 1) / 2) / df), weights / 2


@lru_cache(maxsize=1024)
def smallest_effect(n: int, alpha: float = 0.05, power: float = POWER) -> float:
    """The effect d/s (units of the differences' sd) that n ≥ 2 pairs detect with this power."""
    high = 1.0
    while power_of_difference(high, n, alpha) < power:
        high *= 2
    return float(brentq(lambda effect: power_of_difference(effect, n, alpha) - power, 0.0, high, xtol=1e-10))


def seeds_for_verdict(mean: float, sd: float, margin: float, alpha: float, power: float = POWER) -> int | None:
    """The smallest n ≥ 5 at which the t-test or TOST succeeds with this power, if mean and sd are the true ones.

    None where that takes over 1,000 seeds more than the first five.
    """

    def difference(n: int) -> bool:
        return power_of_difference(mean / sd, n, alpha) >= power

    def equivalence(n: int) -> bool:
        return power_of_equivalence(mean, sd, n, margin, alpha) >= power

    ways = [difference, equivalence] if abs(mean) < margin else [difference]
    found = [n for n in map(_first_true, ways) if n is not None]
    return min(found, default=None)


def _first_true(enough: Callable[[int], bool]) -> int | None:
    """The smallest n in [MIN_SEEDS, MIN_SEEDS + MAX_SEEDS_NEEDED] that is enough, power being monotone in n."""
    low, high = MIN_SEEDS, MIN_SEEDS + MAX_SEEDS_NEEDED
    if not enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


# --- one variant ------------------------------------------------------------------------------------------------------


def _paired(base: np.ndarray, row: np.ndarray, margin_nats: float, mean_base: float | None) -> Comparison:
    """Everything about one variant that does not depend on the others."""
    keep = np.isfinite(base) & np.isfinite(row)
    d, n = (row - base)[keep], int(keep.sum())
    if n == 0:
        return Comparison(0, None, None, None, None, None, None, None, None, None, "undecided")
    scale = _scale(base[keep])
    mean = float(d.mean())
    relative = mean / abs(mean_base) if mean_base else None
    if n == 1:
        return Comparison(1, mean, None, None, relative, None, None, None, None, None, "undecided")
    sd = _sd(d, scale)
    if sd == 0:
        zero = abs(mean) <= ROUNDING * scale
        inside = zero or abs(mean) < margin_nats
        p, p_equivalent = float(zero), float(not inside)
        half, effect = 0.0, 0.0 if zero else None
    else:
        df, e = n - 1, sd / math.sqrt(n)
        p = float(2 * special.stdtr(df, -abs(mean) / e))
        p_equivalent = float(special.stdtr(df, (abs(mean) - margin_nats) / e))
        half, effect = _t_quantile(0.975, df) * e, _hedges(mean / sd, df)
    return Comparison(
        n, mean, sd, (mean - half, mean + half), relative, p, None, p_equivalent, effect, None, "undecided"
    )


def _decide(c: Comparison, margin_nats: float, alpha: float, strict: float, power: float) -> Comparison:
    """The verdict, by the rule at the head of this file; `strict` is the level of Holm's strictest step."""
    n, mean, sd, p_holm, p_equivalent = c.n, c.mean, c.sd, c.p_holm, c.p_equivalent
    if mean is None or sd is None or p_holm is None or p_equivalent is None:
        return replace(c, seeds_needed=MIN_SEEDS - n)
    c = replace(c, min_detectable=sd * smallest_effect(n, strict, power))
    identical = sd == 0 and c.p == 1
    if n >= MIN_SEEDS or identical:
        if p_equivalent < alpha:
            return replace(c, verdict="equivalent")
        if p_holm < alpha:
            return replace(c, verdict="better" if mean < 0 else "worse")
    total = MIN_SEEDS if sd == 0 else seeds_for_verdict(mean, sd, margin_nats, strict, power)
    if total is None or total - n > MAX_SEEDS_NEEDED:
        return replace(c, seeds_needed=MAX_SEEDS_NEEDED, seeds_capped=True)
    return replace(c, seeds_needed=max(1, total - n))


def _hedges(effect: float, df: int) -> float | None:
    """Hedges' unbiased form: d·J, J = Γ(df/2) / (√(df/2)·Γ((df−1)/2)); undefined for df = 1."""
    if df < 2:
        return None
    log_j = special.gammaln(df / 2) - special.gammaln((df - 1) / 2) - 0.5 * math.log(df / 2)
    return float(effect * math.exp(log_j))


def _t_quantile(q: float, df: int) -> float:
    return float(special.stdtrit(df, q))


def _scale(x: np.ndarray) -> float:
    return float(np.abs(x).max())


def _sd(x: np.ndarray, scale: float) -> float:
    """Standard deviation (n − 1), exactly 0 where it is mere rounding of numbers as large as `scale`."""
    sd = float(x.std(ddof=1))
    return sd if sd > ROUNDING * scale else 0.0


def _as_floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if v is None else v for v in values], dtype=float)


def _finite(values: Sequence[float | None]) -> np.ndarray:
    x = _as_floats(values)
    return x[np.isfinite(x)]
