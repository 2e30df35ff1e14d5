"""What a person sees while a comparison runs: a live table on a terminal, elsewhere a line now and then. On stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headwise.lab.render import duration

STATES = ("running", "failed", "waiting", "finished")
LINE_SECONDS = 30.0


@dataclass
class Row:
    """One run. `state` is one of STATES, `done` steps of `total` are made, those before `first` in an earlier call."""

    label: str
    total: int
    state: str = "waiting"
    done: int = 0
    first: int = 0
    loss: float | None = None
    began: float = 0.0
    note: str = ""

    def update(self, state: str, info: Any) -> None:
        """After an event of `lab.runner.Pool`: started, progress with its record, done or failed with the error."""
        now = time.monotonic()
        if state == "started":
            self.state, self.began = "running", now
        elif state == "progress":
            if self.done == 0:
                # Steps of an earlier call, up to its checkpoint, came for nothing: the clock starts at this record.
                self.first, self.began = info["step"], now
            self.done, self.loss = info["step"], info["loss"]
        elif state == "done":
            self.state, self.done = "finished", self.total
        else:
            self.state, self.note = "failed", str(info)

    def seconds_left(self, now: float) -> float | None:
        """Until this run is done, at the speed it had so far."""
        if self.state != "running" or self.done <= self.first:
            return None
        return (now - self.began) / (self.done - self.first) * (self.total - self.done)


class Display(Protocol):
    """Shows the state of runs and single lines of text; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    def say(self, text: str) -> None:
        """A line that stays."""

    def begin(self, title: str, rows: list[Row]) -> None:
        """A phase with these runs; the rows are changed in place as they go on."""

    def changed(self, row: Row) -> None:
        """A run started, went on, or ended."""


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def begin(self, title: str, rows: list[Row]) -> None:
        pass

    def changed(self, row: Row) -> None:
        pass


class Lines(Silent):
    """A line for what is said, for each run that ends, and every half minute between."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def begin(self, title: str, rows: list[Row]) -> None:
        self._rows = rows
        self.say(title)

    def changed(self, row: Row) -> None:
        now = time.monotonic()
        if row.state not in ("finished", "failed") and now - self._last < LINE_SECONDS:
            return
        self._last = now
        self.say(f"{overall(self._rows, now)}; {row.label}: {describe(row)}")


class LiveTable(Silent):
    """A table that is drawn anew four times a second: every run with its progress, loss and time left."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._title, self._rows = "", list[Row]()
        self._live = Live(get_renderable=self.table, console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)

    def say(self, text: str) -> None:
        self._console.print(Text(text))

    def begin(self, title: str, rows: list[Row]) -> None:
        self._title, self._rows = title, rows

    def table(self) -> RenderableType:
        """What is shown now; rows beyond the terminal's height give way in the order of STATES."""
        if not self._rows:
            return Text(self._title)
        now = time.monotonic()
        table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
        for name in ("Run", "Progress", "Steps", "Loss", "ETA"):
            table.add_column(name, justify="left" if name in ("Run", "Progress") else "right", no_wrap=True)
        room = max(3, self._console.size.height - 5)
        ranked = sorted(range(len(self._rows)), key=lambda i: (STATES.index(self._rows[i].state), i))
        shown = sorted(ranked[:room])
        for row in (self._rows[i] for i in shown):
            left = row.seconds_left(now)
            last = row.note or row.state if left is None else duration(left)
            colour = {"failed": "red", "finished": "green"}.get(row.state, "")
            table.add_row(
                Text(row.label, overflow="ellipsis"),
                ProgressBar(row.total, row.done, width=20),
                f"{row.done}/{row.total}",
                "" if row.loss is None else f"{row.loss:.3f}",
                Text(last, style=colour, overflow="ellipsis"),
            )
        hidden = len(self._rows) - len(shown)
        foot = [Text(f"… and {hidden} more", style="dim")] if hidden else []
        return Group(Text(f"{self._title}: {overall(self._rows, now)}", style="bold"), table, *foot)


def make_display(progress: bool | None) -> Display:
    """A live table where stderr is a terminal; elsewhere lines if told to (`True`), and nothing if not (`None`)."""
    if progress is False:
        return Silent()
    if sys.stderr.isatty():
        return LiveTable()
    return Lines() if progress else Silent()


def overall(rows: Sequence[Row], now: float) -> str:
    """How far all the runs of a phase are, in words."""
    ended = [row for row in rows if row.state in ("finished", "failed")]
    failed = sum(row.state == "failed" for row in rows)
    text = f"{len(ended)} of {len(rows)} runs"
    if failed:
        text += f" ({failed} failed)"
    left = _seconds_left(rows, now)
    return text if left is None else f"{text}, about {duration(left)} left"


def _seconds_left(rows: Sequence[Row], now: float) -> float | None:
    """Steps still to do, at the pace that all runs together had so far."""
    timed = [row for row in rows if row.done > row.first]
    todo = sum(row.total - row.done for row in rows if row.state in ("running", "waiting"))
    if not timed or not todo:
        return None
    return (now - min(row.began for row in timed)) / sum(row.done - row.first for row in timed) * todo


def describe(row: Row) -> str:
    """One run's state in words."""
    if row.state == "failed":
        return f"failed: {row.note}"
    loss = "" if row.loss is None else f", loss {row.loss:.3f}"
    return f"{row.state}, step {row.done} of {row.total}{loss}"
