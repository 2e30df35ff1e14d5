"""Lines written as GGUF files: what the converter of llama.cpp writes of the same model, and what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from converted import Type, convert
from gguf import dequantize, quantize
from published_models import published
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import headwise as hw
from headwise.data import Tokenizer as OurTokenizer
from headwise.data import load_tokenizer
from headwise.data.portable import portable
from headwise.data.tokenizers import ByteTokenizer, CharTokenizer, train_bpe
from headwise.errors import FormatError
from headwise.io.gguf.export import TYPES, save_gguf
from headwise.io.gguf.header import Header, read_header
from headwise.io.gguf.tensors import read_tensor
from headwise.io.hf.folder import load_hf

KIN = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**KIN, "tie_word_embeddings": True}),
    "llama, biases": ("llama", {**KIN, "attention_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", {**KIN, "rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", {**KIN, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {**KIN, "head_dim": 16}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
}
SMALL = "vocab_size=300, max_seq_len=32, d_model=32, n_layers=1, n_heads=2"


def tensors(header: Header) -> dict[str, tuple[Type, torch.Tensor]]:
    return {name: (info.type, read_tensor(header, info, torch.float32)) for name, info in header.tensors.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_the_file_holds_what_the_converter_writes(case: str, kind: str, tmp_path: Path) -> None:
    model_type, config = CASES[case]
    peer = published(model_type, **config)
    peer.save_pretrained(tmp_path / "folder")
    module = load_hf(tmp_path / "folder")
    assert save_gguf(module, tmp_path / "ours.gguf", kind) == f"GGUF, {model_type} in {TYPES[kind].name}"
    ours, theirs = read_header(tmp_path / "ours.gguf"), read_header(convert(peer, tmp_path / "t.gguf", TYPES[kind]))
    here, there = tensors(ours), tensors(theirs)
    assert here.keys() == there.keys()
    for name, (type_there, values) in there.items():
        # Position tables stay as they are here: they are added once, and cost nothing.
        assert here[name][0] == (Type.F32 if name == "position_embd.weight" else type_there), name
        exact = here[name][0] == type_there and name != "rope_freqs.weight"
        assert torch.allclose(here[name][1], values, atol=0 if exact else 1e-2, rtol=0 if exact else 1e-6), name
    both = ours.values.keys() & theirs.values.keys()
    assert theirs.values.keys() - both <= {"gpt2.attention.head_count_kv"}
    assert {name: ours.values[name] for name in both} == {name: theirs.values[name] for name in both}
    assert hw.load(tmp_path / "ours.gguf").spec == module.spec


@pytest.mark.parametrize("kind", [None, *TYPES])
def test_weights_come_back_as_the_type_keeps_them(kind: str | None, tmp_path: Path) -> None:
    module = hw.build(f"llama({SMALL}, attention=gqa(kv_heads=1), ffn=swiglu(d_ff=64))")
    save_gguf(module, tmp_path / "model.gguf", kind)
    again = hw.load(tmp_path / "model.gguf")
    used = TYPES[kind or "f32"]
    for (name, mine), theirs in zip(module.named_parameters(), again.parameters(), strict=True):
        kept = mine.detach().numpy()
        if mine.dim() == 2:
            kept = dequantize(quantize(kept, used), used)
        assert np.array_equal(theirs.detach().float().numpy(), kept), name


@pytest.mark.parametrize(
    "line", [f"llama({SMALL})", f"gpt2({SMALL})".replace("len=32", "len=1024")]
)  # the one it knows
def test_transformers_reads_the_file(line: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = hw.build(line, seed=3).eval()
    save_gguf(module, tmp_path / "model.gguf", tokenizer=parts(train_bpe(["the head that is wise. " * 9], 300)))
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.randint(0, 300, (2, 20))
    with torch.no_grad():
        assert (peer(ids).logits - module(ids)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("llama(attention=w2)", r"no architecture that is written as GGUF \(llama, qwen2, qwen3, gpt2\) computes"),
        ("llama(attention=window(8))", "attention"),
        ("llama(position=rope(scaling=dynamic(4, original_max_position_embeddings=256)))", "position would be lost"),
        ("llama(position=alibi)", "position"),
        ("llama(d_model=36, n_heads=6, ffn=swiglu(d_ff=50))", None),
    ],
)
def test_a_line_that_llama_cpp_lacks_is_one_line_and_no_file(line: str, words: str | None, tmp_path: Path) -> None:
    module, path = hw.build(line), tmp_path / "model.gguf"
    if words is None:  # odd widths are none of the reasons: rows that no block fits are kept in half precision
        save_gguf(module, path, "q8_0")
        assert {info.type for info in read_header(path).tensors.values()} == {Type.F32, Type.F16}
        return
    with pytest.raises(FormatError, match=words) as failure:
        save_gguf(module, path)
    assert "\n" not in str(failure.value)
    assert list(tmp_path.iterdir()) == []


# ---- tokenizers ----


def parts(tokenizer: OurTokenizer) -> tuple[Tokenizer, dict[str, Any], tuple[int, ...]]:
    made = portable(tokenizer)
    return made.rust, made.config, made.eos_ids


TEXT = "the head that is wise,\n  learns 12 lines!\t"


@pytest.mark.parametrize(
    "tokenizer",
    [train_bpe([TEXT * 9], 300), ByteTokenizer(eos=True), ByteTokenizer(), CharTokenizer(TEXT, eos=True)],
    ids=["bpe", "byte, eos", "byte", "char"],
)
def test_tokenizers_come_back(tokenizer: OurTokenizer, tmp_path: Path) -> None:
    save_gguf(hw.build(f"llama({SMALL})"), tmp_path / "model.gguf", tokenizer=parts(tokenizer))
    again = load_tokenizer(tmp_path / "model.gguf")
    for text in (TEXT, "the the", "\n\n", "wise!!"):
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert again.decode(tokenizer.encode(text)) == text
    assert again.eos_ids == tokenizer.eos_ids
    assert again.vocab_size == 300  # filled up to the embedding's rows


def test_a_chat_model_comes_back_whole(smollm2_path: Path, tmp_path: Path) -> None:
    """The tokenizer of a published model, written into a file beside a small one of the same vocabulary."""
    tokenizer = load_tokenizer(smollm2_path)
    line = "llama(vocab_size=49152, max_seq_len=32, d_model=32, n_layers=1, n_heads=2, tie_embeddings=True)"
    save_gguf(hw.build(line), tmp_path / "model.gguf", "q8_0", parts(tokenizer))
    ours, theirs = (read_header(path).values for path in (tmp_path / "model.gguf", smollm2_path))
    for name in theirs.keys() & ours.keys():
        if name.startswith("tokenizer."):
            here, there = ours[name], theirs[name]
            assert plain(here) == plain(there), name
    assert theirs.keys() - ours.keys() <= {"tokenizer.ggml.add_space_prefix"} | {
        name for name in theirs if name.startswith(("general.", "llama."))
    }
    assert load_tokenizer(tmp_path / "model.gguf").state() == tokenizer.state()


def plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float) else list(value)


def _odd(**changed: Any) -> Tokenizer:
    rust = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], byte_fallback=changed.pop("fallback", False)))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, value in changed.items():
        setattr(rust, name, value)
    return rust


@pytest.mark.parametrize(
    ("rust", "words"),
    [
        (_odd(fallback=True), "of another kind"),
        (Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), r"another kind \(WordLevel\)"),
        (_odd(pre_tokenizer=pre_tokenizers.Whitespace()), "no name for how the tokenizer cuts"),
        (_odd(normalizer=normalizers.Lowercase()), "no name for how the tokenizer cuts"),
        (portable(CharTokenizer("aé")).rust, "the character 'é' is several of them"),
        (portable(CharTokenizer("\n ")).rust, "neither those nor a letter"),
        (train_bpe(["x"], 400).rust, None),
        (portable(CharTokenizer("".join(map(chr, range(32, 127))))).rust, "an id 94, and the model 50 tokens"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_llama_cpp_lacks_is_one_line(rust: Tokenizer, words: str | None, tmp_path: Path) -> None:
    module = hw.build("llama(vocab_size=50, max_seq_len=32, d_model=32, n_layers=1, n_heads=2)")
    with pytest.raises(FormatError, match=words or "the model 50 tokens") as failure:
        save_gguf(module, tmp_path / "model.gguf", tokenizer=(rust, {}, ()))
    assert "\n" not in str(failure.value)
    assert list(tmp_path.iterdir()) == []
