"""Headwise: a workbench for Transformer architectures. One line of text is one architecture.

    import headwise as hw
    spec = hw.parse("llama(attention=gqa(kv_heads=2))")
    model = hw.build(spec)                      # model(ids[B,T]) → logits [B,T,vocab]
    result = hw.compare(["gpt2", "llama"], data="shakespeare", seeds=6, steps=300)

Names are looked up at first use, so `import headwise` stays quick and loads no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name → the module that defines it.
_HOMES = {
    "parse": "headwise.spec",
    "count": "headwise.spec",
    "ModelSpec": "headwise.spec",
    "list_presets": "headwise.spec",
    "build": "headwise.model",
    "load": "headwise.io.pretrained",
    "save_pretrained": "headwise.io.pretrained",
    "register_with_transformers": "headwise.io.attention_interface",
    "swap": "headwise.model.surgery",
    "quantise": "headwise.model.quantise",
    "train": "headwise.train",
    "resume": "headwise.train",
    "distill": "headwise.distill",
    "generate": "headwise.generate",
    "Engine": "headwise.generate.engine",
    "compare": "headwise.lab.compare",
    "bench": "headwise.lab.bench",
    **dict.fromkeys(
        [
            *("register_attention", "register_position", "register_norm", "register_ffn"),
            *("get_attention", "get_position", "get_norm", "get_ffn"),
            *("list_attention", "list_position", "list_norm", "list_ffn"),
        ],
        "headwise.registry",
    ),
    "HeadwiseError": "headwise.errors",
}

if TYPE_CHECKING:
    from headwise.distill import distill as distill
    from headwise.errors import HeadwiseError as HeadwiseError
    from headwise.generate import generate as generate
    from headwise.generate.engine import Engine as Engine
    from headwise.io.attention_interface import register_with_transformers as register_with_transformers
    from headwise.io.pretrained import load as load
    from headwise.io.pretrained import save_pretrained as save_pretrained
    from headwise.lab.bench import bench as bench
    from headwise.lab.compare import compare as compare
    from headwise.model import build as build
    from headwise.model.quantise import quantise as quantise
    from headwise.model.surgery import swap as swap
    from headwise.registry import get_attention as get_attention
    from headwise.registry import get_ffn as get_ffn
    from headwise.registry import get_norm as get_norm
    from headwise.registry import get_position as get_position
    from headwise.registry import list_attention as list_attention
    from headwise.registry import list_ffn as list_ffn
    from headwise.registry import list_norm as list_norm
    from headwise.registry import list_position as list_position
    from headwise.registry import register_attention as register_attention
    from headwise.registry import register_ffn as register_ffn
    from headwise.registry import register_norm as register_norm
    from headwise.registry import register_position as register_position
    from headwise.spec import ModelSpec as ModelSpec
    from headwise.spec import count as count
    from headwise.spec import list_presets as list_presets
    from headwise.spec import parse as parse
    from headwise.train import resume as resume
    from headwise.train import train as train

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headwise' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)


class _Package(ModuleType):
    """This package's type. Importing `headwise.train` would bind the subpackage to a name that is a public function's;
    the function keeps it (`from headwise.train import …` finds the subpackage all the same)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
