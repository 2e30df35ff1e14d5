"""Dotted flags on top of a line: `--model.attention.kind tva --model.attention.rank 4 --model.d_model 768`.

Giving a component's kind starts it afresh, so the fields of the kind it replaces are dropped; a field alone changes
that field. A new preset or size is put under what the line itself says. Document 000's spellings are aliases:
`--attn.impl`, `--ffn.impl`, `--vft.rank`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from headwise.errors import Problem, SpecError, one_of
from headwise.registry import FAMILIES, ComponentSpec
from headwise.spec.grammar import differences, read_value
from headwise.spec.model import ModelSpec, model_spec

# The first words a dotted flag may start with, and the component each stands for ("" is the model itself).
ROOTS = {
    "model": "",
    "attn": "attention",
    "attention": "attention",
    "ffn": "ffn",
    "norm": "norm",
    "position": "position",
}


def is_model_flag(name: str) -> bool:
    """Whether a flag (without dashes) speaks of the model: it has a dot and a known first word."""
    root, dot, _ = name.partition(".")
    return bool(dot) and (root in ROOTS or root == "vft")


def apply_flags(spec: ModelSpec, flags: Mapping[str, Any]) -> ModelSpec:
    """The spec with dotted flags (names without dashes; text values are read as the line grammar reads them) worked in.

    Raises:
        SpecError: all problems at once, each with the field it is about.
    """
    model: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    problems: list[Problem] = []
    vein: dict[str, Any] = {}
    for flag, raw in flags.items():
        root, _, rest = flag.replace("-", "_").partition(".")
        try:
            value = _read(raw)
        except SpecError as error:
            problems += [Problem(f"--{flag}", p.message) for p in error.problems]
            continue
        if root == "vft" and rest:
            vein[rest] = value
            continue
        if root not in ROOTS or not rest:
            problems.append(Problem(f"--{flag}", one_of(root, [*ROOTS, "vft"], "first word")))
            continue
        path = [p for p in (ROOTS[root], *rest.split(".")) if p]
        if path[0] in FAMILIES and len(path) == 1:
            parts.setdefault(path[0], {})["kind"] = value
        elif path[0] in FAMILIES and len(path) == 2:
            parts.setdefault(path[0], {})["kind" if path[1] == "impl" else path[1]] = value
        elif len(path) == 1:
            model[path[0]] = value
        else:
            problems.append(Problem(f"--{flag}", "too many dots; write --model.FIELD or --model.COMPONENT.FIELD"))
    if problems:
        raise SpecError(problems)
    rebase: dict[str, Any] = {k: model.pop(k) for k in ("preset", "size") if k in model}
    if rebase:
        spec = model_spec({"preset": spec.preset, **differences(spec), **rebase})
    components = {name: _component(name, getattr(spec, name), fields) for name, fields in parts.items()}
    if vein:
        components |= _vein_fields(spec, components, vein)
    return model_spec({**dict(spec), **model, **components})


def _read(raw: Any) -> Any:
    """A flag's value. What the grammar cannot read but is one word is that word, as in `--model.size 7b`."""
    if not isinstance(raw, str):
        return raw
    try:
        return read_value(raw.strip())
    except SpecError:
        if re.fullmatch(r"[\w.]+", raw.strip()):
            return raw.strip()
        raise


def _component(family: str, old: ComponentSpec, fields: dict[str, Any]) -> dict[str, Any]:
    """A component's mapping after flags: a new kind starts afresh, otherwise its fields are changed one by one."""
    given = fields.get("kind")
    if given is None:
        return {**old.model_dump(), **fields}
    start = given if isinstance(given, dict) else {"kind": given}
    return {**start, **{k: v for k, v in fields.items() if k != "kind"}}


def _vein_fields(spec: ModelSpec, components: Mapping[str, Any], vein: Mapping[str, Any]) -> dict[str, Any]:
    """`--vft.FIELD` sets FIELD in attention and feed-forward, wherever their kind has it."""
    changed: dict[str, Any] = {}
    for family in ("attention", "ffn"):
        now = dict(components.get(family) or getattr(spec, family).model_dump())
        known = () if now["kind"] == "pattern" else FAMILIES[family].get(str(now["kind"])).spec.model_fields
        fields = {k: v for k, v in vein.items() if k in known}
        if fields:
            changed[family] = {**now, **fields}
    unused = [k for k in vein if not any(k in c for c in changed.values())]
    if unused:
        raise SpecError(
            [Problem(f"--vft.{k}", f"neither the attention nor the feed-forward has a field {k!r}") for k in unused]
        )
    return changed
