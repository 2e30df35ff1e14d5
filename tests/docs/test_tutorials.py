"""The code of the tutorials and of the README runs as it is printed, at small settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tutorial_blocks import blocks_of, changed

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


RUN = f"""
import json, sys
sys.path.insert(1, {str(Path(__file__).parent)!r})
from tutorial_blocks import run
sys.exit(run(**json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, warm: Path, tmp_path: Path) -> None:
    blocks = blocks_of(page)
    if page.parent.name == "tutorials":
        assert blocks, "a tutorial has code"
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(warm), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(tmp_path / "plugins"),  # where the page's own package is installed
        "HEADWISE_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    about = {"blocks": blocks, "page": str(page.relative_to(ROOT))}
    with (tmp_path / "output").open("wb+") as output:
        done = subprocess.run(
            [warm / "python", "-c", RUN, json.dumps(about)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=tmp_path, env=environment, timeout=600,
        )  # fmt: skip
        output.seek(0)
        assert done.returncode == 0, output.read().decode()[-6000:]
