"""The commands on a GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import run, run_json


def test_show_prints_the_line_of_a_file(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (facts,) = run_json(capsys, "show", str(smollm2_path))
    assert facts["params"] == 134_515_008
    assert facts["resolved"].startswith("llama(d_model=576, n_layers=30, n_heads=9, vocab_size=49152")
    status, out, _ = run(capsys, "show", str(smollm2_path))
    assert status == 0
    assert facts["resolved"] in out


def test_generate_goes_on_from_a_prompt(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(
        capsys, "generate", str(smollm2_path), "--prompt", "The capital of France is", "--temperature", "0",
        "--max-new-tokens", "2",
    )  # fmt: skip
    assert status == 0, err
    assert out.startswith("The capital of France is Paris")


@pytest.mark.parametrize("command", ["show", "generate", "eval"])
def test_a_file_that_is_none_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF is not what this is")
    status, out, err = run(capsys, command, str(path))
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
