"""The code of the tutorials and of the README runs as it is printed, at small settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tutorial_blocks import blocks_of, changed
from warm import Run, start

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs" / "tutorials").glob("*.md")), ROOT / "README.md"]
PAGES += [
    ROOT / "docs/mechanisms/flash.md",
    ROOT / "docs/gguf.md",
    ROOT / "docs/generation.md",
    ROOT / "docs/published-models.md",
    ROOT / "docs/caches.md",
    ROOT / "docs/distillation.md",
    ROOT / "docs/distillation-runs.md",
    ROOT / "docs/quantisation.md",
    ROOT / "docs/segments.md",
]


def test_a_block_is_made_small() -> None:
    bash = changed("headwise compare a b --seeds 6 --batch-size 12\nls\n", "seeds=6→1, batch_size=12→3", "here")
    assert bash.startswith("headwise compare --size 20k ")
    assert bash.endswith(" a b --seeds 1 --batch-size 3\nls\n")
    python = changed("r = hw.train('a(b=c(2))', seed=6, batch_size=3)", "seed=6→7", "here")
    assert python == "r = hw.train('a(b=c(2))', seed=7, batch_size=3, size='20k', val_fraction=0.01)"
    with pytest.raises(AssertionError, match="no 'steps=300' to exchange"):
        changed("hw.train('a', steps=3000)", "steps=300→3", "here")


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with start(tmp_path_factory.mktemp("warm")) as run:
        yield run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, warm: Run, tmp_path: Path) -> None:
    blocks = blocks_of(page)
    if page.parent.name == "tutorials":
        assert blocks, "a tutorial has code"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path / "plugins"),  # where the page's own package is installed
        "HEADWISE_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    about = {"blocks": blocks, "page": str(page.relative_to(ROOT))}
    with (tmp_path / "output").open("wb+") as output:
        status = warm("blocks", about, output, cwd=tmp_path, environment=environment)
        output.seek(0)
        assert status == 0, output.read().decode()[-6000:]
