"""A corpus and a teacher small enough that a distillation takes a fraction of a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwise.data import load_dataset
from headwise.train import train

TEACHER = "llama(d_model=16, n_layers=4, n_heads=4, attention=gqa(kv_heads=2))"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 4,000 characters of Shakespeare."""
    shakespeare = load_dataset("shakespeare", "char")
    path = tmp_path_factory.mktemp("corpus") / "small.txt"
    path.write_text(shakespeare.tokenizer.decode(shakespeare.train.array[:4000]))
    return path


@pytest.fixture(scope="session")
def teacher(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    train(TEACHER, data=str(text_file), out=out, seq_len=16, batch_size=8, steps=60, lr=1e-2, threads=1, eval_every=0)
    return out
