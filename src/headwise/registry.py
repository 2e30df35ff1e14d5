"""The open registry of mechanisms: attention, position, norm and feed-forward, each found by its `kind`.

A mechanism is one file: a `ComponentSpec` (what may be written in a line) and a class built from it. The decorator
joins the two under the spec's kind or kinds:

    class SigmoidSpec(AttentionSpec):
        kind: Literal["sigmoid"] = "sigmoid"

    @register_attention(SigmoidSpec)
    class SigmoidAttention(Attention): ...

Files in the family's own package are found by themselves; other packages name theirs under the entry-point groups
`headwise.attention`, `headwise.position`, `headwise.norm` and `headwise.ffn`.
"""

from __future__ import annotations

import importlib
import keyword
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from headwise.dims import Dims
from headwise.errors import Problem, RegistryError, SpecError, nearest, one_of, short

T = TypeVar("T", bound=type)

# Where the line grammar leaves a call's values without keyword, until the spec's class names them.
ARGS = "*"


class ComponentSpec(BaseModel):
    """What a line may say of one component. Frozen and hashable; unknown fields are errors.

    Subclasses give `kind` a Literal default, and may name in `positional` the fields that a call takes without keyword
    (`window(256)`), and in `examples` calls worth showing; the conformance suite runs each (the bare kinds by default).
    `typical` is the call that benchmarks measure where the bare kind will not do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    positional: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[tuple[str, ...]] = ()
    typical: ClassVar[str | None] = None

    kind: str

    def at(self, layer: int) -> ComponentSpec:
        """The component that stands in layer `layer`: itself, unless it is a pattern."""
        return self

    def each(self) -> tuple[ComponentSpec, ...]:
        """The components that there are: itself, unless it is a pattern."""
        return (self,)

    def with_each(self, change: Callable[[ComponentSpec], ComponentSpec]) -> ComponentSpec:
        """The same with every component changed."""
        return change(self)

    def check(self, dims: Dims) -> list[Problem]:
        """What is wrong with this component at these widths; empty where nothing is."""
        return []

    def param_count(self, dims: Dims) -> int:
        """Trainable numbers of the module built from this spec, in closed form."""
        return 0

    def active_param_count(self, dims: Dims) -> int:
        """Those of them that one token meets; fewer only in a mixture of experts."""
        return self.param_count(dims)

    def flops_per_token(self, dims: Dims, context: int, *, causal: bool) -> float:
        """Forward matrix-product FLOPs a token at `context` tokens (a multiply-add counts 2; causal scores half)."""
        return 0.0


class Pattern(ComponentSpec):
    """Components that take turns, layer by layer: `pattern(window(256), window(256), softmax)`."""

    kind: Literal["pattern"] = "pattern"
    items: tuple[SerializeAsAny[ComponentSpec], ...] = Field(min_length=1)

    def at(self, layer: int) -> ComponentSpec:
        return self.items[layer % len(self.items)]

    def each(self) -> tuple[ComponentSpec, ...]:
        return self.items

    def with_each(self, change: Callable[[ComponentSpec], ComponentSpec]) -> ComponentSpec:
        return Pattern(items=tuple(change(item) for item in self.items))

    def check(self, dims: Dims) -> list[Problem]:
        return [
            Problem(f"items.{n}.{p.field}".rstrip("."), p.message)
            for n, item in enumerate(self.items)
            for p in item.check(dims)
        ]


@dataclass(frozen=True)
class Entry:
    """One registered kind: its spec's class, the class built from it, and one line for `headwise list`."""

    kind: str
    spec: type[ComponentSpec]
    module: type
    summary: str


@dataclass(frozen=True)
class Alias:
    """Another name for a kind with some fields set: `mqa` is `softmax(kv_heads=1)`."""

    name: str
    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()


