"""What pages have filled in when they are built, so that they say what the code does: `{{ presets() }}`.

A placeholder is a call of a function of this file with literal arguments, read as the line grammar reads a line and
never evaluated.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from headwise.attention import AttentionSpec  # noqa: E402
from headwise.cli import COMMANDS, main  # noqa: E402
from headwise.errors import SpecError  # noqa: E402
from headwise.ffn import FFNSpec  # noqa: E402
from headwise.lab.render import COLUMNS, cells, quantity  # noqa: E402
from headwise.lab.result import CompareResult  # noqa: E402
from headwise.lab.settings import CompareSettings  # noqa: E402
from headwise.registry import FAMILIES, ComponentSpec  # noqa: E402
from headwise.spec import count, parse  # noqa: E402
from headwise.spec.presets import PRESETS  # noqa: E402
from headwise.train.settings import TrainSettings  # noqa: E402
from tables import markdown, table  # noqa: E402

_PLACEHOLDER = re.compile(r"\{\{ *(\w+\(.*?\)) *\}\}", re.DOTALL)
FIGURES = ROOT / "docs" / "figures"


class MacroError(ValueError):
    """A placeholder that cannot be filled."""


def expand(text: str) -> str:
    """The page with every placeholder filled.

    Raises:
        MacroError: a placeholder is no call of a function of `MACROS` with literals.
    """
    return _PLACEHOLDER.sub(lambda found: _call(found[1]), text)


def _call(text: str) -> str:
    try:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Name)
        args = [ast.literal_eval(arg) for arg in call.args]
        options = {str(kw.arg): ast.literal_eval(kw.value) for kw in call.keywords}
        macro = MACROS[call.func.id]
    except (SyntaxError, ValueError, AssertionError, KeyError) as error:
        raise MacroError(f"{{{{ {text} }}}}: {error!r}") from None
    return macro(*args, **options)


def measured(*names: str) -> str:
    """Tables of docs/figures/mechanisms.json, with the machine they were measured on."""
    figures = json.loads((FIGURES / "mechanisms.json").read_text(encoding="utf-8"))
    machine = figures["machine"]
    parts = [markdown(figures["tables"][name]) for name in names]
    where = f"{machine['cpu']}, one thread, torch {machine['torch']}, {machine['date']}"
    return "\n".join([*parts, f"Measured by `{figures['command']} {' '.join(names)}` on {where}.\n"])


def counts(*lines: str, context: int | None = None, parts: Sequence[str] = ("attention", "ffn")) -> str:
    """The closed-form counts of some lines, side by side; `parts` are those whose parameters are shown."""
    rows = []
    for line in lines:
        found = count(parse(line).resolve(), context)
        rows.append({
            "line": f"`{line}`",
            "params": quantity(found.params),
            **{part: quantity(found.params_by_part[part]) for part in parts},
            "flops": quantity(found.flops_per_token),
            "token": quantity(found.kv_bytes_per_token, "B"),
            "held": quantity(found.kv_cache_bytes, "B"),
        })  # fmt: skip
    tokens = context or parse(lines[0]).resolve().dims.max_seq_len
    headings = {
        "params": "parameters", **{part: f"in {part}" for part in parts},
        "flops": "forward FLOPs a token", "token": "cache a token", "held": "cache in all",
    }  # fmt: skip
    columns = [(key, heading, "text right") for key, heading in headings.items()]
    return markdown(table(f"At a context of {tokens:,} tokens:", ("line", "line", "text"), *columns, rows=rows))


NORM_PLACES = {
    "pre": "before",
    "post": "after",
    "sandwich": "both",
    "reordered": "after, inside the sum",
    "parallel": "before, parallel",
    "parallel_two_norms": "before, parallel",
}


def presets() -> str:
    """The styles: what each preset sets."""
    rows = []
    for name in sorted(PRESETS):
        spec = parse(name)
        norm_place = NORM_PLACES[spec.order]
        parts = {part: f"`{_component(getattr(spec, part))}`" for part in ("attention", "position", "norm", "ffn")}
        yes = [
            words
            for field, words in (
                ("bias", "biases"), ("tie_embeddings", "tied embeddings"), ("scale_embeddings", "scaled embeddings"),
                ("embedding_norm", "norm on embeddings"), ("head_bias", "bias on the head"),
            )
            if getattr(spec, field)
        ]  # fmt: skip
        more = {"order": norm_place, "init": f"`{spec.init}`", "more": ", ".join(yes)}
        rows.append({"name": f"`{name}`", **parts, **more})
    headings = {
        "name": "preset", "attention": "attention", "position": "position", "norm": "norm", "order": "norms stand",
        "ffn": "feed-forward", "init": "init", "more": "also",
    }  # fmt: skip
    return markdown(table("", *((key, heading, "text") for key, heading in headings.items()), rows=rows))


def _component(component: ComponentSpec) -> str:
    """A component as a line has it, the fields at their defaults left out."""
    fields = {k: v for k, v in component.model_dump(exclude_defaults=True).items() if k != "kind"}
    first = component.positional[:1]
    words = [str(fields.pop(name)) for name in first if name in fields]
    words += [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in fields.items()]
    return f"{component.kind}({', '.join(words)})" if words else component.kind


def published() -> str:
    """Every published model: its widths and the parameters counted for it."""
    rows = []
    for name in sorted(PRESETS):
        for size in PRESETS[name].sizes:
            spec = parse(f'{name}(size="{size}")').resolve()
            attention, ffn = spec.attention.at(0), spec.ffn.at(0)
            assert isinstance(attention, AttentionSpec)
            assert isinstance(ffn, FFNSpec)
            _, kv_heads, head_dim = attention.heads(spec.dims)
            layers = str(spec.n_layers)
            if spec.n_encoder_layers:
                layers = f"{spec.n_encoder_layers} + {spec.n_layers}"
            rows.append({
                "line": f'`{name}(size="{size}")`', "layers": layers, "width": spec.d_model, "heads": spec.n_heads,
                "kv": kv_heads, "head_dim": head_dim, "d_ff": ffn.width(spec.dims),
                "vocab": spec.vocab_size, "length": spec.max_seq_len, "params": count(spec).params,
            })  # fmt: skip
    headings = {
        "params": "parameters", "layers": "layers", "width": "`d_model`", "heads": "heads", "kv": "KV heads",
        "head_dim": "head width", "d_ff": "`d_ff`", "vocab": "vocabulary", "length": "context",
    }  # fmt: skip
    kinds = {"layers": "text right"}
    columns = [(key, heading, kinds.get(key, "count")) for key, heading in headings.items()]
    return markdown(table("", ("line", "line", "text"), *columns, rows=rows))


def mechanisms(family: str) -> str:
    """The kinds of a family with their other names, each linked to its page."""
    registry, rows = FAMILIES[family], []
    for kind in registry.list():
        entry = registry.get(kind)
        page = entry.module.__module__.rpartition(".")[2]
        others = [f"`{alias.name}`" for alias in registry.aliases().values() if alias.kind == kind]
        rows.append({"kind": f"[`{kind}`]({page}.md)", "aliases": ", ".join(others), "summary": entry.summary})
    return markdown(
        table("", ("kind", "kind", "text"), ("aliases", "also", "text"), ("summary", "what it is", "text"), rows=rows)
    )


def settings(which: str, *names: str) -> str:
    """The settings of `train`, or those that `compare` adds or has another default for; all, or those named."""
    model: type[TrainSettings] = {"train": TrainSettings, "compare": CompareSettings}[which]
    rows = []
    for name in names or model.__annotations__:
        field = model.model_fields[name]
        default = field.get_default(call_default_factory=True)
        shown = "" if default in (None, (), {}) else f"`{_plain(default)}`"
        rows.append({"name": f"`{name}`", "default": shown, "description": field.description})
    headings = {"name": "setting", "default": "default", "description": "meaning"}
    return markdown(table("", *((key, heading, "text") for key, heading in headings.items()), rows=rows))


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def source(file: str, name: str) -> str:
    """A function of the package as its file has it, so that a page shows the code that runs."""
    text = (ROOT / "src" / "headwise" / file).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            code = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
            return f"```python\n{code}\n```\n"
    raise MacroError(f"{file} has no function {name}")


def refused(*lines: str) -> str:
    """What is said of lines that describe no architecture."""
    errors = []
    for line in lines:
        try:
            parse(line)
        except SpecError as error:
            errors.append(f"error: {error}")
        else:
            raise MacroError(f"{line!r} is no mistake")
    return "```text\n" + "\n\n".join(errors) + "\n```\n"


def usage(command: str) -> str:
    """What `headwise COMMAND --help` prints."""
    out = io.StringIO()
    with patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"), contextlib.redirect_stdout(out):
        main([*command.split(), "--help"])
    return f"```text\n{out.getvalue().rstrip()}\n```\n"


def commands() -> str:
    """The commands, with a line about each."""
    return "".join(f"- [`headwise {name}`](#headwise-{name}): {summary}\n" for name, summary in COMMANDS.items())


def compared(name: str) -> str:
    """The table and the verdicts of a comparison kept in docs/figures."""
    result = CompareResult.load(FIGURES / f"{name}.json")
    columns = [(str(n), heading, "text" if n == 0 else "text right") for n, heading in enumerate(COLUMNS)]
    rows = [{str(n): escape(cell) for n, cell in enumerate(cells(result, v))} for v in result.variants]
    about = f"{len(result.seeds)} seeds on {result.environment.cpu}, {result.environment.cores} cores."
    sentences = "".join(f"> {sentence}\n>\n" for sentence in result.verdict_lines())
    return f"{markdown(table(about, *columns, rows=rows))}\n{sentences}"


MACROS: dict[str, Callable[..., str]] = {
    macro.__name__: macro
    for macro in (
        measured,
        counts,
        presets,
        published,
        mechanisms,
        settings,
        refused,
        source,
        usage,
        commands,
        compared,
    )
}
