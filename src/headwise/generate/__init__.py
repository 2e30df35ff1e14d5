"""Floor 7: text from a trained model.

Names are looked up at first use: the scheduler loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.generate.batch import complete_batch
    from headwise.generate.decode import complete, generate, stream_ids
    from headwise.generate.request import Generation, Request, TokenLogprob
    from headwise.generate.sampling import History, Sampling
    from headwise.generate.session import Session

__all__ = [
    "Generation",
    "History",
    "Request",
    "Sampling",
    "Session",
    "TokenLogprob",
    "complete",
    "complete_batch",
    "generate",
    "stream_ids",
]

_HOMES = {
    "Generation": "request",
    "History": "sampling",
    "Request": "request",
    "Sampling": "sampling",
    "Session": "session",
    "TokenLogprob": "request",
    "complete": "decode",
    "complete_batch": "batch",
    "generate": "decode",
    "stream_ids": "decode",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headwise.generate' has no attribute {name!r}")
    return getattr(importlib.import_module(f"headwise.generate.{_HOMES[name]}"), name)
