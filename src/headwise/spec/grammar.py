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
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import yaml

from headwise.errors import Problem, SpecError, short
from headwise.registry import ARGS, ComponentSpec, Pattern
from headwise.spec.model import ModelSpec, model_spec
from headwise.spec.presets import preset_fields

MAX_CHARACTERS = 10_000
MAX_DEPTH = 16
MAX_ITEMS = 4096  # of a pattern, repeats counted
LONG_RUN = 4  # equal items of a pattern in a row that are printed as one with a number
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
        return _line(_tree(text))
    except SpecError as error:
        raise SpecError(error.problems, where=error.where or short_line(text)) from None


def _line(node: ast.expr) -> ModelSpec:
    problems: list[Problem] = []
    if isinstance(node, ast.Call):
        value, problems = _call(node)
    else:
        value = _value(node)
        if isinstance(value, str):
            value = {"kind": value}
    if not isinstance(value, dict):
        raise SpecError(f"a line is a preset's name or call, such as llama or llama(n_layers=6), not {short(value)}")
    fields = {k: v for k, v in value.items() if k not in ("kind", ARGS)}
    problems += [Problem("", f"write fields as name=value; {short(arg)} has no name") for arg in value.get(ARGS, ())]
    if "preset" in fields:
        problems.append(Problem("preset", "a line's preset is the name it starts with; remove preset=…"))
    try:
        spec = model_spec({**fields, "preset": value["kind"]})
    except SpecError as error:
        problems += error.problems
    if problems:
        raise SpecError(problems)
    return spec


def _model(fields: dict[str, Any], *, where: str) -> ModelSpec:
    if "preset" not in fields:
        raise SpecError("the preset to start from is missing: preset: llama", where=where)
    if _deeper(fields, MAX_DEPTH):
        raise SpecError(f"nested more than {MAX_DEPTH} deep", where=where)
    return model_spec(fields)


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and mappings stand in one another more than `levels` deep."""
    if not isinstance(value, list | tuple | dict):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(v, levels - 1) for v in inner)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:  # a ValueError: no UTF-8, or a path with a null character
        raise SpecError(f"cannot read {path}: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them can stand for a billion values, or for one that holds itself."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases such as *{self.peek_event().anchor} are not read; write the value out")
        return super().compose_node(parent, index)


def from_yaml(text: str, *, where: str = "YAML") -> ModelSpec:
    """The spec of a YAML mapping: `preset` and the fields that differ from it.

    Raises:
        SpecError: no mapping, or no architecture.
    """
    try:
        fields = yaml.load(text, Loader=_Loader)
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
    for name, value in differences(spec).items():
        fields[name] = value.model_dump(mode="json") if isinstance(value, ComponentSpec) else value
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def to_line(spec: ModelSpec) -> str:
    """The shortest line that `parse` turns back into this spec."""
    fields = [f"{name}={print_value(value)}" for name, value in differences(spec).items()]
    return f"{spec.preset}({', '.join(fields)})" if fields else spec.preset


def differences(spec: ModelSpec) -> dict[str, Any]:
    """The fields in which a spec differs from its preset (at its published size, where it has one)."""
    base = ModelSpec.model_validate({"preset": spec.preset, **preset_fields(spec.preset, spec.size)})
    fields = {"size": spec.size} if spec.size is not None else {}
    return fields | {k: v for k, v in spec if k not in ("preset", "size") and v != getattr(base, k)}


def print_value(value: Any) -> str:
    """A component or another value of a line, as the line writes it; `read_value` reads it back."""
    if isinstance(value, Pattern):
        runs = [list(run) for _, run in groupby(value.items)]
        items = (
            [f"{len(run)} * {print_value(run[0])}"] if len(run) >= LONG_RUN else map(print_value, run) for run in runs
        )
        return f"pattern({', '.join(chain.from_iterable(items))})"
    if hasattr(type(value), "model_fields"):
        fields = {k: v for k, v in value if k != "kind" and not _is_default(type(value), k, v)}
        positional = getattr(type(value), "positional", ())
        args = [
            print_value(v) if k in positional[:1] else f"{k}={print_value(v)}" for k, v in _ordered(fields, positional)
        ]
        return f"{value.kind}({', '.join(args)})" if args else value.kind
    if isinstance(value, tuple | list):
        return "[" + ", ".join(print_value(v) for v in value) + "]"
    if isinstance(value, str):
        # Python reads other alphabets' look-alikes as one letter, so only ASCII goes without quotes.
        plain = value.isascii() and value.isidentifier() and not keyword.iskeyword(value)
        return value if plain and value.lower() not in WORDS else repr(value)
    return repr(value)


def _is_default(model: Any, name: str, value: Any) -> bool:
    return value == model.model_fields[name].get_default(call_default_factory=True)  # a required field's is no value


def _ordered(fields: dict[str, Any], positional: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Fields with the first positional one in front, where a value without keyword must stand."""
    return sorted(fields.items(), key=lambda item: item[0] not in positional[:1])


