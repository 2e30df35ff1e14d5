"""What a benchmark hands back: `result.json` as pydantic models, and the crossover lengths drawn from it.

Times are seconds, sizes bytes. A ratio is a time divided by that of torch's own attention in the same round: below 1 is
faster. What was not measured is None (null), never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

from headwise.lab.result import Environment, Ratio

SCHEMA_VERSION = 1


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Point(_Model):
    """One kind at one length. `seconds` has one entry a round; `skipped` says why there are none."""

    length: int
    seconds: list[FiniteFloat] = []
    ratio: Ratio | None = None
    kept_bytes: int | None = None
    peak_bytes: FiniteFloat | None = None
    skipped: str | None = None

    @property
    def median(self) -> float | None:
        return median(self.seconds) if self.seconds else None


class Crossover(_Model):
    """From which length on a kind is faster than torch's own attention.

    `outcome`: "always" (at every length measured), "from" (from `length` on, between two lengths that were measured),
    "never" (not at the longest), "unknown" (nothing was measured). `low` and `high` are where the ends of the ratio's
    interval cross 1; None where they do not cross within the measured lengths. `sure`: at the longest length the whole
    interval lies on the same side of 1 as the median.
    """

    outcome: Literal["always", "from", "never", "unknown"]
    length: FiniteFloat | None = None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    sure: bool = True


class Row(_Model):
    """One kind (or a peer, or torch's own) at all lengths."""

    label: str
    source: Literal["torch", "headwise", "peer"]
    points: list[Point]
    crossover: Crossover | None = None

    def at(self, length: int) -> Point | None:
        """The point at a length, None where there is none."""
        return next((p for p in self.points if p.length == length), None)


class BenchResult(_Model):
    """A finished benchmark. The first row is the baseline, torch's own attention."""

    schema_version: int = SCHEMA_VERSION
    subject: str = "attention"
    settings: dict[str, Any]
    environment: Environment
    command: str
    lengths: list[int]
    rows: list[Row]
    finished_at: str | None = None
    wall_seconds: float | None = None

    def row(self, label: str) -> Row:
        """The row of a label. KeyError: there is none."""
        found = {row.label: row for row in self.rows}
        return found[label]

    def save(self, folder: Path) -> Path:
        """Write `result.json` into a folder, whole or not at all."""
        from headwise.io.atomic import write_json

        path = folder / "result.json"
        write_json(path, self.model_dump(mode="json"))
        return path


def crossover(points: Sequence[Point]) -> Crossover:
    """Where the ratio falls below 1 for good, by a straight line between neighbours in log(length) and log(ratio)."""
    measured = [(p.length, p.ratio) for p in points if p.ratio is not None]
    if not measured:
        return Crossover(outcome="unknown")
    lengths = [length for length, _ in measured]
    ratios = [ratio for _, ratio in measured]
    middle = crossing(lengths, [r.ratio for r in ratios])
    last = ratios[-1]
    if middle is None:
        return Crossover(outcome="never", sure=last.lo is None or last.lo >= 1)
    sure = last.hi is None or last.hi < 1
    if middle <= lengths[0]:
        return Crossover(outcome="always", length=lengths[0], sure=sure)
    lows = [r.ratio if r.lo is None else r.lo for r in ratios]
    highs = [r.ratio if r.hi is None else r.hi for r in ratios]
    low, high = (x if x and x > lengths[0] else None for x in (crossing(lengths, lows), crossing(lengths, highs)))
    return Crossover(outcome="from", length=middle, low=low, high=high, sure=sure)


def crossing(lengths: Sequence[int], ratios: Sequence[float]) -> float | None:
    """The length from which the ratios stay below 1; the first length where all do, None where the last does not."""
    if ratios[-1] >= 1:
        return None
    last = max((i for i, ratio in enumerate(ratios) if ratio >= 1), default=None)
    if last is None:
        return float(lengths[0])
    (x0, y0), (x1, y1) = ((math.log(lengths[i]), math.log(ratios[i])) for i in (last, last + 1))
    return math.exp(x0 + (x1 - x0) * y0 / (y0 - y1))


def crossover_words(row: Row) -> str:
    """The crossover in words: `from ≈ 1,430 (1,280 to 1,600)`."""
    found, measured = row.crossover, [p.length for p in row.points if p.ratio is not None]
    if found is None:
        return "baseline"
    if found.outcome == "unknown":
        return "not measured"
    if found.outcome == "from" and found.length is not None:
        spread = f" ({_rounded(found.low)} to {_rounded(found.high)})" if found.low and found.high else ""
        words = f"from ≈ {_rounded(found.length)}{spread}"
    else:
        words = f"not up to {measured[-1]:,}" if found.outcome == "never" else f"at every length from {measured[0]:,}"
    return words if found.sure else f"{words}, unsure"


def _rounded(length: float) -> str:
    """Three digits of a length that was estimated."""
    digits = max(0, int(math.log10(length)) - 2)
    return f"{round(length, -digits):,.0f}"
