"""Any line as a Hugging Face folder with its own code: loaded where Headwise is not installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import headwise as hw
from headwise.data import Batch
from headwise.data.portable import portable
from headwise.data.tokenizers import ByteTokenizer
from headwise.errors import FormatError
from headwise.generate.decode import stream_ids
from headwise.io.remote_code import save_with_code
from headwise.model.base import LanguageModel
from headwise.registry import ATTENTION
from headwise.train.objective import loss_sum, second_half

CHECK = Path(__file__).with_name("remote_code_check.py")
N_NEW = 6
TOKENIZER = ByteTokenizer(eos=True)
WIDTHS = "d_model=32, n_layers=2, n_heads=4, vocab_size=40, max_seq_len=64"
LINES = (
    f"llama({WIDTHS}, attention=w2)",
    f"llama({WIDTHS}, attention=pattern(window(5), softmax), ffn=vft(rank=4), tie_embeddings=true)",
    f"gpt2({WIDTHS}, attention=gated_deltanet)",
    f"bloom({WIDTHS}, ffn=moe(4, 2, d_ff=16))",
    f"llama({WIDTHS}, attention=mla)",
    f"llama({WIDTHS}, attention=tva(rank=4))",
    f"gpt1({WIDTHS}, architecture=encoder)",
    f"bloom({WIDTHS}, architecture=encoder)",
    f"llama({WIDTHS}, architecture=encoder, attention=pattern(window(5), gated_deltanet))",
    f"transformer({WIDTHS})",
    f"llama({WIDTHS}, architecture=encoder_decoder, n_encoder_layers=1, attention=pattern(mla, linear))",
)
CLASSES = {
    "decoder": "HeadwiseForCausalLM",
    "encoder": "HeadwiseForMaskedLM",
    "encoder_decoder": "HeadwiseForSeq2SeqLM",
}


def save_case(line: str, folder: Path) -> None:
    """The folder, and beside it what the model itself computes."""
    model = hw.build(line, seed=3).eval()
    for p in model.parameters():
        p.data.mul_(3.0)  # far from ties in greedy decoding
    assert save_with_code(model, folder) == CLASSES[model.spec.architecture]
    expected = {"decoder": of_decoder, "encoder": of_encoder, "encoder_decoder": of_encoder_decoder}
    tensors = expected[model.spec.architecture](model)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "expected.safetensors")


def drawn(length: int) -> Tensor:
    return torch.randint(1, 40, (2, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def of_decoder(model: LanguageModel) -> dict[str, Tensor]:
    ids = greedy = drawn(11)
    for _ in range(N_NEW):
        greedy = torch.cat([greedy, model(greedy)[:, -1].argmax(-1, keepdim=True)], 1)
    return {"ids": ids, "logits": model(ids), "greedy": greedy}


@torch.inference_mode()
def of_encoder(model: LanguageModel) -> dict[str, Tensor]:
    """`short`: the second row's first 7 tokens alone."""
    ids = drawn(11)
    return {"ids": ids, "logits": model(ids), "short": model(ids[1:, :7])}


@torch.inference_mode()
def of_encoder_decoder(model: LanguageModel) -> dict[str, Tensor]:
    """An example of the training objective; `short`: the second row with only the first 7 tokens read. Greedy texts
    follow the first row's and those 7 tokens."""
    window = drawn(23)
    example = second_half(Batch(window[:, :-1], window[:, 1:]), 0)
    read, ids = example.encoder_ids_BS, example.ids_BT
    assert read is not None
    prompts = [read[0].tolist(), read[1, :7].tolist()]
    return {
        "read": read,
        "ids": ids,
        "labels": example.targets_BT,
        "loss": loss_sum(model, example) / example.count(),
        "logits": model(ids, encoder_ids=read),
        "short": model(ids[1:], encoder_ids=read[1:, :7]),
        "greedy": torch.tensor([list(stream_ids(model, p, max_new_tokens=N_NEW, temperature=0)) for p in prompts]),
    }


def test_a_line_runs_in_transformers_without_headwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits and loss, padding that changes nothing, greedy decoding with and without cache, beams; a
    mechanism from a user's own file comes along. lm-eval takes the last of the folders with its tokenizer, Trainer
    takes an encoder–decoder's."""
    own = tmp_path / "my_mechanisms.py"
    own.write_text(OWN_MECHANISM, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("my_mechanisms", own)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_mechanisms", module)
    ATTENTION.list()
    monkeypatch.setattr(ATTENTION, "_entries", dict(ATTENTION._entries))
    spec.loader.exec_module(module)

    lines = [*LINES, f"llama({WIDTHS.replace('vocab_size=40', 'vocab_size=257')}, attention=halved(factor=0.3))"]
    folders = [str(tmp_path / str(n)) for n in range(len(lines))]
    for line, folder in zip(lines, folders):
        save_case(line, Path(folder))
    with_tokenizer = Path(folders[-1])
    portable(TOKENIZER).save(with_tokenizer)
    pairs = [("The capital of", " France"), ("a", "bc de")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, CHECK, *folders, json.dumps(pairs)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    for line, found in zip(lines, answer["checks"]):
        assert found.pop("type") == CLASSES[hw.parse(line).architecture]
        assert all(found.values()), (line, found)
    assert answer["accumulates"]
    model = hw.build(lines[-1], seed=3).eval()
    for p in model.parameters():
        p.data.mul_(3.0)
    for (context, text), logprob in zip(pairs, answer["harness"]):
        ids = torch.tensor([TOKENIZER.encode(context + text).tolist()])
        with torch.inference_mode():
            logs = model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        assert logprob == pytest.approx(float(logs[-len(text) :].sum()), rel=1e-5)


def test_a_mechanism_without_a_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ATTENTION.list()
    monkeypatch.setattr(ATTENTION, "_entries", dict(ATTENTION._entries))
    typed_in = ModuleType("typed_in")
    monkeypatch.setitem(sys.modules, "typed_in", typed_in)
    exec(OWN_MECHANISM, typed_in.__dict__)
    with pytest.raises(FormatError, match="whose source cannot be read; put it into a file"):
        save_with_code(hw.build(f"llama({WIDTHS}, attention=halved)"), tmp_path / "out")


OWN_MECHANISM = '''
"""Attention with a factor on its output."""

from __future__ import annotations

from typing import Literal

import headwise as hw
from headwise.attention import Attention, AttentionSpec


class HalvedSpec(AttentionSpec):
    """Softmax attention times a factor."""

    kind: Literal["halved"] = "halved"
    factor: float = 0.5


@hw.register_attention(HalvedSpec)
class HalvedAttention(Attention):
    """Text that is hard to quote: \\'\\'\\' and \\\\n."""

    def attend(self, *args):
        y, weights = super().attend(*args)
        return self.spec.factor * y, weights
'''
