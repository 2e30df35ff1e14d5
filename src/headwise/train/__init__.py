"""Floor 7: training with exact resume.

Names are looked up at first use: the settings, which the command line needs for its help, load no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.train.evaluation import EvalResult, evaluate
    from headwise.train.loop import TrainResult, resume, train, train_or_resume
    from headwise.train.settings import TrainSettings

__all__ = ["EvalResult", "TrainResult", "TrainSettings", "evaluate", "resume", "train", "train_or_resume"]

_HOMES = {
    "EvalResult": "evaluation",
    "TrainResult": "loop",
    "TrainSettings": "settings",
    "evaluate": "evaluation",
    "resume": "loop",
    "train": "loop",
    "train_or_resume": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headwise.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"headwise.train.{_HOMES[name]}"), name)
