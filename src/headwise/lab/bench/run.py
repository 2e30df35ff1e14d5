"""A benchmark: length by length all kinds take turns with torch's own attention; each is given up where it gets dear.

At each length a kind's memory is measured by itself; then come the rounds, in which every kind runs for about
`SLICE_SECONDS` (at least once), in an order that rotates. Within a kind's budget the cost of a length is predicted from
the two before it; a kind's first length, if it is long, from two short ones that do not count.
"""

from __future__ import annotations

import math
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from headwise.allocator import kept_memory
from headwise.errors import SettingsError, one_of
from headwise.lab.bench.cases import Bed, Case, Work, cases, refusal
from headwise.lab.bench.result import BenchResult, Point, Row, crossover
from headwise.lab.bench.settings import BenchSettings
from headwise.lab.display import Display, make_display
from headwise.lab.display import Row as Shown
from headwise.lab.render import duration, quantity
from headwise.lab.result import Environment, Ratio
from headwise.lab.runner import cores
from headwise.lab.stats import ratio_summary
from headwise.lab.timing import free_bytes, interleaved, kept_bytes, peak_bytes
from headwise.train.folder import environment

SUBJECTS = ("attention",)
SLICE_SECONDS = 0.02
MOST_REPEATS = 50
LONG = 1024  # a first length beyond this is approached by shorter ones
MEMORY_SHARE = 0.8  # of the free memory that a kind may be predicted to take


def bench(
    subject: str = "attention",
    settings: BenchSettings | None = None,
    *,
    progress: bool | None = None,
    **changes: Any,
) -> BenchResult:
    """Time and memory of every attention against length, next to torch's own attention.

        hw.bench("attention", kinds="softmax,window(256)", lengths="512:4096").rows

    Args:
        subject: what is measured; so far "attention".
        settings: `BenchSettings`; its fields may as well be given by keyword.
        progress: show it on stderr; None: where that is a terminal.

    Raises:
        SettingsError: all mistakes in settings and kinds at once.
    """
    chosen, all_cases, bed = prepared(subject, settings, changes)
    began = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(kept_memory())  # as training has it
        stack.enter_context(torch.random.fork_rng(devices=[bed.device] if bed.device.type == "cuda" else []))
        torch.manual_seed(0)
        if chosen.threads is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(chosen.threads)
        display = stack.enter_context(make_display(progress))
        run = _Run(bed, all_cases, display)
        for length in sorted(set(chosen.lengths)):
            run.measure(length)
            result = run.result(command(subject, chosen), time.monotonic() - began)
            if chosen.out is not None:  # after every length, so that a run that is stopped leaves what it measured
                write(result, chosen.out)
    return result


def write(result: BenchResult, folder: Path) -> None:
    """`result.json` and `report.html` in a folder."""
    from headwise.lab.report.bench import report_html

    folder.mkdir(parents=True, exist_ok=True)
    result.save(folder)
    from headwise.io.atomic import write_text

    write_text(folder / "report.html", report_html(result))


def prepared(
    subject: str, settings: BenchSettings | None, changes: dict[str, Any]
) -> tuple[BenchSettings, list[Case], Bed]:
    """Settings, cases and what they share. Raises what `bench` raises."""
    if subject not in SUBJECTS:
        raise SettingsError(one_of(subject, SUBJECTS, "subject"))
    given = {} if settings is None else settings.model_dump(exclude_unset=True)
    chosen = BenchSettings(**{**given, **changes})
    bed = Bed(chosen)
    return chosen, cases(bed), bed


@dataclass(frozen=True)
class BenchEstimate:
    """What a benchmark would measure. `str` of it is for people."""

    subject: str
    kinds: list[str]
    lengths: list[int]
    rounds: int
    budget: float

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "seconds_at_most": self.budget * (len(self.kinds) - 1)}

    def __str__(self) -> str:
        most = duration(self.budget * (len(self.kinds) - 1))
        return "\n".join([
            *(f"{kind} (baseline)" if n == 0 else kind for n, kind in enumerate(self.kinds)),
            f"at {', '.join(f'{n:,}' for n in self.lengths)} tokens, {self.rounds} rounds: at most {most}, "
            f"{duration(self.budget)} a kind, and what the baseline takes",
            "nothing was measured and nothing written (--dry-run)",
        ])  # fmt: skip


