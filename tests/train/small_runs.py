"""A model and settings with which a whole run takes a fraction of a second."""

from __future__ import annotations

from typing import Any

LINE = "gpt2(d_model=16, n_layers=2, n_heads=2)"
LINE_WITH_DROPOUT = "gpt2(d_model=16, n_layers=2, n_heads=2, dropout=0.2)"
QUICK: dict[str, Any] = {
    "threads": 1,
    "seq_len": 16,
    "batch_size": 4,
    "steps": 12,
    "log_every": 2,
    "eval_every": 6,
    "checkpoint_every": 4,
}
