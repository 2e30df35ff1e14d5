"""What Hugging Face folders come as: shards, half precision, heads stored twice or not at all, older words; and what
they are mapped, converted and refused as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published_models import check_comes_back, check_family, check_same, published, reread, some_ids
from safetensors.torch import load_file, save_file

import headwise as hw
from headwise.errors import FormatError
from headwise.io.hf.export import save_hf
from headwise.io.pretrained import saved_spec

GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def change_config(folder: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in remove}
    (folder / "config.json").write_text(json.dumps({**kept, **changes}))


def change_tensors(folder: Path, change: Any) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors), folder / "model.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
        {"activation_function": "relu", "n_head": 1},
    ],
    ids=["plain", "untied, narrow, exact", "one head"],
)
def test_gpt2_computes_the_same_and_comes_back(config: dict[str, Any], tmp_path: Path) -> None:
    check_family(tmp_path, "gpt2", **{**GPT2, **config})


def test_shards_are_one_model(tmp_path: Path) -> None:
    peer = published("llama", **LLAMA)
    peer.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    check_same(peer, hw.load(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    published("llama", **LLAMA).to(dtype).save_pretrained(tmp_path / "theirs")
    peer = reread(tmp_path / "theirs")
    ours = hw.load(tmp_path / "theirs")
    assert {p.dtype for p in ours.parameters()} == {dtype}
    check_comes_back(peer, ours, tmp_path / "ours")
    check_same(peer.float(), hw.load(tmp_path / "theirs", dtype=torch.float32))


def test_a_folder_of_several_precisions_gets_the_one_of_most_numbers(tmp_path: Path) -> None:
    published("llama", **LLAMA).to(torch.bfloat16).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda t: {n: x.float() if "norm" in n else x for n, x in t.items()})
    assert {p.dtype for p in hw.load(tmp_path).parameters()} == {torch.bfloat16}


def test_a_tied_head_may_be_stored_or_not_but_must_be_the_embedding(tmp_path: Path) -> None:
    peer = published("llama", **LLAMA, tie_word_embeddings=True)
    peer.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    check_same(peer, hw.load(tmp_path))
    change_tensors(tmp_path, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    model = hw.load(tmp_path)
    check_same(peer, model)
    assert model.head.weight is model.embedding.weight
    change_tensors(tmp_path, lambda t: {**t, "lm_head.weight": 2 * t["lm_head.weight"]})
    with pytest.raises(FormatError, match=r"ties the head.*'lm_head.weight'.*differ; write \"tie_word_embeddings\": f"):
        hw.load(tmp_path)
    change_config(tmp_path, tie_word_embeddings=False)
    assert hw.load(tmp_path).head.weight is not hw.load(tmp_path).embedding.weight


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    published("llama", **LLAMA).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda t: {name: x for name, x in t.items() if name != "lm_head.weight"})
    with pytest.raises(FormatError, match=r"'lm_head.weight' is missing"):
        hw.load(tmp_path)


def test_the_bare_model_and_its_masks_are_read(tmp_path: Path) -> None:
    """OpenAI's own folder of GPT-2: names without their beginning, and tables that are no weights."""
    peer = published("gpt2", **GPT2)
    peer.save_pretrained(tmp_path)

    def bare(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        masks = {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64).tril() for n in range(2)}
        return {name.removeprefix("transformer."): x for name, x in tensors.items()} | masks

    change_tensors(tmp_path, bare)
    check_same(peer, hw.load(tmp_path))


OLD_WORDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "llama3": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "none": {"rope_scaling": None, "head_dim": None, "num_key_value_heads": None},
}


@pytest.mark.parametrize("words", OLD_WORDS)
def test_configs_of_older_versions_mean_what_transformers_takes_them_for(words: str, tmp_path: Path) -> None:
    published("llama", **LLAMA).save_pretrained(tmp_path)
    change_config(tmp_path, remove=("rope_parameters",), **OLD_WORDS[words])
    check_same(reread(tmp_path), hw.load(tmp_path))


def test_weights_are_mapped_and_writing_to_them_leaves_the_file_alone(tmp_path: Path) -> None:
    save_hf(hw.build("llama(d_model=64, n_layers=1, n_heads=2, vocab_size=8192)"), tmp_path)  # an embedding of 2 MiB
    before = (tmp_path / "model.safetensors").read_bytes()
    model = hw.load(tmp_path)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "model.safetensors") in maps.read_text()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_nan_is_found_on_request(tmp_path: Path) -> None:
    published("llama", **LLAMA).save_pretrained(tmp_path)
    hw.load(tmp_path, check=True)
    change_tensors(tmp_path, lambda t: {name: x.log() if "1.mlp.up_proj" in name else x for name, x in t.items()})
    hw.load(tmp_path)
    with pytest.raises(FormatError, match=r"NaN or infinite weights, in 'stack.blocks.1.ffn.w_up.weight'"):
        hw.load(tmp_path, check=True)


# ---- lines of ours as published classes ----


@pytest.mark.parametrize(
    ("line", "architecture"),
    [
        ("llama(attention=gqa(kv_heads=2), ffn=swiglu(d_ff=40))", "LlamaForCausalLM"),
        ("llama(bias=true, attention=softmax(head_dim=6), ffn=geglu_tanh)", "LlamaForCausalLM"),
        ("llama(attention=window(9), tie_embeddings=true)", "MistralForCausalLM"),
        ("mistral(attention=softmax)", "MistralForCausalLM"),
        ("gpt2(ffn=mlp(relu))", "GPT2LMHeadModel"),
        ("qwen3(attention=pattern(window(4, qk_norm=true), softmax(qk_norm=true)))", "Qwen3ForCausalLM"),
        ("gemma(n_layers=2)", "GemmaForCausalLM"),
    ],
)
def test_a_line_is_saved_as_the_class_that_computes_it(line: str, architecture: str, tmp_path: Path) -> None:
    spec = hw.parse(line).replace(d_model=16, n_layers=2, n_heads=2, vocab_size=61, max_seq_len=64)
    model = hw.build(spec, seed=1).eval()
    assert save_hf(model, tmp_path / "model") == architecture
    peer = reread(tmp_path / "model")
    assert type(peer).__name__ == architecture
    with torch.no_grad():
        torch.testing.assert_close(model(some_ids()), peer(some_ids()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("llama(attention=w2)", "attention w2, not softmax"),
        ("llama(ffn=vft(rank=4))", "ffn is vft"),
        ("llama(norm=layernorm)", "norm is layernorm"),
        ("llama(position=alibi)", "position is alibi"),
        ("llama(order=sandwich)", "order sandwich, not pre"),
        ("llama(attention=pattern(softmax, softmax(softcap=3.0)))", "softcap=3.0"),
        ("llama(position=rope(scaling=ntk(2)))", "ntk"),
        ("transformer", "encoder_decoder"),
    ],
)
def test_a_line_of_no_family_is_refused_by_what_it_is(line: str, reason: str, tmp_path: Path) -> None:
    spec = hw.parse(line).replace(d_model=16, n_layers=2, n_heads=2, vocab_size=61, max_seq_len=64)
    with pytest.raises(FormatError, match=f"no family of Hugging Face models computes .*{reason}") as caught:
        save_hf(hw.build(spec), tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_a_saved_model_of_ours_is_what_its_export_is(tmp_path: Path) -> None:
    model = hw.build("llama(d_model=16, n_layers=2, n_heads=2)", seed=3).eval()
    save_hf(model, tmp_path)
    again = hw.load(tmp_path)
    assert saved_spec(tmp_path) == again.spec
    ids = some_ids()
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))