def estimate(subject: str, settings: BenchSettings) -> BenchEstimate:
    """What `bench` would do. Raises what it would raise before its first measurement."""
    chosen, all_cases, _ = prepared(subject, settings, {})
    return BenchEstimate(
        subject, [case.label for case in all_cases], sorted(set(chosen.lengths)), chosen.rounds, chosen.budget
    )


def command(subject: str, settings: BenchSettings) -> str:
    """The shell command that repeats a benchmark."""
    words = ["headwise", "bench", subject]
    for name in sorted(settings.model_fields_set - {"out"}):
        value, flag = getattr(settings, name), f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


@dataclass
class _Account:
    """What one case has cost so far, and what it was found to be."""

    case: Case
    shown: Shown
    spent: float = 0.0
    points: list[Point] = field(default_factory=list)
    # (length, seconds of a step, peak bytes), the short ones that do not count included.
    known: list[tuple[int, float, float]] = field(default_factory=list)

    def predicted(self, length: int) -> tuple[float, float]:
        """Seconds of a step and peak bytes at a length, by the growth from the last two lengths known.

        Growth is taken to lie between linear and quadratic, and quadratic where only one length is known.
        """
        if not self.known:
            return 0.0, 0.0
        n1, *at = self.known[-1]
        powers = [2.0, 2.0]
        if len(self.known) > 1:
            n0, *before = self.known[-2]
            pairs = zip(before, at)
            slopes = [math.log(b / a) / math.log(n1 / n0) if a > 0 and b > 0 else 2.0 for a, b in pairs]
            powers = [min(2.0, max(1.0, slope)) for slope in slopes]
        seconds, peak = (value * (length / n1) ** power for value, power in zip(at, powers))
        return seconds, peak


