"""A real model out of a GGUF file (SmolLM2-135M-Instruct, Q4_1), against transformers' reading of the same file."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import headwise as hw
from headwise.data import Tokenizer, load_tokenizer
from headwise.data.chat import render_chat
from headwise.model.base import LanguageModel

# Prose, digits, code, other scripts: words of the file's own tokenizer, whatever becomes of them.
TEXT = """\
The capital of France is Paris. It lies on the Seine, and some 2,102,650 people lived there in 2023; around it, eleven
million. "Where is it?" she asked. — Là-bas, où la rivière tourne… 東京は日本の首都です。Москва — столица России. 🦙

def area(radius: float) -> float:
\treturn 3.14159 * radius ** 2  # not exact

A water molecule has two hydrogen atoms and one oxygen atom. When it is heated to 100 °C, water boils and becomes steam.
Every evening the old man walked down to the harbour to see the boats come in, and every evening he came back alone.
"""


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> LanguageModel:
    return hw.load(smollm2_path)


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def peer(smollm2_path: Path) -> Any:
    import gguf
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):  # it reads the file twice, and makes the map for each module
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        return AutoModelForCausalLM.from_pretrained(
            smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
        ).eval()


@pytest.fixture(scope="module")
def ids(tokenizer: Tokenizer) -> Tensor:
    return torch.from_numpy(tokenizer.encode(TEXT))[None]


@torch.no_grad()
def losses(logits_1TV: Tensor, ids: Tensor) -> Tensor:
    """The loss of each token after the first, in float64 [T−1]."""
    return F.cross_entropy(logits_1TV[0, :-1].double(), ids[0, 1:], reduction="none")


def test_the_line_is_the_published_one(smollm2_path: Path, model: LanguageModel) -> None:
    assert str(model.spec) == (
        "llama(d_model=576, n_layers=30, n_heads=9, vocab_size=49152, max_seq_len=8192, "
        "attention=softmax(kv_heads=3), position=rope(base=100000.0), norm=rmsnorm(eps=1e-05), "
        "ffn=swiglu(d_ff=1536), tie_embeddings=True)"
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


@torch.no_grad()
def test_it_knows_the_capital_of_france(model: LanguageModel, tokenizer: Tokenizer) -> None:
    prompt = torch.from_numpy(tokenizer.encode("The capital of France is"))[None]
    assert tokenizer.decode([int(model(prompt)[0, -1].argmax())]) == " Paris"


def test_weights_are_to_the_bit_what_transformers_reads(peer: Any, model: LanguageModel) -> None:
    """Queries and keys too, whose rows both put back from llama.cpp's order."""
    for theirs, ours in {
        "model.embed_tokens": "embedding",
        "model.layers.0.self_attn.q_proj": "stack.blocks.0.attention.wq",
        "model.layers.29.self_attn.k_proj": "stack.blocks.29.attention.wk",
        "model.layers.7.mlp.down_proj": "stack.blocks.7.ffn.w_out",
        "model.norm": "stack.final_norm",
    }.items():
        assert torch.equal(model.get_parameter(f"{ours}.weight"), peer.get_parameter(f"{theirs}.weight")), ours


@torch.no_grad()
def test_logits_and_losses_are_those_of_transformers(peer: Any, model: LanguageModel, ids: Tensor) -> None:
    theirs, ours = peer(ids).logits, model(ids)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert (losses(ours, ids) - losses(theirs, ids)).abs().max() <= 1e-4  # 1e-3 is asked for
    assert 2.5 < losses(ours, ids).mean() < 4  # a model that reads, not noise: nearly 11 nats


def test_tokens_are_those_of_transformers(smollm2_path: Path, tokenizer: Tokenizer) -> None:
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

    # What AutoTokenizer.from_pretrained(…, gguf_file=…) does, without reading the file three times.
    architecture, values, config = get_gguf_tokenizer(str(smollm2_path))
    theirs = PreTrainedTokenizerFast(tokenizer_object=convert_gguf_tokenizer(architecture, values)[0], **config)
    chat = [{"role": "user", "content": "Who are you?"}]
    rendered = render_chat(tokenizer.chat_template or "", chat)
    assert rendered == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for text in (TEXT, *TEXT.split(), rendered, "  a\n\n\tb  ", "a<|im_end|>b"):
        wanted = theirs.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, special=True).tolist() == wanted
        assert tokenizer.decode(wanted) == theirs.decode(wanted, skip_special_tokens=True)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_ids == (theirs.eos_token_id, theirs.convert_tokens_to_ids("<|endoftext|>"))
    assert tokenizer.special_tokens == {name: getattr(theirs, name) for name in ("bos_token", "eos_token", "pad_token")}
    assert tokenizer.begin_ids == ()
