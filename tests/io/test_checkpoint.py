"""Checkpoints: whole or refused, the newest two kept, damage passed over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headwise.errors import FormatError
from headwise.io.atomic import WriteError
from headwise.io.checkpoint import list_checkpoints, load_checkpoint, load_newest, save_checkpoint

MODEL = {"a.weight": torch.randn(3, 4), "b": torch.tensor(2.5, dtype=torch.float64)}
OTHERS = {"a.weight/exp_avg": torch.randn(3, 4), "rng/cpu": torch.arange(9, dtype=torch.uint8), "empty": torch.zeros(0)}
STATE = {"seconds": 0.1 + 0.2, "nested": {"none": None, "list": [1, 2]}}


def save(root: Path, step: int) -> Path:
    return save_checkpoint(root, step, MODEL, OTHERS, STATE)


def steps(root: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(root)]


def no_warning(line: str) -> None:
    raise AssertionError(line)


def test_everything_comes_back_bit_by_bit(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save(tmp_path, 7))
    assert checkpoint.step == 7
    assert checkpoint.state == STATE
    for written, read in ((MODEL, checkpoint.model), (OTHERS, checkpoint.optimizer)):
        assert written.keys() == read.keys()
        for name, tensor in written.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)


def test_transposed_and_shared_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    path = save_checkpoint(tmp_path, 1, {"turned": matrix.T, "row": matrix[1]}, {}, {})
    read = load_checkpoint(path).model
    assert torch.equal(read["turned"], matrix.T)
    assert torch.equal(read["row"], matrix[1])


def test_the_newest_two_are_kept_in_order_of_steps(tmp_path: Path) -> None:
    for step in (8, 9, 10, 1_000_000, 2_000_000):
        save(tmp_path, step)
    assert steps(tmp_path) == [1_000_000, 2_000_000]


def test_saving_drops_later_steps_which_a_resumed_run_passed_over(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    save(tmp_path, 15)
    assert steps(tmp_path) == [10, 15]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / "state.json").write_text("{}")
    save(tmp_path, 5)
    assert load_checkpoint(path).step == 5


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(file=st.sampled_from(["model.safetensors", "optimizer.safetensors", "state.json"]), data=st.data())
def test_any_damage_is_a_format_error_and_the_one_before_serves(tmp_path: Path, file: str, data: st.DataObject) -> None:
    root = tmp_path / "run"
    shutil.rmtree(root, ignore_errors=True)
    save(root, 1)
    victim = save(root, 2) / file
    content = victim.read_bytes()
    how = data.draw(st.sampled_from(["gone", "cut", "flip"] if file != "state.json" else ["gone", "cut", "foreign"]))
    if how == "gone":
        victim.unlink()
    elif how == "cut":
        victim.write_bytes(content[: data.draw(st.integers(0, len(content) - 2))])
    elif how == "flip":
        at = data.draw(st.integers(0, len(content) - 1))
        victim.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
    else:
        victim.write_text(data.draw(st.sampled_from(["[]", "{}", "null", '{"format": "x"}', "not json"])))
    with pytest.raises(FormatError) as caught:
        load_checkpoint(victim.parent)
    assert str(victim) in str(caught.value)
    assert "\n" not in str(caught.value)
    lines: list[str] = []
    newest = load_newest(root, lines.append)
    assert newest is not None
    assert newest.step == 1
    assert len(lines) == 1


def test_none_at_all_is_none_and_all_damaged_is_an_error(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "nothing", no_warning) is None
    for step in (1, 2):
        (save(tmp_path, step) / "model.safetensors").write_bytes(b"")
    lines: list[str] = []
    with pytest.raises(FormatError, match=r"no checkpoint in .* is whole"):
        load_newest(tmp_path, lines.append)
    assert len(lines) == 2


def test_a_checkpoint_of_a_newer_headwise_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    about = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**about, "version": 99}))
    with pytest.raises(FormatError, match=r"version 99.*upgrade"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def full(path: Path, tensors: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headwise.io.checkpoint.write_tensors", full)
    with pytest.raises(WriteError, match="No space left on device") as caught:
        save(tmp_path, 3)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    newest = load_newest(tmp_path, no_warning)
    assert newest is not None
    assert newest.step == 2
