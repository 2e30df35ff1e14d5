"""Making architectures comparable: the width of the feed-forward that gives a variant the baseline's size or cost.

Parameters and FLOPs a token (closed form, nothing is built) both grow with the feed-forward's hidden width d_ff, so the
width that comes nearest the baseline is found by bisection. In a pattern all widths keep their proportions. Multiples
of 8 suit the hardware and are taken where one comes within the tolerance; else finer ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from headwise.errors import SpecError
from headwise.ffn import FFNSpec
from headwise.registry import ComponentSpec
from headwise.spec import ModelSpec, count

TOLERANCE = 0.01
GRANULARITIES = (8, 4, 2, 1)
WIDEST = 2**24
NAMES = {"params": "parameters", "flops": "FLOPs a token"}


@dataclass(frozen=True)
class Match:
    """A variant after matching.

    Attributes:
        spec: the variant, its feed-forward's width adjusted where that was needed and possible.
        note: what was done, or why it could not be, as a sentence; "" where nothing was needed.
        off: (variant − baseline) / baseline of the matched quantity; None where none is matched.
        reached: whether it lies within 1 % of the baseline.
    """

    spec: ModelSpec
    note: str = ""
    off: float | None = None
    reached: bool = True


def match(spec: ModelSpec, baseline: ModelSpec, how: str, context: int) -> Match:
    """`spec` with the baseline's parameters (`how="params"`) or forward FLOPs a token (`"flops"`), within 1 %.

    Args:
        spec, baseline: resolved architectures.
        how: a value of the setting `match`; those that do not touch the width give `spec` back.
        context: tokens in the context that FLOPs are counted at.
    """
    if how not in NAMES:
        return Match(spec)

    def off(candidate: ModelSpec) -> float:
        return _quantity(candidate, how, context) / _quantity(baseline, how, context) - 1

    before = off(spec)
    if abs(before) <= TOLERANCE:
        return Match(spec, off=before)
    widths = _widths(spec)
    if not widths:
        note = f"not matched: {spec.ffn.kind} has no width to adjust; {_signed(before)} {NAMES[how]}"
        return Match(spec, note, before, reached=False)

    best = spec
    for step in GRANULARITIES:
        best = min([best, *_nearest(spec, widths, step, off)], key=lambda candidate: abs(off(candidate)))
        if abs(off(best)) <= TOLERANCE:
            break
    after = off(best)
    if after > TOLERANCE and min(_widths(best)) == 1:
        note = f"not matched: {_signed(before)} {NAMES[how]}, and {_signed(after)} even with ffn.d_ff=1"
        return Match(spec, note, before, reached=False)
    if best is spec:
        note = f"not matched: {_signed(before)} {NAMES[how]}, and no other width of the feed-forward comes nearer"
        return Match(spec, note, before, reached=False)
    note = f"ffn.d_ff {_shown(widths)} → {_shown(_widths(best))}"
    if abs(after) > TOLERANCE:
        note += f", and still {_signed(after)} {NAMES[how]}: no width comes nearer ({_signed(before)} before)"
        return Match(best, note, after, reached=False)
    return Match(best, f"{note} for equal {NAMES[how]} ({_signed(after)}; {_signed(before)} before)", after)


def _quantity(spec: ModelSpec, how: str, context: int) -> float:
    counts = count(spec, context)
    return counts.params if how == "params" else counts.flops_per_token


def _widths(spec: ModelSpec) -> list[int]:
    return [item.width(spec.dims) for item in spec.ffn.each() if isinstance(item, FFNSpec)]


def _with_widths(spec: ModelSpec, widths: list[int]) -> ModelSpec:
    """The spec with these widths in those items of its feed-forward that have one."""
    rest = iter(widths)

    def widened(item: ComponentSpec) -> ComponentSpec:
        return item.model_copy(update={"d_ff": next(rest)}) if isinstance(item, FFNSpec) else item

    return spec.replace(ffn=spec.ffn.with_each(widened))


def _nearest(spec: ModelSpec, widths: list[int], step: int, off: Callable[[ModelSpec], float]) -> list[ModelSpec]:
    """The two specs on either side of the baseline, widths being multiples of `step` in the proportions of `widths`.

    A width that a component refuses (it may have rules of its own) is no candidate.
    """
    widest = max(widths)

    def at(n: int) -> ModelSpec | None:
        try:
            return _with_widths(spec, [step * max(1, round(n * width / widest)) for width in widths])
        except SpecError:
            return None

    low, high = 1, 2
    while high < WIDEST and (candidate := at(high)) is not None and off(candidate) < 0:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        candidate = at(middle)
        low, high = (low, middle) if candidate is None or off(candidate) >= 0 else (middle, high)
    return [candidate for n in (low, high) if (candidate := at(n)) is not None]


def _shown(widths: list[int]) -> str:
    return str(widths[0]) if len(set(widths)) == 1 else "/".join(map(str, widths))


def _signed(off: float) -> str:
    return f"{100 * off:+.2f} %".replace("-", "−")
