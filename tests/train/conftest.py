"""A corpus small enough that a whole run, evaluation included, takes a fraction of a second."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headwise.data import Dataset, load_dataset


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 8,000 characters of Shakespeare."""
    shakespeare = load_dataset("shakespeare", "char")
    path = tmp_path_factory.mktemp("corpus") / "small.txt"
    path.write_text(shakespeare.tokenizer.decode(shakespeare.train.array[:8000]))
    return path


@pytest.fixture(scope="session")
def dataset(text_file: Path) -> Dataset:
    return load_dataset(str(text_file), "char")
