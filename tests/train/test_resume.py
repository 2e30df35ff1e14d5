"""A run that was stopped, however, ends with the same bits as one that was not."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import LINE, LINE_WITH_DROPOUT, QUICK

from headwise.data import Dataset, load_dataset
from headwise.errors import DataError, FormatError, Interrupted, SettingsError
from headwise.io.atomic import WriteError
from headwise.io.checkpoint import list_checkpoints, load_checkpoint
from headwise.train import TrainResult, resume, train, train_or_resume
from headwise.train import folder as folder_module

TIMINGS = {"seconds", "tokens_per_s", "since_seconds"}


def run(out: Path, dataset: Dataset, line: str = LINE_WITH_DROPOUT, **changes: Any) -> TrainResult:
    return train(line, dataset=dataset, out=out, **{**QUICK, **changes})


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in TIMINGS}


def records(out: Path) -> list[dict[str, Any]]:
    return [untimed(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]


def check_same(one: Path, two: Path) -> None:
    """Parameters, optimiser, random state, counters and records of two finished runs, bit by bit."""
    first, second = (load_checkpoint(list_checkpoints(out / "checkpoints")[-1]) for out in (one, two))
    assert first.step == second.step
    assert untimed(first.state["progress"]) == untimed(second.state["progress"])
    for left, right in ((first.model, second.model), (first.optimizer, second.optimizer)):
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), name
    assert {"rng/cpu", "embedding.weight/exp_avg", "embedding.weight/step"} <= first.optimizer.keys()
    assert records(one) == records(two)


def kill_at(step: int, number: signal.Signals) -> Callable[[dict[str, Any]], None]:
    def on_progress(values: dict[str, Any]) -> None:
        if values["step"] == step:
            os.kill(os.getpid(), number)

    return on_progress


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Path:
    """The run with dropout that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out, dataset, log_every=1)
    return out


@pytest.mark.parametrize("step", range(1, 12))
def test_interrupted_at_any_step_it_goes_on_to_the_same_bits(
    step: int, whole: Path, tmp_path: Path, dataset: Dataset
) -> None:
    out = tmp_path / "run"
    number = signal.SIGINT if step % 2 else signal.SIGTERM
    with pytest.raises(Interrupted, match=rf"{number.name}: stopped after step {step} of 12; .*`headwise resume "):
        run(out, dataset, log_every=1, on_progress=kill_at(step, number))
    assert load_checkpoint(list_checkpoints(out / "checkpoints")[-1]).step == step
    resume(out, dataset=dataset)
    check_same(out, whole)


