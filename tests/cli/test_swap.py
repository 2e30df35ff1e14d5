"""`headwise swap`, and `headwise train --init-from`: a replaced part is measured, saved, and trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import run, run_json

import headwise as hw
from headwise.cli import main
from headwise.errors import SettingsError
from headwise.lab.settings import CompareSettings

LINE = "llama(d_model=16, n_layers=3, n_heads=2)"
QUICK = ["--seq-len", "16", "--batch-size=4", "--steps", "8", "--log-every", "2"]


@pytest.fixture(scope="module")
def trained(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swap") / "run"
    assert main(["train", LINE, "--data", text, *QUICK, "--val-fraction", "0.2", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def swapped(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swap") / "swapped"
    assert main(["swap", str(trained), "--ffn", "vft(rank=4)", "--layers", "0,2", "--out", str(out)]) == 0
    return out


def test_losses_are_those_of_eval_on_the_data_of_the_run(
    trained: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    told = run_json(capsys, "swap", str(trained), "--attention", "gqa(kv_heads=1)", "--out", str(out))
    flags = ["--data", text, "--val-fraction", "0.2"]
    before, after = (run_json(capsys, "eval", str(folder), *flags) for folder in (trained, out))
    assert told["val_loss_before"] == pytest.approx(before["nats"], abs=1e-12)
    assert told["val_loss_after"] == pytest.approx(after["nats"], abs=1e-12)
    assert told["n_tokens"] == after["n_tokens"]
    for key, folder in (("params_before", trained), ("params_after", out)):
        assert told[key] == sum(p.numel() for p in hw.load(folder).parameters())
    assert told["line_after"] == str(hw.load(out).spec)
    assert [(part["layer"], part["family"]) for part in told["parts"]] == [(i, "attention") for i in range(3)]


def test_what_people_read(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(
        capsys, "swap", str(trained), "--ffn", "moe(3, 1)", "--layers=1", "--out", str(tmp_path / "n")
    )
    assert (status, err) == (0, "")
    assert "layer 1  ffn: swiglu → moe" in out
    assert "validation loss" in out
    assert f"headwise train --init-from {tmp_path / 'n'}" in out


def test_the_new_model_generates_and_only_the_chosen_layers_changed(
    trained: Path, swapped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "generate", str(swapped), "--prompt", "the ", "--max-new-tokens", "5")
    assert status == 0
    assert out.startswith("the ")
    old, new = hw.load(trained).state_dict(), hw.load(swapped).state_dict()
    for name, tensor in old.items():
        if not name.startswith(("stack.blocks.0.ffn.", "stack.blocks.2.ffn.")):
            assert torch.equal(new[name], tensor), name


def test_a_dry_run_says_the_line_and_the_size_and_writes_nothing(
    trained: Path, swapped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    argv = ["swap", str(trained), "--ffn", "vft(rank=4)", "--layers", "0,2", "--out", str(out), "--dry-run"]
    plan = run_json(capsys, *argv)
    assert plan["line_after"] == str(hw.load(swapped).spec)
    assert plan["params_after"] == sum(p.numel() for p in hw.load(swapped).parameters())
    assert not out.exists()
    assert "parameters" in run(capsys, *argv)[1]


def test_training_goes_on_from_the_swapped_weights(
    swapped: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate too small to move anything leaves the weights it began with; and no line need be given."""
    out = tmp_path / "on"
    status, _, err = run(
        capsys, "train", "--init-from", str(swapped), "--data", text, *QUICK, "--lr", "1e-30", "--weight-decay", "0",
        "--out", str(out),
    )  # fmt: skip
    assert status == 0, err
    began, ended = hw.load(swapped), hw.load(out)
    assert ended.spec == began.spec
    for name, tensor in began.state_dict().items():
        torch.testing.assert_close(ended.state_dict()[name], tensor, atol=1e-12, rtol=0)
    told = json.loads((out / "run.json").read_text())["settings"]
    assert told["init_from"] == str(swapped.absolute())
    assert told["tokenizer"] == str(swapped.absolute() / "tokenizer")


def test_a_stopped_run_from_given_weights_resumes_to_the_same_bits(swapped: Path, text: str, tmp_path: Path) -> None:
    """Resuming must not begin with the given weights again: it needs them no more, and they may be gone."""
    import shutil

    start = tmp_path / "start"
    shutil.copytree(swapped, start)
    settings = {"data": text, "seq_len": 16, "batch_size": 4, "steps": 8, "checkpoint_every": 4, "threads": 1}
    spec = hw.load(start).spec
    whole = hw.train(spec, init_from=start, progress=False, **settings, out=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for name in ("result.json", "checkpoints/step-000008"):
        target = tmp_path / "half" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    (start / "model.safetensors").unlink()
    resumed = hw.resume(tmp_path / "half", progress=False)
    assert resumed.steps == 8
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ffn", "vft(rank=16)"], "error: ffn.rank: 16 given, but a vein is narrower than d_model=16"),
        (["--ffn", "moe", "--layers", "0-9"], "error: layers: '0-9' given, but this model has layers 0 to 2"),
        (["--ffn", "moe", "--layers", "1-0"], "error: layers: '1-0' given; write the lower layer first"),
        (["--ffn", "moe", "--out", __file__], f"error: out: {__file__} is a file; choose a folder"),
        (["--ffn", "meo"], "error: ffn: unknown ffn 'meo' (did you mean 'moe'?)"),
        ([], "error: nothing to put in: give --attention, --ffn or both"),
        (["--fnn", "moe"], "error: unknown flag --fnn (did you mean '--ffn'?)"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    trained: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "swap", str(trained), *flags)
    assert (status, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_no_model_no_room_no_fit(
    trained: Path, swapped: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "swap", str(tmp_path / "nothing"), "--ffn", "moe")
    assert status == 1
    assert "is no folder; give the folder of a model or of a training run" in err
    status, _, err = run(capsys, "swap", str(trained), "--ffn", "moe", "--out", str(swapped))
    assert status == 2
    assert f"out: {swapped} exists and is not empty" in err
    status, _, err = run(capsys, "train", LINE, "--init-from", str(swapped), "--data", text, *QUICK)
    assert status == 2
    assert f"init_from: {swapped} holds 'llama(" in err
    status, _, err = run(capsys, "train")
    assert status == 2
    assert "required: LINE" in err
    with pytest.raises(SettingsError, match="init_from: a comparison trains every line from its own start"):
        CompareSettings(init_from=swapped)