class _Run:
    """One call of `bench`."""

    def __init__(self, bed: Bed, all_cases: Sequence[Case], display: Display) -> None:
        self.bed, self.display = bed, display
        total = len(set(bed.settings.lengths)) * bed.settings.rounds
        self.accounts = [_Account(case, Shown(case.label, total)) for case in all_cases]
        display.begin("benchmark", [account.shown for account in self.accounts])

    def measure(self, length: int) -> None:
        """All cases at one length."""
        baseline = self.accounts[0]
        works = {}
        for account in self.accounts:
            if not account.known and length > LONG:
                for short in (length // 8, length // 4):
                    self._single(account, short, counted=False)
                self.bed.forget()
            reason = self._too_dear(account, length)
            work = None if reason else self._single(account, length)
            if work is None:
                text = reason or account.points[-1].skipped or ""
                if reason:
                    account.points.append(Point(length=length, skipped=reason))
                self.display.say(f"{account.case.label} at {length:,} tokens: {text}")
                self._count(account, self.bed.settings.rounds)
            else:
                works[account.case.label] = (account, work)
        tasks = {label: _repeated(*self._task(account, work)) for label, (account, work) in works.items()}
        seconds = interleaved(
            {label: task for label, (task, _) in tasks.items()},
            self.bed.settings.rounds,
            done=lambda label: self._count(works[label][0], 1),
        )
        own = [s / tasks[baseline.case.label][1] for s in seconds.get(baseline.case.label, ())]
        for label, (account, _) in works.items():
            account.spent += sum(seconds[label])
            point = account.points[-1]
            point.seconds = [s / tasks[label][1] for s in seconds[label]]
            summary = ratio_summary(point.seconds, own) if account is not baseline else None
            if summary is not None:
                point.ratio = Ratio(ratio=summary.ratio, lo=summary.lo, hi=summary.hi)
            elif account is baseline:
                point.ratio = Ratio(ratio=1.0, lo=None, hi=None)
            account.known[-1] = (length, point.median or 0.0, account.known[-1][2])
        self.bed.forget()
        self.display.say(f"{length:,} tokens: {len(works)} of {len(self.accounts)} measured")

    def result(self, command: str, wall_seconds: float) -> BenchResult:
        """What is known now."""
        rows = [
            Row(
                label=a.case.label,
                source=a.case.source,
                points=a.points,
                crossover=None if a is self.accounts[0] else crossover(a.points),
            )
            for a in self.accounts
        ]
        settings = self.bed.settings.model_dump(mode="json", exclude={"out"})
        settings |= {"threads": torch.get_num_threads(), "d_model": self.bed.settings.width}
        return BenchResult(
            settings=settings,
            environment=about(self.bed.device),
            command=command,
            lengths=sorted({p.length for a in self.accounts for p in a.points}),
            rows=rows,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            wall_seconds=wall_seconds,
        )

    def _too_dear(self, account: _Account, length: int) -> str | None:
        """Why a case is left out at a length; None where it is not. Torch's own is never left out for its time."""
        seconds, peak = account.predicted(length)
        needed = seconds * (self.bed.settings.rounds + 3)
        budget = self.bed.settings.budget
        if account is not self.accounts[0] and account.spent + needed > budget:
            return f"left out: about {duration(account.spent + needed)} in all, over the budget of {duration(budget)}"
        free = free_bytes(self.bed.device)
        if free is not None and peak > MEMORY_SHARE * free:
            return f"left out: about {quantity(peak, 'B')} of memory, {quantity(free, 'B')} are free"
        return None

    def _single(self, account: _Account, length: int, *, counted: bool = True) -> Work | None:
        """One case made ready at a length, run three times by itself: to warm it up, for its time, for its memory.

        None where it cannot run there; the reason then stands in its last point, where the length is counted.
        """
        bed, case = self.bed, account.case
        point = Point(length=length)
        began = time.perf_counter()
        try:
            work = case.make(length)
            step = case.step(work, bed)
            step()
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
            if bed.settings.backward:
                point.kept_bytes = kept_bytes(lambda: case.forward(work), work.own)
            point.peak_bytes = peak_bytes(step, bed.device)
        except Exception as error:
            if (reason := refusal(error)) is None:
                raise
            if counted:
                account.points.append(Point(length=length, skipped=reason))
            return None
        account.spent += time.perf_counter() - began
        account.known.append((length, seconds, point.peak_bytes or 0.0))
        if counted:
            account.points.append(point)
        return work

    def _task(self, account: _Account, work: Work) -> tuple[Callable[[], None], float]:
        return account.case.step(work, self.bed), account.known[-1][1]

    def _count(self, account: _Account, rounds: int) -> None:
        shown = account.shown
        if shown.state == "waiting":
            shown.state, shown.began = "running", time.monotonic()
        shown.done += rounds
        if shown.done >= shown.total:
            shown.state = "finished"
        else:  # that a kind has ended is no news: all end at the last length
            self.display.changed(shown)


def _repeated(step: Callable[[], None], seconds: float) -> tuple[Callable[[], None], int]:
    """A step repeated until it fills a slice, and how often that is."""
    times = max(1, min(MOST_REPEATS, round(SLICE_SECONDS / seconds))) if seconds > 0 else MOST_REPEATS

    def task() -> None:
        for _ in range(times):
            step()

    return task, times


def about(device: torch.device) -> Environment:
    """The machine a benchmark ran on."""
    known = environment(device)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text(errors="replace").splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return Environment(
        headwise=known["headwise"], python=known["python"], torch=known["torch"], cpu=cpu, cores=cores(),
        os=known["platform"], device=device.type if device.type == "cpu" else known["device"],
    )  # fmt: skip
