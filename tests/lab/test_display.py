"""What is shown while runs go on: every run on a terminal, those that matter where it is small, lines elsewhere."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from headwise.lab import display
from headwise.lab.display import Lines, LiveTable, Row, Silent, make_display, overall


def rows() -> list[Row]:
    return [
        Row("seed 0 · gpt2", 100, state="finished", done=100, loss=1.9, began=1.0),
        Row("seed 0 · llama", 100, state="failed", done=20, loss=9.9, note="loss is nan", began=1.0),
        Row("seed 1 · gpt2", 100, state="running", done=60, first=20, loss=2.125, began=51.0),
        Row("seed 1 · llama", 100),
    ]


def drawn(all_rows: list[Row], height: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(display.time, "monotonic", lambda: 71.0)
    console = Console(file=io.StringIO(), width=100, height=height)
    table = LiveTable(console)
    table.begin("training, 2 at once", all_rows)
    console.print(table.table())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_every_run_has_its_progress_loss_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(rows(), 40, monkeypatch)
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "100/100" in lines["seed 0 · gpt2"]
    assert "finished" in lines["seed 0 · gpt2"]
    assert "loss is nan" in lines["seed 0 · llama"]
    # 40 of its own steps in 20 s, 40 to go.
    assert "60/100" in lines["seed 1 · gpt2"]
    assert "2.125" in lines["seed 1 · gpt2"]
    assert "20.0 s" in lines["seed 1 · gpt2"]
    assert "waiting" in lines["seed 1 · llama"]
    assert "2 of 4 runs (1 failed)" in text


def test_on_a_small_terminal_the_running_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [Row(f"seed {n}", 10) for n in range(30)]
    many[17].state = "running"
    text = drawn(many, 10, monkeypatch)
    assert "seed 17 " in text
    assert "… and 25 more" in text
    assert len(text.splitlines()) < 10


def test_the_time_left_is_at_the_pace_of_all_runs_together() -> None:
    """It once went by the runs that are running: for the moment between one's end and the next one's start, doubled."""
    two = [Row("a", 100, state="running", done=50, began=10.0), Row("b", 100)]
    # A step took 0.2 s; 150 are left, one run at a time.
    assert overall(two, 20.0) == "0 of 2 runs, about 30.0 s left"
    four = [Row(name, 100, state="finished", done=100, began=10.0) for name in "ab"]
    four += [Row("c", 100, state="running", done=10, first=10, began=29.5), Row("d", 100)]
    assert overall(four, 30.0) == "2 of 4 runs, about 19.0 s left"
    assert overall([Row("a", 100)], 10.0) == "0 of 1 runs"
    assert overall(four[:2], 30.0) == "2 of 2 runs"


def test_lines_tell_of_every_end_and_of_little_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    lines = Lines()
    done, failed, running, _ = rows()
    lines.begin("training", [done, failed, running])
    for row in (running, running, done, running, failed):
        lines.changed(row)
    now += display.LINE_SECONDS
    lines.changed(running)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("; ")[2] for line in said[1:]] == [
        "seed 0 · gpt2: finished, step 100 of 100, loss 1.900",
        "seed 0 · llama: failed: loss is nan",
        "seed 1 · gpt2: running, step 60 of 100, loss 2.125",
    ]


def test_a_library_is_quiet_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert [type(make_display(progress)) for progress in (None, True, False)] == [Silent, Lines, Silent]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert [type(make_display(progress)) for progress in (None, True, False)] == [LiveTable, LiveTable, Silent]
