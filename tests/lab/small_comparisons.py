"""Lines, settings and a corpus with which a whole comparison takes seconds, and mechanisms that break."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headwise.registry import FFN

GPT2 = "gpt2(d_model=32, n_layers=1, n_heads=2)"
LLAMA = "llama(d_model=32, n_layers=1, n_heads=2)"
QUICK: dict[str, Any] = {"seq_len": 32, "batch_size": 4, "steps": 12, "log_every": 4, "measure_rounds": 0, "workers": 1}

# Feed-forwards of a third party: one fails in code when it trains, the other takes its process with it.
BREAKING = """
import os, signal
from typing import Literal
from headwise.ffn.mlp import MLP, MLPSpec
from headwise.registry import register_ffn

class FragileSpec(MLPSpec):
    kind: Literal["fragile"] = "fragile"

@register_ffn(FragileSpec)
class Fragile(MLP):
    def forward(self, x_BTC):
        if self.training:
            raise RuntimeError("it broke")
        return super().forward(x_BTC)

class DeadlySpec(MLPSpec):
    kind: Literal["deadly"] = "deadly"

@register_ffn(DeadlySpec)
class Deadly(MLP):
    def forward(self, x_BTC):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def write_corpus(folder: Path) -> Path:
    """About 12,000 characters that are not the same everywhere."""
    words = ["the", "head", "wise", "of", "all", "lines", "is", "one", "that", "learns"]
    text = " ".join(words[(7 * n * n + 3 * n) % 10] + ("." if n % 11 == 0 else "") for n in range(2600))
    path = folder / "small.txt"
    path.write_text(text)
    return path


@contextmanager
def module_with(source: str, name: str, folder: Path) -> Iterator[None]:
    """A module of a third party, imported; afterwards its mechanisms are unknown again."""
    (folder / f"{name}.py").write_text(source)
    FFN.list()
    before = dict(FFN._entries)
    sys.path.insert(0, str(folder))
    try:
        __import__(name)
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name, None)
        FFN._entries = before
