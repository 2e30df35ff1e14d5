"""Hugging Face folders: config.json and safetensors, one file a family of models."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from headwise.errors import FormatError, one_of

if TYPE_CHECKING:
    from headwise.io.hf.family import Family

_SHARED = ("common", "config", "export", "family", "folder", "gemma_kin", "gpt_kin", "llama_kin", "moe_kin")


@cache
def families() -> dict[str, Family]:
    """Every family by its model_type: each file of this folder that is not shared by several holds one."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if info.name not in _SHARED]
    found = [importlib.import_module(f"headwise.io.hf.{name}").FAMILY for name in names]
    return {family.model_type: family for family in found}


def family_of(model_type: object, where: str) -> Family:
    """The family that a config.json names.

    Raises:
        FormatError: one that we do not know.
    """
    known = families()
    if not isinstance(model_type, str) or model_type not in known:
        raise FormatError(f"{where}: {one_of(model_type, known, 'model_type')}")
    return known[model_type]
