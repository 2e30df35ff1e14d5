"""Floor 8: distilling a model's KV cache, its attention outputs, hidden states and logits into another (document 004).

Names are looked up at first use: the settings, which the command line needs for its help, load no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.distill.aligner import MapProjectionAligner
    from headwise.distill.capture import Signals, match_of
    from headwise.distill.dimension import KVDimensionProjector
    from headwise.distill.head_map import HeadwiseMapProjector
    from headwise.distill.losses import StructuralKVLoss, create_structural_loss, kv_loss
    from headwise.distill.run import DistillResult, distill, distill_or_resume, resume
    from headwise.distill.settings import DistillSettings
    from headwise.distill.shape import KVShape
    from headwise.distill.stacking import flatten_kv_heads, stack_past_kv, unflatten_kv_heads
    from headwise.distill.teacher import Teacher
    from headwise.distill.time_warp import TimeWarper

# Public name → the module of this package that defines it.
_HOMES = {
    "DistillResult": "run",
    "DistillSettings": "settings",
    "HeadwiseMapProjector": "head_map",
    "KVDimensionProjector": "dimension",
    "KVShape": "shape",
    "MapProjectionAligner": "aligner",
    "Signals": "capture",
    "StructuralKVLoss": "losses",
    "Teacher": "teacher",
    "TimeWarper": "time_warp",
    "create_structural_loss": "losses",
    "distill": "run",
    "distill_or_resume": "run",
    "flatten_kv_heads": "stacking",
    "kv_loss": "losses",
    "match_of": "capture",
    "resume": "run",
    "stack_past_kv": "stacking",
    "unflatten_kv_heads": "stacking",
}

__all__ = [
    "DistillResult",
    "DistillSettings",
    "HeadwiseMapProjector",
    "KVDimensionProjector",
    "KVShape",
    "MapProjectionAligner",
    "Signals",
    "StructuralKVLoss",
    "Teacher",
    "TimeWarper",
    "create_structural_loss",
    "distill",
    "distill_or_resume",
    "flatten_kv_heads",
    "kv_loss",
    "match_of",
    "resume",
    "stack_past_kv",
    "unflatten_kv_heads",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headwise.distill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"headwise.distill.{_HOMES[name]}"), name)
