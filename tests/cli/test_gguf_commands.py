"""The commands on a GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import run, run_json

import headwise as hw
from headwise.data import load_tokenizer
from headwise.data.tokenizers import ByteTokenizer
from headwise.io.gguf.export import save_gguf


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


def test_export_writes_a_file_or_one_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = hw.build("llama(vocab_size=257, max_seq_len=32, d_model=32, n_layers=1, n_heads=2)")
    hw.save_pretrained(model, tmp_path / "model", ByteTokenizer(eos=True))
    source = str(tmp_path / "model")
    facts = run_json(capsys, "export", source, "--format", "gguf-q8_0", "--out", str(tmp_path / "a.gguf"))
    assert facts["saved_as"] == "GGUF, llama in Q8_0"
    assert facts["out"] == str(tmp_path / "a.gguf")
    run_json(capsys, "export", source, "--format", "gguf", "--out", str(tmp_path / "folder"))
    assert (tmp_path / "folder" / "model.gguf").is_file()
    again = hw.load(tmp_path / "folder")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert load_tokenizer(tmp_path / "a.gguf").eos_id == 256
    status, _, err = run(capsys, "export", source, "--format", "gguf", "--out", str(tmp_path / "a.gguf"))
    assert status == 2
    assert "exists and is not empty; choose another name" in err


def test_a_file_without_a_tokenizer_is_imported_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_gguf(hw.build("gpt2(vocab_size=50, max_seq_len=32, d_model=32, n_layers=1, n_heads=2)"), tmp_path / "a.gguf")
    facts = run_json(capsys, "import", str(tmp_path / "a.gguf"), "--out", str(tmp_path / "folder"))
    assert facts["tokenizer"] is None
    assert "tokenizer.ggml.model" in facts["no_tokenizer"]
    assert hw.load(tmp_path / "folder").spec.vocab_size == 50
