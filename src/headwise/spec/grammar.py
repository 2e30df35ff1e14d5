"""One line, one architecture: `llama(d_model=384, attention=gqa(kv_heads=2))`.

A line is a Python call expression: a preset's name with fields overridden, where a component is a name or a call.
It is read with `ast` and never evaluated. A component written in a line is complete: what it leaves out is its kind's
default, not what the preset had there.
"""

from __future__ import annotations

import ast
import keyword
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from headwise.errors import SpecError
from headwise.registry import ARGS, ComponentSpec, Pattern, short, validated
from headwise.spec.model import ModelSpec
from headwise.spec.presets import preset_fields

MAX_CHARACTERS = 10_000
MAX_DEPTH = 16
# Bare words that are values, not names; a string that reads as one of them is printed in quotes.
WORDS = {"true": True, "false": False}


def parse(source: str | Mapping[str, Any] | ModelSpec | Path) -> ModelSpec:
    """The spec of a line, a YAML file (a path ending in .yaml or .yml), a mapping with `preset`, or a spec itself.

    Raises:
        SpecError: all problems found, each with its field, what was given, what is allowed and the nearest spelling.
    """
    if isinstance(source, ModelSpec):
        return source
    if isinstance(source, Mapping):
        return _model(dict(source), where="")
    if not isinstance(source, str | Path):
        raise SpecError(f"an architecture is a line of text, a mapping or a spec, not {short(source)}")
    text = str(source).strip()
    if text.endswith((".yaml", ".yml")):
        return from_yaml(_read(Path(text)), where=text)
    try:
        value = read_value(text)
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, dict):
            raise SpecError(
                f"a line is a preset's name or call, such as llama or llama(n_layers=6), not {short(value)}"
            )
        if value.get(ARGS):
            raise SpecError(f"write fields as name=value; {short(value[ARGS][0])} has no name")
        fields = {k: v for k, v in value.items() if k not in ("kind", ARGS)}
        if "preset" in fields:
            raise SpecError("a line's preset is the name it starts with; remove preset=…")
        return _model({"preset": value["kind"], **fields}, where="")
    except SpecError as error:
        raise SpecError(error.problems, where=error.where or short_line(text)) from None


def _model(fields: dict[str, Any], *, where: str) -> ModelSpec:
    if "preset" not in fields:
        raise SpecError("the preset to start from is missing: preset: llama", where=where)
    return validated(ModelSpec, fields)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read {path}: {error}") from None


def from_yaml(text: str, *, where: str = "YAML") -> ModelSpec:
    """The spec of a YAML mapping: `preset` and the fields that differ from it.

    Raises:
        SpecError: no mapping, or no architecture.
    """
    try:
        fields = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise SpecError(f"not YAML: {' '.join(str(error).split())}", where=where) from None
    if not isinstance(fields, dict):
        raise SpecError("YAML must be a mapping with preset: NAME", where=where)
    try:
        return _model(fields, where=where)
    except SpecError as error:
        raise SpecError(error.problems, where=error.where or where) from None


def to_yaml(spec: ModelSpec) -> str:
    """The spec as YAML: its preset and what differs from it; `from_yaml` reads it back equal."""
    fields: dict[str, Any] = {"preset": spec.preset}
    for name, value in _differences(spec).items():
        fields[name] = value.model_dump(mode="json") if isinstance(value, ComponentSpec) else value
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def to_line(spec: ModelSpec) -> str:
    """The shortest line that `parse` turns back into this spec."""
    fields = [f"{name}={_print(value)}" for name, value in _differences(spec).items()]
    return f"{spec.preset}({', '.join(fields)})" if fields else spec.preset


def _differences(spec: ModelSpec) -> dict[str, Any]:
    """The fields in which a spec differs from its preset (at its published size, where it has one)."""
    base = ModelSpec.model_validate({"preset": spec.preset, **preset_fields(spec.preset, spec.size)})
    fields = {"size": spec.size} if spec.size is not None else {}
    return fields | {k: v for k, v in spec if k not in ("preset", "size") and v != getattr(base, k)}


def _print(value: Any) -> str:
    if isinstance(value, Pattern):
        return f"pattern({', '.join(_print(item) for item in value.items)})"
    if hasattr(type(value), "model_fields"):
        fields = {k: v for k, v in value if k != "kind" and not _is_default(type(value), k, v)}
        positional = getattr(type(value), "positional", ())
        args = [_print(v) if k in positional[:1] else f"{k}={_print(v)}" for k, v in _ordered(fields, positional)]
        return f"{value.kind}({', '.join(args)})" if args else value.kind
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_print(v) for v in value) + "]"
    if isinstance(value, str) and value.isidentifier() and not keyword.iskeyword(value) and value.lower() not in WORDS:
        return value
    return repr(value)


def _is_default(model: Any, name: str, value: Any) -> bool:
    info = model.model_fields[name]
    return not info.is_required() and value == info.get_default(call_default_factory=True)


def _ordered(fields: dict[str, Any], positional: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Fields with the first positional one in front, where a value without keyword must stand."""
    return sorted(fields.items(), key=lambda item: item[0] not in positional[:1])


def read_value(text: str) -> Any:
    """A value of the grammar: number, string, true/false/None, list, name (a string), or call (a mapping with `kind`).

    Raises:
        SpecError: too long, too deeply nested, or not of the grammar.
    """
    if not text:
        raise SpecError("the line is empty; write a preset's name, such as gpt2 or llama")
    if len(text) > MAX_CHARACTERS:
        raise SpecError(f"the line has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise SpecError(f"brackets are nested {deepest} deep; at most {MAX_DEPTH} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text, mode="eval")
    except SyntaxError as error:
        at = f" at character {error.offset}" if error.offset else ""
        raise SpecError(f"not a call expression ({error.msg}{at}); write name(field=value, …)") from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise SpecError(f"not a call expression ({error}); write name(field=value, …)") from None
    return _value(tree.body, text)


def _value(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Name(id=name):
            return WORDS.get(name.lower(), name)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, text) for item in items]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            call: dict[str, Any] = {"kind": name}
            if args:
                call[ARGS] = [_value(arg, text) for arg in args]
            for kw in keywords:
                if kw.arg is None:
                    raise SpecError(f"{name}(**…) is not read; write each field as name=value")
                if kw.arg in ("kind", ARGS):
                    raise SpecError(f"{name}({kw.arg}=…): the kind is the name before the bracket")
                call[kw.arg] = _value(kw.value, text)
            return call
    piece = ast.get_source_segment(text, node) or ast.unparse(node)
    raise SpecError(f"{short(piece)} is not read; a value is a number, a string, a list, a name or a call")


def short_line(text: str) -> str:
    """A line cut to one readable piece, for error messages."""
    return text if len(text) <= 100 else text[:97] + "…"