def read_value(text: str) -> Any:
    """A value of the grammar: number, string, true/false/None, list, name (a string), or call (a mapping with `kind`).

    Raises:
        SpecError: too long, too deeply nested, or not of the grammar.
    """
    return _value(_tree(text))


def _tree(text: str) -> ast.expr:
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
            return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        at = f" at character {error.offset}" if error.offset else ""
        advice = "put it in quotes, as in size='7b'" if "literal" in error.msg else "write name(field=value, …)"
        raise SpecError(f"not a call expression ({error.msg}{at}); {advice}") from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise SpecError(f"not a call expression ({error}); write name(field=value, …)") from None


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Name(id=name):
            return WORDS.get(name.lower(), name)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            values, problems = _each([(str(n), item) for n, item in enumerate(items)])
            if problems:
                raise SpecError(problems)
            return [value for _, value in values]
        case ast.Call():
            call, problems = _call(node)
            if problems:
                raise SpecError(problems)
            return call
    raise SpecError(f"{_piece(node)} is not read; a value is a number, a string, a list, a name or a call")


def _call(node: ast.Call) -> tuple[dict[str, Any], list[Problem]]:
    """A call as a mapping with what can be read of it, and what is wrong with the rest."""
    if not isinstance(node.func, ast.Name):
        raise SpecError(f"{_piece(node.func)} is not read; a call is a name with a bracket: name(field=value, …)")
    name = node.func.id
    args, problems = _repeated(node.args) if name == "pattern" else _each([("", arg) for arg in node.args])
    given = [(kw.arg, kw.value) for kw in node.keywords if kw.arg is not None]
    fields, wrong = _each(given)
    problems += wrong
    if len(given) < len(node.keywords):
        problems.append(Problem("", f"{name}(**…) is not read; write each field as name=value"))
    names = [field for field, _ in given]
    problems += [Problem(field, "given twice") for field in dict.fromkeys(names) if names.count(field) > 1]
    if "kind" in names:
        problems.append(Problem("kind", f"the kind is the name before the bracket: {name}(…)"))
    call = {**dict(fields), "kind": name}
    if args:
        call[ARGS] = [value for _, value in args]
    return call, problems


def _repeated(nodes: list[ast.expr]) -> tuple[list[tuple[str, Any]], list[Problem]]:
    """A pattern's items as `_each` has them, in which `3 * item` stands for three."""
    values: list[tuple[str, Any]] = []
    problems: list[Problem] = []
    for node in nodes:
        times = 1
        match node:
            case ast.BinOp(op=ast.Mult(), left=ast.Constant(value=int() as times), right=node):
                pass
        found, wrong = _each([("", node)])
        problems += wrong
        if isinstance(times, bool) or not 1 <= times <= MAX_ITEMS - len(values):
            message = f"{short(times)} * … given; a pattern has from 1 to {MAX_ITEMS:,} components"
            return values, [*problems, Problem("", message)]
        values += found * times
    return values, problems


def _each(nodes: list[tuple[str, ast.expr]]) -> tuple[list[tuple[str, Any]], list[Problem]]:
    """The values of named nodes, and the problems of those that have none, under their names."""
    values: list[tuple[str, Any]] = []
    problems: list[Problem] = []
    for name, node in nodes:
        try:
            values.append((name, _value(node)))
        except SpecError as error:
            problems += [Problem(".".join(filter(None, (name, p.field))), p.message) for p in error.problems]
    return values, problems


def _piece(node: ast.expr) -> str:
    """A node as it might have been written, for error messages."""
    try:
        return short(ast.unparse(node))
    except RecursionError:
        return "an expression this deep"


def short_line(text: str) -> str:
    """A line cut to one readable piece, for error messages."""
    return text if len(text) <= 100 else text[:97] + "…"
