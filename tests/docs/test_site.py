"""The documentation builds without network, every mechanism has its page, and links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from headwise.attention import AttentionSpec
from headwise.errors import HeadwiseError
from headwise.registry import FAMILIES, ComponentSpec
from headwise.spec import parse
from headwise.spec.model import ModelSpec
from headwise.spec.presets import PRESETS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MECHANISMS = DOCS / "mechanisms"
SECTIONS = ["What it computes", "The line", "When to use it", "Cost", "Measured", "Traps", "References"]
NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise OSError("the documentation must build without network")
socket.socket.connect = socket.getaddrinfo = refuse
"""


class Page(HTMLParser):
    """What a built page loads, what it links to, which anchors it has, and its text outside of code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.text = ""
        self._code = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link":
            self.loads.append(given["href"])
        self.loads += [given[name] for name in ("src", "srcset", "poster", "data") if name in given and tag != "a"]
        self._code += tag in ("code", "pre", "script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data: str) -> None:
        if not self._code:
            self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The built pages, made in a process that cannot reach any network."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "guard").mkdir()
    (folder / "guard" / "sitecustomize.py").write_text(NO_NETWORK)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder / "site")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(folder / "guard")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr
    pages = {path: Page(path) for path in (folder / "site").rglob("*.html")}
    assert len(pages) >= len(list(DOCS.rglob("*.md")))
    return pages


def test_pages_load_nothing_from_elsewhere(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        assert page.loads
        for url in page.loads:
            assert not urlsplit(url).scheme, f"{path.name} loads {url}"
            assert not url.startswith("//"), f"{path.name} loads {url}"
    folder = min(site, key=lambda path: len(path.parts)).parent
    for style in folder.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_links_lead_to_pages_and_anchors_that_are_there(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        if path.name == "404.html":  # its links start at the server's root
            continue
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or link in ("#", ""):
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path.resolve()
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path.name}: {link}"
            if url.fragment and target in site:
                assert url.fragment in site[target].anchors, f"{path.name}: {link}"


def test_nothing_is_left_unexpanded(site: dict[Path, Page]) -> None:
    """Placeholders, formulas and tables that were not read as such would stand in the text."""
    for path, page in site.items():
        for left in ("{{", "}}", "$", "FORMULA", "|--", "\\frac"):
            assert left not in page.text, f"{path.name}: {left!r} in the text"


def kinds() -> list[tuple[str, str, Path]]:
    """(family, kind, page) of everything that is Headwise's own."""
    homes = {(family, kind): r.get(kind).module.__module__ for family, r in FAMILIES.items() for kind in r.list()}
    return [
        (family, kind, MECHANISMS / f"{home.rpartition('.')[2]}.md")
        for (family, kind), home in homes.items()
        if home.startswith("headwise.")
    ]


@pytest.mark.parametrize(("family", "kind", "page"), kinds(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_mechanism_has_a_page_that_names_it_whole(family: str, kind: str, page: Path) -> None:
    assert page.exists(), f"{family} {kind} has no page docs/mechanisms/{page.name}"
    text, registry = page.read_text(encoding="utf-8"), FAMILIES[family]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    assert re.search(rf"\b{kind}\b", text)
    for alias in registry.aliases().values():
        if alias.kind == kind:
            assert f"`{alias.name}" in text, f"the other name {alias.name} is missing"
    # What all attention kinds share stands on the page of softmax attention.
    elsewhere = (
        AttentionSpec.model_fields if family == "attention" and kind != "softmax" else ComponentSpec.model_fields
    )
    for field in set(registry.get(kind).spec.model_fields) - set(elsewhere):
        assert f"| `{field}` |" in text, f"the field {field} is missing"


@pytest.mark.parametrize("name", ["block-order", "initialisation"])
def test_the_rest_of_a_layer_has_pages_too(name: str) -> None:
    text = (MECHANISMS / f"{name}.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    field = {"block-order": "order", "initialisation": "init"}[name]
    for value in ModelSpec.model_fields[field].annotation.__args__:  # type: ignore[union-attr]
        assert f"| `{value}` |" in text


def test_every_field_of_a_model_is_explained() -> None:
    text = (DOCS / "line-grammar.md").read_text(encoding="utf-8")
    for field in set(ModelSpec.model_fields) - {"preset"}:
        assert f"`{field}`" in text, field


def test_every_preset_and_setting_is_in_the_built_pages(site: dict[Path, Page]) -> None:
    from headwise.lab.settings import CompareSettings
    from headwise.train.settings import TrainSettings

    pages = {path.stem: unescape(path.read_text(encoding="utf-8")) for path in site}
    for preset, about in PRESETS.items():
        assert f"<code>{preset}</code>" in pages["presets"]
        assert all(f'{preset}(size="{size}")' in pages["presets"] for size in about.sizes)
    for setting in TrainSettings.model_fields:
        assert f"<code>{setting}</code>" in pages["training"], setting
    for setting in set(CompareSettings.model_fields) - set(TrainSettings.model_fields):
        assert f"<code>{setting}</code>" in pages["fairness-and-statistics"], setting


def test_every_command_has_a_section() -> None:
    from headwise.cli import COMMANDS

    headings = re.findall(r"^## headwise (.*)$", (DOCS / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(headings) == sorted(COMMANDS)


def test_dependencies_are_those_of_the_package() -> None:
    """Both ways: none undocumented, none documented that is gone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: needed for name, needed in project["optional-dependencies"].items() if name != "dev"}
    wanted = {_name(need) for need in [*project["dependencies"], *(need for each in extras.values() for need in each)]}
    text = (DOCS / "dependencies.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| (?:`(?:{'|'.join(extras)})` \| )?`([^`]+)` \|", text, re.MULTILINE)
    assert sorted(rows) == sorted(wanted)


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0]


def test_every_line_shown_can_be_read() -> None:
    """Indented lines that begin with a preset's name are architectures."""
    shown = re.compile(rf"^    ((?:{'|'.join(PRESETS)})(?:\(.*\))?)$", re.MULTILINE)
    lines = [(page, line) for page in DOCS.rglob("*.md") for line in shown.findall(page.read_text(encoding="utf-8"))]
    assert len(lines) > 40
    for page, line in lines:
        try:
            parse(line)
        except HeadwiseError as error:
            pytest.fail(f"{page.name}: {error}")
