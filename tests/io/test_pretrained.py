"""Models on disk: the same logits back, and one clear line for every way a folder can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headwise.data import load_dataset, load_tokenizer
from headwise.errors import FormatError
from headwise.io.pretrained import load, save_pretrained
from headwise.model import build
from headwise.model.base import LanguageModel
from headwise.spec import parse

SMALL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 11, "max_seq_len": 8}
LINES = ["gpt2", "gpt2(tie_embeddings=False)", "llama(attention=gqa(kv_heads=1))", "bloom", "gemma", "transformer"]


def small(line: str = "gpt2", **more: Any) -> LanguageModel:
    return build(parse(line).replace(**SMALL), seed=3, **more).eval()


def logits(model: LanguageModel) -> torch.Tensor:
    ids = torch.arange(16).view(2, 8) % 11
    more = {"encoder_ids": ids.flip(1)} if model.spec.architecture == "encoder_decoder" else {}
    with torch.no_grad():
        return model(ids, **more)


@pytest.mark.parametrize("line", LINES)
def test_a_model_comes_back_with_the_same_logits(tmp_path: Path, line: str) -> None:
    model = small(line)
    save_pretrained(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.spec == model.spec
    assert not again.training
    assert torch.equal(logits(again), logits(model))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    save_pretrained(small(), tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert ("embedding.weight" in stored) != ("head.weight" in stored)
    again = load(tmp_path / "model")
    assert again.head.weight is again.embedding.weight


def test_the_dtype_is_kept_unless_another_is_asked_for(tmp_path: Path) -> None:
    save_pretrained(small(dtype=torch.bfloat16), tmp_path / "model")
    assert {p.dtype for p in load(tmp_path / "model").parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(tmp_path / "model", dtype=torch.float32).parameters()} == {torch.float32}


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    tokenizer = load_dataset("shakespeare", "char").tokenizer
    save_pretrained(small(), tmp_path / "model", tokenizer)
    again = load_tokenizer(tmp_path / "model" / "tokenizer")
    assert again.decode(again.encode("To be, or not")) == "To be, or not"


def test_an_earlier_model_is_replaced_whole_and_nothing_else_is(tmp_path: Path) -> None:
    save_pretrained(small(), tmp_path / "model", load_dataset("shakespeare", "char").tokenizer)
    save_pretrained(small("llama"), tmp_path / "model")
    assert load(tmp_path / "model").spec.preset == "llama"
    assert not (tmp_path / "model" / "tokenizer").exists()
    for foreign in ({"notes.txt": "mine"}, {"config.json": '{"model_type": "gpt2"}'}):
        folder = tmp_path / next(iter(foreign)).replace(".", "-")
        folder.mkdir()
        for name, content in foreign.items():
            (folder / name).write_text(content)
        with pytest.raises(FormatError, match="not empty and holds no model of headwise"):
            save_pretrained(small(), folder)
        assert [path.name for path in folder.iterdir()] == list(foreign)


def break_config(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**about, **changes}))

    return change


def break_tensors(change: Any) -> Any:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["stack.final_norm.weight"] = torch.zeros(3)


BREAKS: dict[str, tuple[Any, str]] = {
    "no folder": (shutil.rmtree, "is no folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "neither a model .* nor a training run"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "empty tensors": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged or no safetensors"),
    "cut tensors": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "damaged or no safetensors",
    ),
    "a pickle": (lambda f: torch.save({}, f / "model.safetensors"), "damaged or no safetensors"),
    "cut config": (lambda f: (f / "config.json").write_text('{"format": "head'), "damaged or no JSON"),
    "Hugging Face": (lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'), "'n_embd' is missing"),
    "neither": (lambda f: (f / "config.json").write_text('{"architectures": []}'), "not written by headwise"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
    "newer": (break_config(version=7), "version 7; this headwise reads up to 1: upgrade"),
    "no line": (break_config(line=None), "'line' is missing or no text"),
    "unknown line": (break_config(line="gpt9(d_model=16)"), "cannot be read by this headwise"),
    "another line": (break_config(line=str(small("llama").spec)), "does not fit its model: .* is missing"),
    "another shape": (break_tensors(reshape), r"has shape \(3,\), the model needs \(16,\)"),
    "one less": (break_tensors(lambda t: t.pop("stack.final_norm.weight")), "'stack.final_norm.weight' is missing"),
    "one more": (break_tensors(lambda t: t.update(extra=torch.zeros(1))), "'extra' is not part of the model"),
}


@pytest.mark.parametrize("how", BREAKS)
def test_every_broken_folder_is_a_format_error_of_one_line(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "model"
    save_pretrained(small(), folder)
    change, message = BREAKS[how]
    change(folder)
    with pytest.raises(FormatError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_training_run_loads_from_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    from headwise.train import train

    out, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text("If music be the food of love, play on. " * 9)
    quick = {"data": str(text), "seq_len": 8, "batch_size": 2, "steps": 3, "checkpoint_every": 1}
    trained = train("gpt2(d_model=16, n_layers=1, n_heads=2)", out=out, **quick).model
    assert torch.equal(logits(load(out)), logits(trained))
    (out / "checkpoints" / "step-000003" / "model.safetensors").write_bytes(b"")
    assert not torch.equal(logits(load(out)), logits(trained))
    (out / "checkpoints" / "step-000002" / "state.json").unlink()
    with pytest.raises(FormatError, match="training run without a whole checkpoint"):
        load(out)
