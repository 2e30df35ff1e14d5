"""What document 004 claims of structured KV alignment, as statements that an A/B confirms or refutes.

A claim names its size. Paired by seed, the difference has a 95 % interval; **confirmed** where the whole interval is at
or beyond the size claimed, **refuted** where the whole interval falls short of it, **inconclusive** otherwise and below
five seeds. So a real improvement that is smaller than claimed refutes the claim, and the words say both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from headwise.errors import SettingsError
from headwise.lab.ab.arms import DEFAULTS
from headwise.lab.ab.result import ABResult
from headwise.lab.ab.summary import gaps
from headwise.lab.render import percent, signed
from headwise.lab.stats import MIN_SEEDS, mean_ci

Outcome = Literal["confirmed", "refuted", "inconclusive"]
Numbers = Sequence[float | None]

FLAT = {"projection": "flat"}
STRUCTURED = {"projection": "structured"}
RANDOM = {"projection": "structured", "init_uniform": False}
SEPARATE = {"projection": "structured", "share_dim_proj": False}


@dataclass(frozen=True)
class Measured:
    """One figure: its mean over seeds, the interval, and what they say of the size claimed."""

    what: str
    outcome: Outcome
    n: int
    mean: float | None
    ci95: tuple[float, float] | None
    words: str


@dataclass(frozen=True)
class Claim:
    """A statement of a document, what would settle it, and how it is tried.

    `judge` takes an A/B that has the arms `needs` and gives the figures that the verdict rests on: all must be
    confirmed for the claim to be, and one refuted refutes it.
    """

    id: str
    document: str
    statement: str
    confirmed_if: str
    refuted_if: str
    needs: tuple[dict[str, Any], ...]
    judge: Callable[[ABResult], list[Measured]]
    kind: str = "trained"
    run: str = "python benchmarks/bench_distill_shakespeare.py"


@dataclass(frozen=True)
class Finding:
    """What an A/B says of a claim."""

    claim: str
    statement: str
    outcome: Outcome
    measured: list[Measured]

    @property
    def words(self) -> str:
        """The verdict in a sentence."""
        return f"{self.outcome}: " + "; ".join(each.words for each in self.measured)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "words": self.words}


def judge(claim_id: str, result: ABResult) -> Finding:
    """What `result` says of a claim.

    Raises:
        SettingsError: no such claim, or the A/B lacks one of the arms that it needs.
    """
    if claim_id not in CLAIMS:
        raise SettingsError(f"claim: given {claim_id!r}, there are {', '.join(CLAIMS)}")
    claim = CLAIMS[claim_id]
    for settings in claim.needs:
        _index(result, settings)
    measured = claim.judge(result)
    outcomes = {each.outcome for each in measured}
    outcome: Outcome = "inconclusive"
    if "refuted" in outcomes:
        outcome = "refuted"
    elif outcomes == {"confirmed"}:
        outcome = "confirmed"
    return Finding(claim.id, claim.statement, outcome, measured)


def findings(result: ABResult) -> list[Finding]:
    """What `result` says of every claim whose arms it has."""
    return [judge(name, result) for name, claim in CLAIMS.items() if all(_has(result, arm) for arm in claim.needs)]


# --- figures ----------------------------------------------------------------------------------------------------------


def _loss_figure(result: ABResult, arm: dict[str, Any], against: dict[str, Any], size: float) -> Measured:
    """Whether `arm` ends at a validation loss that is lower by `size`, a share of the other's mean."""
    one, other = (result.variants[_index(result, settings)] for settings in (arm, against))
    base = abs(other.val_loss.mean or 1.0)
    values = [x and x / base for x in _differences(one.val_loss.per_seed, other.val_loss.per_seed)]
    return _measured(f"validation loss, {one.label} against {other.label}", values, -size, percent)


def _training_figure(result: ABResult, arm: dict[str, Any], against: dict[str, Any]) -> Measured:
    one, other = (result.arms[_index(result, settings)] for settings in (arm, against))
    base = abs(other.train_loss.mean or 1.0)
    values = [x and x / base for x in _differences(one.train_loss.per_seed, other.train_loss.per_seed)]
    return _measured(f"mean training loss, {one.arm} against {other.arm}", values, 0.0, percent)


def _cosine_figure(result: ABResult, arm: dict[str, Any], against: dict[str, Any]) -> Measured:
    """Whether the cosine's gap to shuffled teachers is larger; its sign is turned, so that less is better here too."""
    one, other = (result.arms[_index(result, settings)] for settings in (arm, against))
    values = [x and -x for x in _differences(gaps(one), gaps(other))]
    made = _measured(f"cosine beyond that of shuffled teachers, {one.arm} against {other.arm}", values, 0.0, signed)
    mean = None if made.mean is None else -made.mean
    ends = None if made.ci95 is None else (-made.ci95[1], -made.ci95[0])
    words = _words(made.what, mean, ends, made.n, signed)
    return Measured(made.what, made.outcome, made.n, mean, ends, words)


