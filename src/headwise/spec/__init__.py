"""Floor 4: a model in words. Specs, presets, the line grammar, and closed-form counts; nothing is built here."""

from headwise.spec.counts import Counts, count
from headwise.spec.flags import apply_flags
from headwise.spec.grammar import parse, to_line
from headwise.spec.model import ModelSpec
from headwise.spec.presets import list_presets

__all__ = ["Counts", "ModelSpec", "apply_flags", "count", "list_presets", "parse", "to_line"]
