"""import and export, and the other commands on a published model as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import run, run_json

import headwise as hw
from headwise.data import load_tokenizer
from headwise.data.tokenizers import train_bpe
from headwise.exchange import FORMATS, export_model
from headwise.io.hf.export import save_hf

TEXT = "If music be the food of love, play on; give me excess of it. " * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer, as others publish theirs."""
    root = tmp_path_factory.mktemp("published")
    tokenizer = train_bpe([TEXT], 280)
    model = hw.build(f"llama(d_model=32, n_layers=2, n_heads=2, max_seq_len=64, vocab_size={tokenizer.vocab_size})")
    save_hf(model, root / "model", tokenizer.special_ids)
    tokenizer.save(root / "model")
    (root / "model" / "headwise_tokenizer.json").unlink()
    (root / "text.txt").write_text(TEXT)
    return root / "model"


def same_weights(one: Path, other: Path) -> bool:
    pair = (hw.load(one).state_dict(), hw.load(other).state_dict())
    return all(torch.equal(a, b) for a, b in zip(*(each.values() for each in pair), strict=True))


def test_show_prints_the_line_beside_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run_json(capsys, "show", str(folder), "llama(d_model=32, n_layers=2, n_heads=2)")
    assert first["resolved"].startswith("llama(d_model=32, n_layers=2, n_heads=2, vocab_size=2")
    assert first["params_by_part"]["attention"] == second["params_by_part"]["attention"]


def test_import_and_export_lose_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, out = tmp_path / "ours", tmp_path / "out"
    facts = run_json(capsys, "import", str(folder), "--out", str(ours), "--check")
    assert facts["line"] == str(hw.load(folder).spec)
    assert facts["params"] == sum(p.numel() for p in hw.load(folder).parameters())
    assert json.loads((ours / "config.json").read_text())["format"] == "headwise-model"
    status, told, err = run(capsys, "export", str(ours), "--out", str(out))
    assert status == 0, err
    assert "saved as LlamaForCausalLM" in told
    assert same_weights(folder, ours)
    assert same_weights(folder, out)
    files = [load_tokenizer(path) for path in (folder, ours, out)]
    assert len({tokenizer.fingerprint for tokenizer in files if not setattr(tokenizer, "kind", "hf")}) == 1
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == files[0].eos_id


def test_import_can_change_the_precision(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_json(capsys, "import", str(folder), "--out", str(tmp_path / "half"), "--dtype", "bfloat16")
    assert {p.dtype for p in hw.load(tmp_path / "half").parameters()} == {torch.bfloat16}


def test_weights_without_a_tokenizer_come_along_and_it_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_hf(hw.load(folder), tmp_path / "bare")
    status, told, _ = run(capsys, "import", str(tmp_path / "bare"), "--out", str(tmp_path / "out"))
    assert status == 0
    assert "tokenizer: none (no tokenizer in" in told


def test_commands_take_the_folder_as_it_is(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(folder.parent / "text.txt")]
    before = run_json(capsys, "eval", str(folder), *data)["nats"]
    assert run_json(capsys, "generate", str(folder), "--prompt", "If music", "--max-new-tokens", "3")["text"]
    swapped = run_json(
        capsys, "swap", str(folder), *data, "--attention", "gqa(kv_heads=1)", "--out", str(tmp_path / "swapped")
    )
    assert swapped["val_loss_before"] == pytest.approx(before, rel=1e-6)
    trained = run_json(
        capsys, "train", "--init-from", str(folder), *data, "--steps", "30", "--batch-size", "4", "--seq-len", "32",
        "--lr", "3e-3", "--out", str(tmp_path / "trained"),
    )  # fmt: skip
    assert trained["val_loss"] < before
    assert load_tokenizer(tmp_path / "trained").vocab_size == load_tokenizer(folder).vocab_size


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["export", "MODEL", "--format", "onnx", "--out", "NEW"], 2, "unknown format 'onnx'; allowed: gguf, "),
        (["export", "MODEL", "--out", "MODEL"], 2, "exists and is not empty; choose another"),
        (["import", "MODEL", "--out", "MODEL"], 2, "exists and is not empty; choose another"),
        (["import", "NEW", "--out", "NEW"], 1, "is no folder; give the folder of a model"),
        (["show", "NEW"], 1, "is no folder; give the folder of a model"),
        (["show", "EMPTY"], 1, "holds neither a model"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], status: int, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"MODEL": str(folder), "NEW": str(tmp_path / "new"), "EMPTY": str(tmp_path / "empty")}
    given, out, err = run(capsys, *(places.get(word, word) for word in argv))
    assert (given, out) == (status, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("line", "why", "saved_as"),
    [
        ("llama(attention=tva(rank=4))", "attention tva", "HeadwiseForCausalLM"),
        ("gpt1(architecture=encoder)", "it is an encoder", "HeadwiseForMaskedLM"),
        ("transformer", "it is an encoder_decoder", "HeadwiseForSeq2SeqLM"),
    ],
)
def test_a_line_of_no_class_goes_out_with_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, why: str, saved_as: str
) -> None:
    spec = hw.parse(line).model_copy(update={"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 30})
    hw.save_pretrained(hw.build(spec), tmp_path / "model")
    with pytest.raises(hw.HeadwiseError, match=rf"no family of Hugging Face models computes .*{why}"):
        export_model(tmp_path / "model", tmp_path / "out")
    moved = export_model(tmp_path / "model", tmp_path / "out", format="hf-code")
    assert moved.saved_as == f"{saved_as}, with its code"
    assert same_weights(tmp_path / "model", tmp_path / "out")
    (shown,) = run_json(capsys, "show", str(tmp_path / "out"))
    assert shown["resolved"] == moved.line
    assert set(FORMATS) >= {"hf", "hf-code"}
