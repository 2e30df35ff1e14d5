"""Any decoder line as a Hugging Face folder with its own code: loaded where Headwise is not installed."""

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

import headwise as hw
from headwise.data.portable import portable
from headwise.data.tokenizers import ByteTokenizer
from headwise.errors import FormatError
from headwise.io.remote_code import save_with_code
from headwise.registry import ATTENTION

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
)


def save_case(line: str, folder: Path) -> None:
    """The folder, and beside it what the model itself computes."""
    model = hw.build(line, seed=3).eval()
    for p in model.parameters():
        p.data.mul_(3.0)  # far from ties in greedy decoding
    save_with_code(model, folder)
    ids = torch.randint(1, 40, (2, 11), generator=torch.Generator().manual_seed(0))
    greedy = ids
    with torch.inference_mode():
        logits = model(ids)
        for _ in range(N_NEW):
            greedy = torch.cat([greedy, model(greedy)[:, -1].argmax(-1, keepdim=True)], 1)
    save_file({"ids": ids, "logits": logits, "greedy": greedy}, folder / "expected.safetensors")


def test_a_line_runs_in_transformers_without_headwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits and loss, greedy decoding with and without cache and with padding, beams; a mechanism from a
    user's own file comes along. lm-eval takes the last of the folders with its tokenizer."""
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
        assert found.pop("type") == "HeadwiseForCausalLM"
        assert all(found.values()), (line, found)
    model = hw.build(lines[-1], seed=3).eval()
    for p in model.parameters():
        p.data.mul_(3.0)
    for (context, text), logprob in zip(pairs, answer["harness"]):
        ids = torch.tensor([TOKENIZER.encode(context + text).tolist()])
        with torch.inference_mode():
            logs = model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        assert logprob == pytest.approx(float(logs[-len(text) :].sum()), rel=1e-5)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    model = hw.build(f"llama({WIDTHS}, architecture=encoder)")
    with pytest.raises(FormatError, match="encoder lines have no place in AutoModelForCausalLM"):
        save_with_code(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