class Registry:
    """Name → mechanism for one family. Loading happens at the first look-up, so importing headwise stays quick."""

    def __init__(self, family: str) -> None:
        self.family = family
        self._entries: dict[str, Entry] = {}
        self._aliases: dict[str, Alias] = {}
        self._loaded = False
        self._broken: list[str] = []

    def register(self, spec: type[ComponentSpec]) -> Callable[[T], T]:
        """Class decorator: join `spec` and the decorated class under every kind the spec's Literal allows.

        Raises:
            RegistryError: the kind is taken or is no name that a line can hold, or the spec names none.
        """

        def join(module: T) -> T:
            kinds = spec_kinds(spec)
            for kind in kinds:
                self._claim(kind)
            doc = (spec.__doc__ or module.__doc__ or "").strip()
            summary = doc.splitlines()[0] if doc else ""
            self._entries |= {kind: Entry(kind, spec, module, summary) for kind in kinds}
            return module

        return join

    def alias(self, name: str, kind: str, *, required: tuple[str, ...] = (), **fields: Any) -> None:
        """Let `name` stand for `kind` with `fields` set; fields in `required` must be given by the user."""
        self._claim(name)
        self._aliases[name] = Alias(name, kind, fields, required)

    def _claim(self, name: str) -> None:
        plain = name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
        if not plain or name.lower() in ("true", "false"):
            raise RegistryError(
                f"{name!r} cannot name a kind of {self.family}: a line must be able to hold it; "
                f"use letters, digits and underscores, such as my_{self.family}"
            )
        if name == "pattern" or name in self._entries or name in self._aliases:
            raise RegistryError(f"{self.family} {name!r} is registered already; choose another name")

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            package = importlib.import_module(f"headwise.{self.family}")
            for info in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{package.__name__}.{info.name}")
            for point in entry_points(group=f"headwise.{self.family}"):
                try:
                    point.load()
                except Exception as error:
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    self._broken.append(f"plug-in {point.name!r} ({point.value}) for {self.family}: {reason}")
        if self._broken:
            # At every look-up, not the first alone: a result without one of its mechanisms would mislead.
            raise RegistryError(f"does not load: {'; '.join(self._broken)}; fix or uninstall the package behind it")

    def list(self) -> list[str]:
        """All kinds, sorted; aliases are not among them."""
        self._load()
        return sorted(self._entries)

    def aliases(self) -> dict[str, Alias]:
        """The other names users know a kind by."""
        self._load()
        return dict(sorted(self._aliases.items()))

    def get(self, kind: str) -> Entry:
        """The entry of a kind or alias.

        Raises:
            SpecError: no such name; the message has the nearest spelling and all names.
        """
        self._load()
        if kind in self._aliases:
            kind = self._aliases[kind].kind
        if kind not in self._entries:
            raise SpecError(one_of(kind, [*self._entries, *self._aliases], self.family))
        return self._entries[kind]

    def spec(self, value: Any) -> ComponentSpec:
        """A component's spec from its name, a mapping with `kind`, or a spec already made.

        Raises:
            SpecError: all problems at once.
        """
        if isinstance(value, ComponentSpec):
            if not isinstance(value, Pattern) and type(value) is not self.get(value.kind).spec:
                raise SpecError(f"{value.kind!r} here is a {type(value).__name__}, which is no {self.family}")
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping) or "kind" not in value:
            raise SpecError(f"{short(value)} is no {self.family}; write a name or a call, such as {self.list()[0]}()")
        fields = dict(value)
        name = fields.pop("kind")
        if not isinstance(name, str):
            raise SpecError(f"kind must be a name, not {short(name)}")
        args = fields.pop(ARGS, ())
        if name == "pattern":
            items = fields.pop("items", ())
            if not isinstance(items, list | tuple):
                raise SpecError([Problem("items", f"a list of components is wanted, not {short(items)}")])
            return self._pattern([*args, *items], fields)
        entry = self.get(name)
        if len(args) > len(entry.spec.positional):
            most = ", ".join(entry.spec.positional) or "none"
            raise SpecError(f"{name}() takes {len(args)} values without a name; allowed: {most}; write name=value")
        for field_name, value in zip(entry.spec.positional, args):
            if field_name in fields:
                raise SpecError(
                    [Problem(field_name, f"given twice, as {short(value)} and {short(fields[field_name])}")]
                )
            fields[field_name] = value
        alias = self._aliases.get(name)
        if alias:
            calls = ", ".join(f"{f}=…" for f in alias.required)
            problems = [
                Problem(f, f"missing; {name} needs it: {name}({calls})") for f in alias.required if f not in fields
            ]
            problems += [
                Problem(f, f"{short(fields[f])} given, but {name} means {f}={value}; write {entry.kind}({f}=…)")
                for f, value in alias.fields.items()
                if f in fields and fields[f] != value
            ]
            fields = {**alias.fields, **fields}
            if problems:
                try:
                    validated(entry.spec, {**fields, "kind": entry.kind})
                except SpecError as error:
                    problems += error.problems
                raise SpecError(problems)
        return validated(entry.spec, {**fields, "kind": entry.kind})

    def _pattern(self, items: Sequence[Any], fields: Mapping[str, Any]) -> Pattern:
        problems = [Problem(f, "unknown field; pattern(...) takes components only") for f in fields]
        if not items:
            problems.append(Problem("", "pattern() needs at least one component: pattern(a, b)"))
        specs = []
        for n, item in enumerate(items):
            try:
                specs.append(self.spec(item))
                if isinstance(specs[-1], Pattern):
                    problems.append(
                        Problem(f"items.{n}", "a pattern may not stand inside a pattern; write it out flat")
                    )
            except SpecError as error:
                problems += [Problem(f"items.{n}.{p.field}".rstrip("."), p.message) for p in error.problems]
        if problems:
            raise SpecError(problems)
        return Pattern(items=tuple(specs))

    def build(self, value: Any, dims: Dims, **context: Any) -> Any:
        """The module of a component (name, mapping or spec) at the widths `dims`.

        Raises:
            SpecError: the component does not exist or cannot be built at these widths.
        """
        spec = self.spec(value)
        problems = spec.check(dims)
        if problems:
            raise SpecError(problems, where=spec.kind)
        return self.get(spec.kind).module(spec, dims, **context)


