"""From the records of the arms' runs to an `ABResult`: a pure function, no file and no clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from headwise.lab import stats
from headwise.lab.ab.arms import PROJECTIONS, Arm
from headwise.lab.ab.result import (
    COSINES,
    MEASURES,
    SHUFFLED,
    ABResult,
    Alignment,
    ArmResult,
    Collapse,
    Contrast,
    DistillRecord,
    Reach,
)
from headwise.lab.result import Loss, Series, Setup, VariantInfo
from headwise.lab.summary import diff_of, loss_of, summarise

Numbers = Sequence[float | None]

# A likeness of which the shuffled teachers reach such a share is not the text's.
COLLAPSED, MOSTLY = 0.9, 0.5
LITTLE = 0.1  # a cosine below it is no likeness whose worth could be asked for


def summarise_ab(
    arms: Sequence[Arm],
    variants: Sequence[VariantInfo],
    runs: Sequence[DistillRecord],
    setup: Setup,
    *,
    teacher: Sequence[str],
    student: str,
    commands: Sequence[str],
    conditions: str = "",
    notes: Sequence[str] = (),
) -> ABResult:
    """Judge every arm against the first, and every arm against those that differ from it in one setting.

    `variants` and `commands` have one entry an arm; `runs` may come in any order. A seed counts where its loss is
    finite, as in `lab.summary.summarise`, whose errors this raises.
    """
    base = summarise(variants, runs, setup)
    table = {(run.variant, run.seed): run for run in runs}
    rows = [
        [
            record if (record := table.get((v, seed))) is not None and loss is not None else None
            for seed, loss in zip(setup.seeds, base.variants[v].val_loss.per_seed, strict=True)
        ]
        for v in range(len(arms))
    ]
    results = [
        _arm(arm, row, rows[0], command, base.variants[v].label)
        for v, (arm, row, command) in enumerate(zip(arms, rows, commands, strict=True))
    ]
    return ABResult(
        **dict(base),
        teacher=list(teacher),
        student=student,
        arms=results,
        contrasts=_contrasts(arms, [v.val_loss for v in base.variants], results, setup),
        conditions=conditions,
        notes=list(notes),
    )


def _arm(
    arm: Arm, row: Sequence[DistillRecord | None], baseline: Sequence[DistillRecord | None], command: str, label: str
) -> ArmResult:
    good = [record for record in row if record is not None]
    parts = dict.fromkeys(part for record in good for part in record.val_loss_by_part)
    measured = [name for name in MEASURES if any(_layers(record, name) for record in good)]
    alignment = {name: _alignment(row, name) for name in measured}
    speeds = [record.tokens_per_s for record in good if record.tokens_per_s]
    return ArmResult(
        arm=label,
        settings=arm.changes,
        command=command,
        aligner_params=good[0].aligner_params if good else 0,
        tokens_per_s=float(np.median(speeds)) if speeds else None,
        val_loss_by_part={part: loss_of([_part(r, part) for r in row]) for part in parts},
        train_loss=loss_of([None if record is None else mean_height(record.train_curve) for record in row]),
        steps_to_baseline=_reach(row, baseline),
        alignment=alignment,
        collapse=_collapse([alignment[name] for name in COSINES if name in alignment]),
    )


def _part(record: DistillRecord | None, part: str) -> float | None:
    return None if record is None else record.val_loss_by_part.get(part)


def mean_height(curve: Series) -> float | None:
    """The mean loss over the whole training, None without a record: at equal ends, a lower one fell faster."""
    losses = [loss for loss in curve.loss if math.isfinite(loss)]
    return sum(losses) / len(losses) if losses else None


# --- steps to the baseline's loss -------------------------------------------------------------------------------------


def _reach(row: Sequence[DistillRecord | None], baseline: Sequence[DistillRecord | None]) -> Reach:
    pairs = [(one, base) for one, base in zip(row, baseline, strict=True)]
    steps = [
        None if one is None or base is None or base.val_loss is None else first_at(one.val_curve, base.val_loss)
        for one, base in pairs
    ]
    reached = [step for step in steps if step is not None]
    return Reach(
        per_seed=steps,
        n_reached=len(reached),
        n_pairs=sum(one is not None and base is not None for one, base in pairs),
        mean=sum(reached) / len(reached) if reached else None,
    )


def first_at(curve: Series, goal: float) -> float | None:
    """The step at which a curve is first down at `goal`, on a straight line between its points; None: never."""
    before: tuple[int, float] | None = None
    for step, loss in zip(curve.step, curve.loss, strict=True):
        if loss <= goal:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - goal) / (before[1] - loss)
        before = (step, loss)
    return None


# --- likeness ---------------------------------------------------------------------------------------------------------


def _layers(record: DistillRecord | None, name: str) -> list[float | None]:
    likeness = None if record is None else record.likeness.get(name)
    return [] if likeness is None else likeness.layers


def _alignment(row: Sequence[DistillRecord | None], name: str) -> Alignment:
    def of(name: str) -> tuple[list[float | None], list[float | None], Series]:
        tables = [_layers(record, name) for record in row]
        depth = max(map(len, tables), default=0)
        layers = [_mean([table[i] for table in tables if i < len(table)]) for i in range(depth)]
        courses = [r.likeness[name].course for r in row if r is not None and name in r.likeness]
        return layers, [_mean(table) for table in tables], _mean_series(courses)

    (layers, per_seed, course), (other_layers, other_seeds, other_course) = of(name), of(name + SHUFFLED)
    return Alignment(
        layers=layers,
        shuffled_layers=other_layers,
        per_seed=per_seed,
        shuffled_per_seed=other_seeds,
        course=course,
        shuffled_course=other_course,
    )


def _mean_series(courses: Sequence[Series]) -> Series:
    tables = [dict(zip(course.step, course.loss, strict=True)) for course in courses]
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    return Series(step=steps, loss=[sum(table[step] for table in tables) / len(tables) for step in steps])


def _collapse(cosines: Sequence[Alignment]) -> Collapse | None:
    own, shuffled = _mean([each.mean for each in cosines]), _mean([each.shuffled for each in cosines])
    if own is None or shuffled is None:
        return None
    if own < LITTLE:
        return "unlike"
    if shuffled < MOSTLY * own:
        return "no"
    return "collapsed" if shuffled >= COLLAPSED * own else "mostly"


def _mean(values: Numbers) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


# --- one thing at a time ----------------------------------------------------------------------------------------------


def _contrasts(
    arms: Sequence[Arm], losses: Sequence[Loss], results: Sequence[ArmResult], setup: Setup
) -> list[Contrast]:
    """Pairs of arms that differ in a single setting: the one that does more, or says more, against the other."""
    order = sorted(range(len(arms)), key=lambda i: (PROJECTIONS.index(arms[i].projection), len(arms[i].changes), i))
    pairs = [(a, b) for a, b in combinations(order, 2) if _question(arms[a], arms[b])]

    def judged(rows: Sequence[Loss]) -> list[stats.Comparison]:
        return stats.assess_pairs(
            [(rows[a].per_seed, rows[b].per_seed) for a, b in pairs], margin=setup.margin, alpha=setup.alpha
        )

    found = zip(pairs, judged(losses), judged([each.train_loss for each in results]), strict=True)
    return [
        Contrast(
            question=_question(arms[a], arms[b]),
            arm=results[b].arm,
            against=results[a].arm,
            diff=diff_of(diff),
            train_diff=diff_of(train),
            gap=_gap_difference(results[b], results[a]),
        )
        for (a, b), diff, train in found
    ]


def _question(against: Arm, arm: Arm) -> str:
    """The one setting in which two arms differ, in words; empty where there are several."""
    one, other = against.settings, arm.settings
    if "none" in (against.projection, arm.projection):  # which has no projector to have settings of
        one, other = against.changes, arm.changes
    names = [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
    if len(names) != 1:
        return ""
    (name,) = names
    return f"{name}: {_shown(other.get(name))} instead of {_shown(one.get(name))}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "the default" if value is None else str(value)


def gaps(arm: ArmResult) -> list[float | None]:
    """Own minus shuffled cosine of each seed, the mean over what is compared; empty where none was measured."""
    tables = [arm.alignment[name].gaps for name in COSINES if name in arm.alignment]
    return [_mean(values) for values in zip(*tables, strict=True)]


def _gap_difference(arm: ArmResult, against: ArmResult) -> Loss | None:
    one, other = gaps(arm), gaps(against)
    if not one or not other:
        return None
    return loss_of([None if a is None or b is None else a - b for a, b in zip(one, other, strict=True)])