def _differences(one: Numbers, other: Numbers) -> list[float | None]:
    return [None if a is None or b is None else a - b for a, b in zip(one, other, strict=False)]


def _measured(what: str, values: Numbers, limit: float, show: Callable[[float | None], str]) -> Measured:
    """Differences, of which less is better, against the size claimed: at most `limit`."""
    mean = mean_ci(values)
    outcome: Outcome = "inconclusive"
    if mean.n >= MIN_SEEDS and mean.ci95 is not None:
        low, high = mean.ci95
        # A claim of a mere direction is not met by no difference at all.
        if high < limit or (limit and high == limit):
            outcome = "confirmed"
        elif low > limit or low == limit == 0:
            outcome = "refuted"
    words = _words(what, mean.mean, mean.ci95, mean.n, show)
    if limit:
        words += f", claimed {show(limit)}"
        if outcome == "refuted" and mean.ci95 is not None and mean.ci95[1] < 0:
            words += ": lower indeed, but by less"
    return Measured(what, outcome, mean.n, mean.mean, mean.ci95, words)


def _words(
    what: str, mean: float | None, ends: tuple[float, float] | None, n: int, show: Callable[[float | None], str]
) -> str:
    if mean is None:
        return f"{what}: not measured"
    spread = "" if ends is None else f" (95 % interval {show(ends[0])} to {show(ends[1])})"
    few = "" if n >= MIN_SEEDS else f", fewer than the {MIN_SEEDS} that a claim needs"
    return f"{what}: {show(mean)}{spread}, {n} seed{'s' * (n != 1)}{few}"


def _index(result: ABResult, settings: dict[str, Any]) -> int:
    for index, arm in enumerate(result.arms):
        if DEFAULTS | arm.settings == DEFAULTS | settings:
            return index
    name = ":".join([str(settings["projection"]), *(f"{key}={value}" for key, value in list(settings.items())[1:])])
    raise SettingsError(f"arms: this A/B has no arm {name}; it has {', '.join(arm.arm for arm in result.arms)}")


def _has(result: ABResult, settings: dict[str, Any]) -> bool:
    return any(DEFAULTS | arm.settings == DEFAULTS | settings for arm in result.arms)


# --- the claims -------------------------------------------------------------------------------------------------------

_TABLE = (
    Claim(
        id="kv-structured",
        document="004",
        statement="structured alignment beats flat by 3–5 % in validation loss at equal steps, and its training loss "
        "falls faster",
        confirmed_if="the interval of the relative difference in validation loss lies at −3 % or below, and that of "
        "the mean training loss below 0",
        refuted_if="the interval in validation loss lies above −3 %, or that of the mean training loss at 0 or above",
        needs=(STRUCTURED, FLAT),
        judge=lambda result: [
            _loss_figure(result, STRUCTURED, FLAT, 0.03),
            _training_figure(result, STRUCTURED, FLAT),
        ],
    ),
    Claim(
        id="kv-cosine",
        document="004",
        statement="structured alignment reaches a higher cosine between student and projected teacher (against the "
        "shuffled-teacher control)",
        confirmed_if="the interval of the difference in cosine beyond that of shuffled teachers lies above 0",
        refuted_if="that interval lies at 0 or below",
        needs=(STRUCTURED, FLAT),
        judge=lambda result: [_cosine_figure(result, STRUCTURED, FLAT)],
    ),
    Claim(
        id="kv-uniform-init",
        document="004",
        statement="uniform initialisation of the head map adds to it (+2 % → +5 %)",
        confirmed_if="the interval of the relative difference in validation loss to random initialisation lies at "
        "−3 % or below",
        refuted_if="that interval lies above −3 %",
        needs=(STRUCTURED, RANDOM),
        judge=lambda result: [_loss_figure(result, STRUCTURED, RANDOM, 0.03)],
    ),
    Claim(
        id="kv-share-dim",
        document="004",
        statement="separate width projections a head add 1 % more",
        confirmed_if="the interval of the relative difference in validation loss to one shared projection lies at "
        "−1 % or below",
        refuted_if="that interval lies above −1 %",
        needs=(SEPARATE, STRUCTURED),
        judge=lambda result: [_loss_figure(result, SEPARATE, STRUCTURED, 0.01)],
    ),
)
CLAIMS: dict[str, Claim] = {claim.id: claim for claim in _TABLE}
