"""A modeling file that needs no Headwise: the modules a line uses, as text, in front of a Hugging Face class.

Which modules those are is read from their import statements, those inside functions included, starting at what builds a
model and at the mechanisms of the line. They are imported under a package name of their own that ends in a hash of
their text, so that they meet neither an installed Headwise nor another model's.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import headwise
from headwise.errors import FormatError
from headwise.registry import ATTENTION, FFN, NORM, POSITION, ComponentSpec, Registry
from headwise.spec import ModelSpec

PACKAGE = "headwise"
HERE = Path(headwise.__file__).parent
TEMPLATE = Path(__file__).with_name("modeling_headwise.py")
ROOTS = ("headwise.model", "headwise.spec")
FAMILIES = {"attention": ATTENTION, "position": POSITION, "norm": NORM, "ffn": FFN}


def modeling_file(spec: ModelSpec) -> str:
    """The text of a self-contained modeling file for models of this line.

    Raises:
        FormatError: a mechanism of the line is defined where its source cannot be read, as in an interactive session.
    """
    extra = {}
    mechanisms = []
    for cls in _classes(spec):
        if cls.__module__.split(".")[0] == PACKAGE:
            mechanisms.append(cls.__module__)
            continue
        try:
            file = inspect.getsourcefile(cls)
            text = Path(file or "").read_text(encoding="utf-8")
        except (OSError, TypeError):
            raise FormatError(
                f"{cls.__name__} is defined in {cls.__module__}, whose source cannot be read; put it into a file that "
                "can be imported"
            ) from None
        name = "extra_" + re.sub(r"\W", "_", cls.__module__)
        extra[f"{name}.py"] = text
        mechanisms.append(f"{PACKAGE}.{name}")
    mechanisms = list(dict.fromkeys(mechanisms))
    own = _closure([*ROOTS, *mechanisms, *(m for text in extra.values() for m in _imports(ast.parse(text), "", True))])
    sources = {path: (HERE / path).read_text(encoding="utf-8") for path in own} | extra
    digest = hashlib.sha256("\0".join(f"{p}\0{t}" for p, t in sorted(sources.items())).encode()).hexdigest()
    root = f"{PACKAGE}_{digest[:12]}"
    top = "|".join(sorted({path.split("/")[0].removesuffix(".py") for path in sources} - {"__init__"}))
    # Dotted names of modules, in import statements and in text, and imports of the package itself.
    dotted = re.compile(rf"\b{PACKAGE}(?=\.(?:{top})\b|\.\{{)")
    whole = re.compile(rf"^(\s*(?:from|import)\s+){PACKAGE}\b(?!\.)", re.MULTILINE)
    renamed = {path: whole.sub(rf"\g<1>{root}", dotted.sub(root, text)) for path, text in sorted(sources.items())}
    blocks = "\n".join(f"    {path!r}: {_literal(text)}," for path, text in renamed.items())
    text = TEMPLATE.read_text(encoding="utf-8")
    for old, new in {
        f'ROOT = "{PACKAGE}"': f"ROOT = {root!r}",
        "SOURCES: dict[str, str] = {}": "SOURCES: dict[str, str] = {\n" + blocks + "\n}",
        "MECHANISMS: tuple[str, ...] = ()": f"MECHANISMS = {tuple(dotted.sub(root, m) for m in mechanisms)!r}",
    }.items():
        head, found, tail = text.partition(old)
        assert found, f"{TEMPLATE.name} has lost {old!r}"
        text = head + new + tail
    return text


def _classes(spec: ModelSpec) -> Iterator[type]:
    """The classes of the specs and modules that the line names, patterns' items included."""
    pairs: list[tuple[Registry, ComponentSpec]] = [(FAMILIES[f], getattr(spec, f)) for f in FAMILIES]
    if spec.architecture == "encoder_decoder":
        pairs.append((ATTENTION, spec.cross_attention))
    for registry, component in pairs:
        for item in component.each():
            entry = registry.get(item.kind)
            yield entry.spec
            yield entry.module


def _closure(names: Iterable[str]) -> list[str]:
    """Paths, in the package, of the modules named, of all they import, and of the packages around them."""
    found: dict[str, None] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        path = _path(name)
        if name.split(".")[0] != PACKAGE or path is None or path in found:
            continue
        found[path] = None
        if "." in name:
            waiting.append(name.rpartition(".")[0])
        is_package = path.endswith("__init__.py")
        # The package's own table of public names reaches everything; what a line needs comes by other ways.
        if name != PACKAGE:
            tree = ast.parse((HERE / path).read_text(encoding="utf-8"))
            waiting += _imports(tree, name if is_package else name.rpartition(".")[0], False)
            if is_package and _lazy(tree):
                waiting += [f"{name}.{file.stem}" for file in (HERE / path).parent.glob("*.py")]
    return sorted(found)


def _path(name: str) -> str | None:
    relative = Path(*name.split(".")[1:])
    for path in (relative / "__init__.py", relative.with_suffix(".py") if relative.name else None):
        if path is not None and (HERE / path).is_file():
            return path.as_posix()
    return None


def _lazy(tree: ast.Module) -> bool:
    """Whether a package gives its names out when they are first asked for."""
    return any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body)


def _imports(tree: ast.Module, package: str, through_root: bool) -> Iterator[str]:
    """Names of modules (or of names in them) that the tree imports when it runs."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], base]).strip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif through_root and isinstance(node, ast.Attribute):
            # `hw.register_attention`, and names behind the package's table, of a user's own file.
            home = headwise._HOMES.get(node.attr)
            if home is not None:
                yield home


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'''", "\\'\\'\\'")
    if escaped.endswith("'"):
        escaped = escaped[:-1] + "\\'"
    return f"'''{escaped}'''"
