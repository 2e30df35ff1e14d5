"""An A/B in words: what an arm's likeness is worth, what one changed setting did. No arithmetic beyond units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headwise.lab.ab.result import CKAS, COSINES, ABResult, Alignment, ArmResult, Contrast, Reach
from headwise.lab.claims import findings
from headwise.lab.render import (
    NONE,
    p_value,
    percent,
    sentence,
    signed,
)


def headline(result: ABResult) -> str:
    """The outcome in a line."""
    base, rivals = result.variants[0].label, result.variants[1:]
    if len(rivals) != 1 or rivals[0].diff is None:
        return f"{len(rivals)} ways to distil against {base}"
    outcome = rivals[0].diff.verdict
    if outcome == "undecided":
        return f"{rivals[0].label} against {base}: undecided"
    return f"{rivals[0].label} is {outcome} {'to' if outcome == 'equivalent' else 'than'} {base}"


def likeness(arm: ArmResult) -> str:
    """What an arm's cosine is worth, in words: the control against shuffled teachers decides."""
    cosines = [arm.alignment[name] for name in COSINES if name in arm.alignment]
    own, shuffled = _mean(each.mean for each in cosines), _mean(each.shuffled for each in cosines)
    if own is None or shuffled is None:
        return "has no projected teacher to be compared with."
    fixed = "through a fixed map, for nothing is learned from it, " * (arm.settings.get("projection") == "none")
    text = (
        f"reaches {fixed}a cosine of {number(own)} with its own teacher and {number(shuffled)} with shuffled ones, "
        f"a gap of {signed(own - shuffled, 3)}.{_rise(cosines)}"
    )
    if arm.collapse == "collapsed":
        text += (
            " This cosine shows no alignment: with the teacher’s reading of another text it is nearly as high. The "
            "projected teacher hardly depends on its text, as when a trained projector on its side ignores its input "
            "(collapse), or most of it is a mean that all texts share."
        )
    elif arm.collapse == "mostly":
        text += " Most of this cosine is there with teachers of other texts too; only the gap is owed to the text."
    elif arm.collapse == "no":
        text += " Most of this cosine is owed to the text."
    else:
        text += " Neither is any likeness to speak of."
    cka = [arm.alignment[name] for name in CKAS if name in arm.alignment]
    own, shuffled = _mean(each.mean for each in cka), _mean(each.shuffled for each in cka)
    if own is not None and shuffled is not None:
        text += f" CKA, which no projector touches, is {number(own)} ({number(shuffled)} shuffled)."
    return text


def _rise(cosines: Sequence[Alignment]) -> str:
    """How both went while training went on."""
    ends = []
    for name in ("course", "shuffled_course"):
        courses = [getattr(each, name).loss for each in cosines]
        if any(len(course) < 2 for course in courses):
            return ""
        ends.append((_mean(course[0] for course in courses), _mean(course[-1] for course in courses)))
    (a, b), (c, d) = ends
    if a is None or b is None or c is None or d is None:
        return ""
    return (
        f" From the first evaluation to the last the one {_went(a, b)} from {number(a)} to {number(b)}, "
        f"the other {_went(c, d)} from {number(c)} to {number(d)}."
    )


def _went(before: float, after: float) -> str:
    return "rose" if after > before else "fell" if after < before else "stayed"


def reach(steps: Reach, total: int | None) -> str:
    """`2,140 of 3,000 steps`, with how many seeds got there."""
    if not steps.n_pairs:
        return NONE
    if steps.mean is None:
        return "never"
    share = "" if steps.n_reached == steps.n_pairs else f" ({steps.n_reached} of {steps.n_pairs} seeds)"
    return f"{steps.mean:,.0f}{'' if total is None else f' of {total:,}'}{share}"


def contrast(each: Contrast) -> str:
    """One thing changed, and what it did."""
    diff = each.diff
    spread = "" if diff.ci95 is None else f" [{signed(diff.ci95[0])}, {signed(diff.ci95[1])}]"
    gap = ""
    if each.gap is not None and each.gap.mean is not None:
        gap = f"; cosine beyond shuffled {signed(each.gap.mean, 3)}"
        gap += "" if each.gap.ci95 is None else f" [{signed(each.gap.ci95[0], 3)}, {signed(each.gap.ci95[1], 3)}]"
    return (
        f"{each.arm} against {each.against}: validation loss {signed(diff.mean)}{spread} nats "
        f"({percent(diff.relative)}), p {p_value(diff.p_holm)}, {diff.verdict}; "
        f"mean training loss {signed(each.train_diff.mean)}{gap}"
    )


def own_and_shuffled(alignment: Alignment | None) -> str:
    """`0.912 (0.401)`"""
    if alignment is None or alignment.mean is None:
        return NONE
    other = "" if alignment.shuffled is None else f" ({number(alignment.shuffled)})"
    return f"{number(alignment.mean)}{other}"


def number(value: float) -> str:
    """Three digits, with a real minus sign; zero has none."""
    return signed(value, 3).removeprefix("+")


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def sentences(result: ABResult) -> list[str]:
    """What the terminal says at the end: a verdict an arm, what the likeness is worth, and the claims."""
    lines = [*result.notes, *(sentence(result, variant) for variant in result.variants[1:])]
    lines += [f"{arm.arm} {likeness(arm)}" for arm in result.arms if arm.alignment]
    return lines + [f"{found.claim} is {found.words}" for found in findings(result)]