def test_interrupted_between_records_the_means_go_on_too(tmp_path: Path, dataset: Dataset) -> None:
    """Records every 5 steps, checkpoints every 4: the sums since the last record are part of a checkpoint."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(whole, dataset, log_every=5)
    with pytest.raises(Interrupted):
        run(out, dataset, log_every=5, on_progress=kill_at(5, signal.SIGINT))
    shutil.rmtree(out / "checkpoints" / "step-000005")
    assert resume(out, dataset=dataset).history[0]["step"] == 5
    check_same(out, whole)


def test_an_accumulating_run_with_an_encoders_masks_resumes_too(tmp_path: Path, dataset: Dataset) -> None:
    line = "gpt2(architecture=encoder, d_model=16, n_layers=1, n_heads=2, dropout=0.1)"
    more = {"accumulate": 2, "lr_multipliers": {"*.ffn.*": 0.5}, "schedule": "wsd"}
    run(tmp_path / "whole", dataset, line, **more)
    with pytest.raises(Interrupted):
        run(tmp_path / "run", dataset, line, **more, on_progress=kill_at(6, signal.SIGINT))
    resume(tmp_path / "run", dataset=dataset)
    check_same(tmp_path / "run", tmp_path / "whole")


VICTIM = """
import sys
from headwise.train import train_or_resume
train_or_resume({line!r}, data={data!r}, out={out!r}, **{settings!r})
"""


def test_killed_outright_at_random_moments_it_still_ends_with_the_same_bits(
    tmp_path: Path, text_file: Path, warm: Path
) -> None:
    """SIGKILL twice, at random moments of a process that checkpoints all the time; then it may finish.

    Whatever the moments (in an update, in a write, in a rename, before anything is written), the result is the same.
    """
    settings = {**QUICK, "steps": 150, "log_every": 1, "eval_every": 50, "checkpoint_every": 3}
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(LINE_WITH_DROPOUT, data=str(text_file), out=whole, **settings)
    script = VICTIM.format(line=LINE_WITH_DROPOUT, data=str(text_file), out=str(out), settings=settings)
    moments = random.Random(5)
    kills = 0
    for _ in range(2):
        process = subprocess.Popen([warm / "python", "-c", script], stderr=subprocess.PIPE)
        seen = _size(out / "metrics.jsonl")
        deadline = time.monotonic() + 60
        while process.poll() is None and _size(out / "metrics.jsonl") == seen and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        _, errors = process.communicate()
        kills += process.returncode == -signal.SIGKILL
        assert b"Error" not in errors, errors.decode()
    assert kills
    result = resume(out)
    assert [values["step"] for values in records(out)] == list(range(1, 151))
    check_same(out, whole)
    assert result.val_loss == json.loads((whole / "result.json").read_text())["val_loss"]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_a_damaged_newest_checkpoint_falls_back_with_one_line(tmp_path: Path, dataset: Dataset, whole: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(out, dataset, log_every=1, on_progress=kill_at(9, signal.SIGINT))
    damaged = out / "checkpoints" / "step-000009" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    lines: list[str] = []
    resume(out, dataset=dataset, warn=lines.append)
    assert len(lines) == 1
    assert str(damaged) in lines[0]
    check_same(out, whole)


def test_with_every_checkpoint_damaged_it_says_so(tmp_path: Path, dataset: Dataset) -> None:
    run(tmp_path / "run", dataset)
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(FormatError, match=r"no checkpoint in .* is whole"):
        resume(tmp_path / "run", dataset=dataset, warn=lambda line: None)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path, dataset: Dataset, whole: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints")
    (out / "result.json").unlink()
    resume(out, dataset=dataset)
    check_same(out, whole)


def test_a_finished_run_is_only_read(tmp_path: Path, dataset: Dataset) -> None:
    first = run(tmp_path / "run", dataset)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = resume(tmp_path / "run", dataset=dataset)
    assert again.figures() == first.figures()
    assert again.history == first.history
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters()))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_changed_data_are_refused(tmp_path: Path, text_file: Path) -> None:
    data = tmp_path / "text.txt"
    shutil.copy(text_file, data)
    train(LINE, data=str(data), out=tmp_path / "run", **QUICK)
    with data.open("a") as file:
        file.write("O brave new world")
    with pytest.raises(DataError, match=r"the data of the run in .* have changed"):
        resume(tmp_path / "run")


def test_it_resumes_from_another_working_directory(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text_file.parent)
    first = train(LINE, data=text_file.name, out="run", **QUICK)
    shutil.move("run", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert resume("moved").figures() == first.figures()


@pytest.mark.parametrize("content", [None, "", "{}", '{"format": "headwise-run", "version": 1}', "[1]"])
def test_a_folder_without_a_sound_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(FormatError) as caught:
        resume(tmp_path)
    assert "run.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_train_or_resume_does_whichever_is_due_and_never_mixes_runs(tmp_path: Path, dataset: Dataset) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train_or_resume(LINE, dataset=dataset, out=out, **QUICK, on_progress=kill_at(4, signal.SIGINT))
    with pytest.raises(SettingsError, match=r"another run: line gpt2\(.*rope.*lr=0.5 \(was 0.001\)"):
        train_or_resume(LINE[:-1] + ", position=rope)", dataset=dataset, out=out, **QUICK, lr=0.5)
    resumed = train_or_resume(LINE, dataset=dataset, out=out, **QUICK)
    assert resumed.history[0]["step"] == 2
    finished = train_or_resume(LINE, dataset=dataset, out=out, **QUICK)
    assert finished.val_loss == resumed.val_loss == train(LINE, dataset=dataset, **QUICK).val_loss


def test_two_processes_never_train_in_one_folder(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "_PATIENCE", 2)
    refused: list[str] = []

    def resume_meanwhile(values: dict[str, Any]) -> None:
        with pytest.raises(SettingsError, match="another process is training in") as caught:
            resume(tmp_path / "run", dataset=dataset)
        refused.append(str(caught.value))

    run(tmp_path / "run", dataset, log_every=12, eval_every=0, on_progress=resume_meanwhile)
    assert len(refused) == 1
    resume(tmp_path / "run", dataset=dataset)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tmp_path: Path, dataset: Dataset, whole: Path) -> None:
    """A limit on the size of files stands in for a full disk: the operating system refuses the write half-way."""
    out, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(values: dict[str, Any]) -> None:
        if values["step"] == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))

    try:
        with pytest.raises(WriteError) as caught:
            run(out, dataset, log_every=1, on_progress=fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert "step 8: cannot write" in str(caught.value)
    assert f"the checkpoint of step 4 in {out} is intact" in str(caught.value)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000004"]
    resume(out, dataset=dataset)
    check_same(out, whole)


def test_the_embedded_corpus_resumes_without_being_handed_over(tmp_path: Path) -> None:
    settings = {**QUICK, "eval_every": 0, "steps": 2}
    first = train(LINE, out=tmp_path / "run", **settings)
    assert first.spec.vocab_size == load_dataset("shakespeare", "char").tokenizer.vocab_size
    assert resume(tmp_path / "run").val_loss == first.val_loss
