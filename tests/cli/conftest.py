"""What the commands are tried on."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus that takes no time to train on."""
    path = tmp_path_factory.mktemp("corpus") / "small.txt"
    path.write_text("the head that is wise learns all lines. " * 150)
    return str(path)
