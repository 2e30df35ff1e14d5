"""Distillation A/B: arms, several seeds each, judged as a comparison judges lines.

Names are looked up at first use: results can be read, judged and drawn without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.lab.ab.pair import compare_runs
    from headwise.lab.ab.result import ABResult
    from headwise.lab.ab.run import ab, resume_ab
    from headwise.lab.ab.settings import ABSettings

__all__ = ["ABResult", "ABSettings", "ab", "compare_runs", "resume_ab"]

_HOMES = {"ABResult": "result", "ABSettings": "settings", "ab": "run", "compare_runs": "pair", "resume_ab": "run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headwise.lab.ab' has no attribute {name!r}")
    return getattr(importlib.import_module(f"headwise.lab.ab.{_HOMES[name]}"), name)
