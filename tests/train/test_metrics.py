"""Records on disk: cut where a resumed run goes on, readable after a kill, and in TensorBoard."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from small_runs import LINE, QUICK

from headwise.data import Dataset
from headwise.errors import SettingsError
from headwise.train import train
from headwise.train.metrics import JsonlTracker, TensorBoardTracker, read_metrics
from headwise.train.progress import wanted


def write(path: Path, steps: range, start: int = 0) -> int:
    tracker = JsonlTracker(path, start)
    for step in steps:
        tracker.record({"step": step, "loss": step / 3})
    length = tracker.length()
    tracker.close()
    return length


def test_going_on_cuts_off_what_the_checkpoint_did_not_know(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    length = write(path, range(1, 4))
    write(path, range(4, 9), length)
    write(path, range(4, 6), length)
    assert [values["step"] for values in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert read_metrics(path)[0]["loss"] == 1 / 3


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(3))
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
    assert [values["step"] for values in read_metrics(path)] == [0, 1, 2]


def test_a_file_that_was_lost_begins_anew_without_holes_of_zeros(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", range(5, 7), start=1000)
    assert [values["step"] for values in read_metrics(tmp_path / "metrics.jsonl")] == [5, 6]
    assert read_metrics(tmp_path / "nowhere.jsonl") == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the protobuf that tensorboard brings
def test_tensorboard_gets_every_number(tmp_path: Path, dataset: Dataset) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = train(LINE, dataset=dataset, out=tmp_path / "run", tensorboard=True, **QUICK)
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("loss", "val_loss", "lr", "grad_norm", "tokens_per_s"):
        expected = [(v["step"], v[name]) for v in result.history if name in v]
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SettingsError, match=r"pip install 'headwise\[tensorboard\]'"):
        TensorBoardTracker(tmp_path, 0)


def test_the_bar_is_drawn_on_stderr_only_and_only_where_wanted(
    dataset: Dataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(LINE, dataset=dataset, **QUICK)
    assert capsys.readouterr() == ("", "")
    train(LINE, dataset=dataset, progress=True, **QUICK)
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("gpt2", "12/12", "loss", "val", "tokens/s", "ETA"):
        assert part in err

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert wanted(None)
    assert not wanted(False)