def spec_kinds(spec: type[ComponentSpec]) -> tuple[str, ...]:
    """The kinds a spec's class stands for: the values of its `kind` Literal."""
    kinds = get_args(spec.model_fields["kind"].annotation)
    if not kinds or not all(isinstance(k, str) for k in kinds):
        raise RegistryError(f'{spec.__name__} must declare its kind: kind: Literal["name"] = "name"')
    return kinds


def validated(model: type[BaseModel], fields: Mapping[str, Any]) -> Any:
    """`model(**fields)`, with pydantic's complaints turned into a SpecError that lists all of them."""
    # Pydantic would take true for 1.
    wrong = [
        Problem(name, f"a number is wanted, not {short(value)}")
        for name, value in fields.items()
        if isinstance(value, bool) and _is_number(model, name)
    ]
    try:
        made = model.model_validate(dict(fields))
    except ValidationError as error:
        raise SpecError(wrong + problems_of(error, model)) from None
    if wrong:
        raise SpecError(wrong)
    return made


def _is_number(model: type[BaseModel], name: str) -> bool:
    """Whether a field takes numbers, and neither true nor false."""
    known = model.model_fields.get(name)
    kinds = {known.annotation, *get_args(known.annotation)} if known is not None else set()
    return bool not in kinds and bool(kinds & {int, float})


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Every complaint of a pydantic error as a Problem: field, what was given, what is allowed, nearest spelling."""
    problems: list[Problem] = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        cause = item.get("ctx", {}).get("error")
        given = item.get("input")
        if isinstance(cause, SpecError):
            problems += [Problem(".".join(filter(None, (path, p.field))), p.message) for p in cause.problems]
        elif item["type"] == "extra_forbidden":
            allowed = sorted(set(model.model_fields) - {"kind"})
            name = str(item["loc"][-1])
            known = ", ".join(allowed) if allowed else "none: it takes no fields"
            problems.append(Problem(path, f"unknown field{nearest(name, allowed)}; allowed: {known}"))
        elif item["type"] == "missing":
            problems.append(Problem(path, "missing; it has no default"))
        elif item["type"] == "literal_error":
            expected = str(item["ctx"]["expected"]).replace("'", "")
            options = [o.strip() for o in expected.replace(" or ", ", ").split(",")]
            problems.append(Problem(path, one_of(given, options, "value")))
        else:
            message = item["msg"].removeprefix("Value error, ")
            problems.append(Problem(path, f"{message[:1].lower()}{message[1:]}, not {short(given)}"))
    return problems


ATTENTION = Registry("attention")
POSITION = Registry("position")
NORM = Registry("norm")
FFN = Registry("ffn")
FAMILIES: dict[str, Registry] = {r.family: r for r in (ATTENTION, POSITION, NORM, FFN)}

register_attention, register_position = ATTENTION.register, POSITION.register
register_norm, register_ffn = NORM.register, FFN.register
list_attention, list_position, list_norm, list_ffn = ATTENTION.list, POSITION.list, NORM.list, FFN.list


def _build(registry: Registry, kind: str, d_model: int, n_heads: int, fields: dict[str, Any]) -> Any:
    widths = {"d_model": d_model, "n_heads": n_heads, "max_seq_len": fields.pop("max_seq_len", 1024)}
    problems = [
        Problem(name, f"a positive whole number is wanted, not {short(width)}")
        for name, width in widths.items()
        if not isinstance(width, int) or width < 1
    ]
    if problems:
        raise SpecError(problems, where=kind)
    dims = Dims(**widths)
    return registry.build({"kind": kind, **fields}, dims)


def get_attention(kind: str, *, d_model: int, n_heads: int, **fields: Any) -> Any:
    """An attention module by name: `get_attention("gqa", d_model=768, n_heads=12, kv_heads=4)(x) → (out, weights |
    None)`.
    """
    return _build(ATTENTION, kind, d_model, n_heads, fields)


def get_position(kind: str, *, d_model: int, n_heads: int, **fields: Any) -> Any:
    """A position code by name; `max_seq_len` sizes a learned table."""
    return _build(POSITION, kind, d_model, n_heads, fields)


def get_norm(kind: str, *, d_model: int, **fields: Any) -> Any:
    """A norm over the last dimension, by name."""
    return _build(NORM, kind, d_model, 1, fields)


def get_ffn(kind: str, *, d_model: int, **fields: Any) -> Any:
    """A feed-forward by name: `get_ffn("swiglu", d_model=768)(x)`."""
    return _build(FFN, kind, d_model, 1, fields)
