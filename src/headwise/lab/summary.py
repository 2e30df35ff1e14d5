"""From raw run records to a `CompareResult`: a pure function, no file and no clock."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from headwise.errors import SettingsError
from headwise.lab import stats
from headwise.lab.result import (
    CompareResult,
    Curve,
    Diff,
    FailedRun,
    Loss,
    Measurements,
    Ratio,
    Ratios,
    RunRecord,
    Series,
    Setup,
    VariantInfo,
    VariantResult,
)

MAX_CURVE_POINTS = 200
MAX_LABEL = 40


def summarise(
    variants: Sequence[VariantInfo],
    runs: Sequence[RunRecord],
    setup: Setup,
    measurements: Sequence[Measurements] = (),
) -> CompareResult:
    """Judge every variant against the first one.

    `runs` may come in any order; a (variant, seed) without a record counts as failed. `measurements` is empty (nothing
    was measured) or has one entry a variant. SettingsError: a record of no variant or seed, or twice.
    """
    if not variants:
        raise SettingsError("nothing to compare: give a baseline and at least one variant")
    if measurements and len(measurements) != len(variants):
        raise SettingsError(f"{len(measurements)} measurements for {len(variants)} variants; give one each, or none")
    table = _by_variant_and_seed(runs, len(variants), setup.seeds)
    labels = make_labels([v.line for v in variants])

    losses = [[_loss(table.get((v, s))) for s in setup.seeds] for v in range(len(variants))]
    comparisons = stats.assess(losses[0], losses[1:], margin=setup.margin, alpha=setup.alpha)
    baseline_mean = stats.mean_ci(losses[0]).mean
    rounds = list(measurements) or [Measurements() for _ in variants]

    results, failed = [], []
    for v, info in enumerate(variants):
        records = [table.get((v, s)) for s in setup.seeds]
        good = [r for r in records if r is not None and _loss(r) is not None]
        for seed, record in zip(setup.seeds, records, strict=True):
            if _loss(record) is None:
                error = "no record of this run" if record is None else record.error or "the loss is not finite"
                failed.append(FailedRun(line=info.line, label=labels[v], seed=seed, error=error))
        results.append(
            VariantResult(
                **dict(info),
                label=labels[v],
                val_loss=loss_of(losses[v]),
                bits_per_byte=loss_of(
                    [r.bits_per_byte if r is not None and _loss(r) is not None else None for r in records]
                ),
                diff=diff_of(comparisons[v - 1]) if v else None,
                train_tokens_per_s=_median(rounds[v].train_tokens_per_s),
                decode_tokens_per_s=_median(rounds[v].decode_tokens_per_s),
                peak_memory_bytes=_median(rounds[v].peak_memory_bytes),
                ratios=_ratios(rounds[v], rounds[0]),
                seconds=[_finite(r.seconds) if r is not None else None for r in records],
                curves=[
                    Curve(
                        seed=r.seed,
                        train=thin(r.train_curve),
                        val=thin(r.val_curve),
                        eps={name: thin(series) for name, series in r.eps.items()},
                    )
                    for r in good
                ],
            )
        )
    return CompareResult(
        **dict(setup),
        baseline=variants[0].line,
        margin_nats=None if baseline_mean is None else setup.margin * abs(baseline_mean),
        variants=results,
        failed_runs=failed,
    )


def make_labels(lines: Sequence[str]) -> list[str]:
    """Short names for plots and tables: the line itself, shortened if long, numbered where two would read the same."""
    labels: list[str] = []
    for line in lines:
        short = line if len(line) <= MAX_LABEL else line[: MAX_LABEL - 1].rstrip() + "…"
        label, number = short, 2
        while label in labels:
            label, number = f"{short} #{number}", number + 1
        labels.append(label)
    return labels


def thin(series: Series, limit: int = MAX_CURVE_POINTS) -> Series:
    """At most `limit` points: means over equal stretches, placed at their last steps, so no single spike is picked."""
    steps, losses = np.asarray(series.step), np.asarray(series.loss, dtype=float)
    keep = np.isfinite(losses)
    steps, losses = steps[keep], losses[keep]
    if len(steps) <= limit:
        return Series(step=steps.tolist(), loss=losses.tolist())
    groups = np.array_split(np.arange(len(steps)), limit)
    return Series(step=[int(steps[g[-1]]) for g in groups], loss=[float(losses[g].mean()) for g in groups])


def _by_variant_and_seed(
    runs: Sequence[RunRecord], n_variants: int, seeds: Sequence[int]
) -> dict[tuple[int, int], RunRecord]:
    table: dict[tuple[int, int], RunRecord] = {}
    for run in runs:
        key = (run.variant, run.seed)
        if not 0 <= run.variant < n_variants or run.seed not in seeds:
            raise SettingsError(
                f"a record of variant {run.variant}, seed {run.seed} belongs to no run of this comparison"
            )
        if key in table:
            raise SettingsError(f"two records of variant {run.variant}, seed {run.seed}; one run must count once")
        table[key] = run
    return table


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _loss(record: RunRecord | None) -> float | None:
    return None if record is None or record.error is not None else _finite(record.val_loss)


def loss_of(values: Sequence[float | None]) -> Loss:
    clean = [_finite(v) for v in values]
    mean = stats.mean_ci(clean)
    return Loss(mean=mean.mean, ci95=mean.ci95, per_seed=clean)


def _median(values: Sequence[float]) -> float | None:
    clean = [v for v in values if math.isfinite(v)]
    return float(np.median(clean)) if clean else None


def _ratios(variant: Measurements, baseline: Measurements) -> Ratios:
    def one(name: str) -> Ratio | None:
        summary = stats.ratio_summary(getattr(variant, name), getattr(baseline, name))
        return None if summary is None else Ratio(ratio=summary.ratio, lo=summary.lo, hi=summary.hi)

    return Ratios(train=one("train_tokens_per_s"), decode=one("decode_tokens_per_s"), memory=one("peak_memory_bytes"))


def diff_of(c: stats.Comparison) -> Diff:
    return Diff(
        n=c.n,
        mean=c.mean,
        ci95=c.ci95,
        relative=c.relative,
        p=c.p,
        p_holm=c.p_holm,
        p_equivalent=c.p_equivalent,
        effect_size=c.effect_size,
        min_detectable=c.min_detectable,
        verdict=c.verdict,
        seeds_needed=c.seeds_needed,
        seeds_capped=c.seeds_capped,
    )
