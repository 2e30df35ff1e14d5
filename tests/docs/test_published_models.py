"""The page of published models lists the families that there are, with their classes."""

from __future__ import annotations

import re
from pathlib import Path

from headwise.io.hf import families

PAGE = Path(__file__).parents[2] / "docs" / "published-models.md"


def test_every_family_has_its_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows) == {name: family.architecture for name, family in families().items()}
