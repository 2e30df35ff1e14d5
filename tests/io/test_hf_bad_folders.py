"""Folders that are not whole, or ask for what we lack: one line each, with the path, what is wrong and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import headwise as hw
from headwise.errors import FormatError
from headwise.io.hf.export import save_hf
from headwise.io.pretrained import saved_spec

Change = Callable[[Path], Any]
LINE = "llama(d_model=16, n_layers=2, n_heads=2, vocab_size=17, max_seq_len=32)"


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({n: v for n, v in values.items() if v != "gone"}))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def change(folder: Path) -> None:
        held = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        edit(held)
        save_file(held, folder / "model.safetensors")

    return change


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sharded(folder: Path, **places: str) -> None:
    held = load_file(folder / "model.safetensors")
    names = sorted(held)
    (folder / "model.safetensors").unlink()
    for n, part in enumerate((names[::2], names[1::2])):
        save_file({name: held[name] for name in part}, folder / f"part-{n}.safetensors")
    found = {name: f"part-{n % 2}.safetensors" for n, name in enumerate(names)} | places
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": found}))


def without_a_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "part-1.safetensors").unlink()


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


UP = "model.layers.1.mlp.up_proj.weight"
BREAKS: dict[str, tuple[Change, str]] = {
    "cut": (cut, r"model.safetensors is damaged .*its header describes \d[\d,]+ bytes of tensors, and it holds"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights: model.safetensors or"),
    "a pickle alone": (
        only_pickle,
        "weights in pytorch_model.bin, and only safetensors and GGUF are opened; w",
    ),
    "a tensor less": (tensors(lambda t: t.pop(UP)), f"'{UP}' is missing"),
    "a tensor more": (tensors(lambda t: t.update({"more.weight": torch.ones(2)})), "'more.weight' is not part of the"),
    "another shape": (
        tensors(lambda t: t.update({UP: torch.ones(3, 16)})),
        rf"'{UP}' has shape \(3, 16\), the model needs \(48, 16\)",
    ),
    "whole numbers": (tensors(lambda t: t.update({UP: t[UP].to(torch.int8)})), f"'{UP}' holds int8"),
    "more layers than tensors": (config(num_hidden_layers=900), "describes 900 layers, and the files hold 21 tensors"),
    "a larger model": (config(vocab_size=99_999), r"describes a model of 3,20\d,\d+ parameters, and the files hold"),
    "no such shard": (without_a_shard, "part-1.safetensors is missing"),
    "a shard elsewhere": (
        lambda f: sharded(f, **{UP: "../part-0.safetensors"}),
        rf"'{UP}' lies in '../part-0.safetensors', and should in a .safetensors file of this folder",
    ),
    "in another shard": (
        lambda f: sharded(f, **{"lm_head.weight": "part-1.safetensors"}),
        "part-0.safetensors holds 'lm_head.weight', which model.safetensors.index.json does not place there",
    ),
    "a missing size": (config(hidden_size="gone"), "config.json: 'hidden_size' is missing"),
    "a size of text": (config(hidden_size="16"), "'hidden_size' should be a whole number, not '16'"),
    "no heads": (config(num_attention_heads=0), "'num_attention_heads' should be from 1 to"),
    "heads that do not fit": (
        config(num_key_value_heads=3),
        "describes no model: attention.kv_heads: 3 does not",
    ),
    "an unknown family": (
        config(model_type="lama"),
        r"unknown model_type 'lama' \(did you mean 'llama'\?\); allowed: ",
    ),
    "an unknown activation": (config(hidden_act="tanh"), "hidden_act: unknown value 'tanh'.*allowed: gelu"),
    "an unknown scaling": (
        config(rope_scaling={"rope_type": "ntk-aware", "factor": 2}),
        "asks for the RoPE scaling 'ntk-aware'; supported: linear",
    ),
    "a scaling without factor": (config(rope_scaling={"rope_type": "linear"}), "scaling.*factor: missing"),
    "quantised": (
        config(quantization_config={"bits": 4}),
        "asks for quantised weights; open the folder of",
    ),
    "another head": (
        config(architectures=["LlamaForSequenceClassification"]),
        "'LlamaForSequenceClassification'; only",
    ),
}


@pytest.mark.parametrize("how", BREAKS)
def test_every_broken_folder_is_a_format_error_of_one_line(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_hf(hw.build(LINE), folder)
    change, message = BREAKS[how]
    change(folder)
    with pytest.raises(FormatError, match=message) as caught:
        hw.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


LACKED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2 cross": ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
    "gpt2 by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    "gemma two ways": ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    "qwen chunks": (
        "qwen3",
        {"layer_types": ["chunked_attention"] * 28},
        "'layer_types' should be sliding_attention or",
    ),
    "pictures": ("gemma3", {}, "asks for a model of pictures or sound too; only models of text"),
}


@pytest.mark.parametrize("what", LACKED)
def test_what_we_lack_is_named(what: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    model_type, changes, message = LACKED[what]
    values = AutoConfig.for_model(model_type).to_dict()
    if "num_hidden_layers" in values:
        values["num_hidden_layers"] = 28
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(FormatError, match=message):
        saved_spec(tmp_path)
