"""The report in a real browser: nothing loaded, nothing executed, nothing cut off; on phone, desktop and paper."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from made_results import LINES, make_inputs, make_result
from playwright.sync_api import Browser, Page

from headwise.lab.report import build_report, plots, report_html
from headwise.lab.result import CompareResult, Measurements, Series
from headwise.lab.summary import summarise

FIGURES = 5
SCREENS = [(width, scheme) for width in (390, 1440) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def result() -> CompareResult:
    return make_result()


@pytest.fixture(scope="module")
def html(result: CompareResult) -> str:
    return report_html(result)


@pytest.fixture(scope="module")
def report(result: CompareResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(result, tmp_path_factory.mktemp("report"))


@contextmanager
def opened(browser: Browser, path: Path, width: int = 1440, scheme: str = "light") -> Iterator[tuple[Page, list[str]]]:
    """The page, and what it must not do: messages on the console, errors, requests beyond the file itself."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints: list[str] = []
    page = context.new_page()
    page.on("console", lambda message: complaints.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("request", lambda request: complaints.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    yield page, complaints
    context.close()


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_page_is_quiet_complete_and_fits(chromium: Browser, report: Path, width: int, scheme: str) -> None:
    with opened(chromium, report, width, scheme) as (page, complaints):
        boxes = [plot.bounding_box() for plot in page.locator("svg.plot").all() if plot.is_visible()]
        assert len(boxes) == FIGURES
        for box in boxes:
            assert box["width"] > 250
            assert box["height"] > 150
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator("summary").first.click()
        page.locator("summary").last.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints == []


@pytest.mark.parametrize("width", [390, 1440])
def test_text_of_plots_stays_inside_them(chromium: Browser, report: Path, width: int) -> None:
    """Fonts of the page differ from those the plot was laid out with; nothing may stick out by more than a hair."""
    outside = """() => [...document.querySelectorAll('svg.plot')].flatMap(s => {
        const box = s.getBoundingClientRect();
        return [...s.querySelectorAll('text')].filter(t => {
            const b = t.getBoundingClientRect();
            return b.left < box.left - 4 || b.right > box.right + 4 || b.top < box.top - 4 || b.bottom > box.bottom + 4;
        }).map(t => t.textContent)})"""
    with opened(chromium, report, width) as (page, _):
        assert page.evaluate(outside) == []


def test_a_script_in_a_line_is_text(chromium: Browser, report: Path, html: str) -> None:
    assert "<script" not in html
    with opened(chromium, report) as (page, complaints):
        assert page.title() == "5 architectures against gpt2 – Headwise"
        assert page.locator("script").count() == 0
        assert LINES[5] in page.locator("#lines ~ ol pre").all_text_contents()
    assert complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(chromium: Browser, report: Path, scheme: str) -> None:
    """WCAG: 4.5 for text, 3 for what a plot is read from."""
    with opened(chromium, report, scheme=scheme) as (page, _):

        def colour(name: str) -> str:
            return page.evaluate("n => getComputedStyle(document.documentElement).getPropertyValue(n).trim()", name)

        text = [(ink, paper) for ink in ("--ink", "--muted") for paper in ("--ground", "--card", "--code", "--band")]
        text += [(f"--{v}", f"--{v}-soft") for v in ("better", "worse", "equivalent", "undecided")]
        lines = [(f"--series-{i}", "--ground") for i in range(plots.N_SERIES + 1)]
        for pairs, least in ((text, 4.5), (lines, 3.0)):
            for front, back in pairs:
                assert contrast(colour(front), colour(back)) >= least, (front, back, scheme)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_dark_and_light_pages_use_the_same_plots(chromium: Browser, report: Path) -> None:
    """The colours of a plot come from the page: the same line is drawn in another colour in the dark."""
    seen = []
    for scheme in ("light", "dark"):
        with opened(chromium, report, scheme=scheme) as (page, _):
            fill = "getComputedStyle(document.querySelector('svg.plot.wide text')).fill"
            seen.append((page.evaluate(fill), page.evaluate("getComputedStyle(document.body).backgroundColor")))
    assert len(set(seen)) == 2
    assert all(ink != ground for ink, ground in seen)


def test_accessible_structure(chromium: Browser, report: Path) -> None:
    with opened(chromium, report) as (page, _):
        assert page.evaluate("document.documentElement.lang") == "en"
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b <= a + 1 for a, b in pairwise(levels))
        for plot in page.locator("svg.plot").all():
            assert plot.get_attribute("role") == "img"
            assert len(plot.get_attribute("aria-label") or "") > 40
        assert (
            page.locator("table").count() == page.locator("table:has(thead th[scope=col]):has(th[scope=row])").count()
        )
        assert page.locator(".scroll:not([aria-label])").count() == 0
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))


def test_verdicts_come_first_and_all_sections_follow(chromium: Browser, result: CompareResult, report: Path) -> None:
    with opened(chromium, report) as (page, _):
        sentences = page.locator(".verdicts li p").all_text_contents()
        assert sentences == result.verdict_lines()
        order = page.evaluate(
            "[...document.querySelectorAll('.verdicts, section')].map(e => e.getAttribute('aria-labelledby'))"
        )
        sections = ["differences", "curves", "seeds", "speed", "size", "rates", "lines", "failed", "again"]
        assert order == [None, *sections]
        body = page.inner_text("body")
        assert result.command in body
        assert result.dataset.fingerprint in body
        assert result.environment.cpu in body
        assert all(v.resolved in body for v in result.variants)
        assert all(f.error in body for f in result.failed_runs)


def test_paper_is_light_and_open(chromium: Browser, report: Path) -> None:
    with opened(chromium, report, scheme="dark") as (page, _):
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()") == "#1c1d21"
        assert page.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
        assert page.pdf(format="A4").startswith(b"%PDF")


# --- the text itself --------------------------------------------------------------------------------------------------


def test_nothing_outside_is_referred_to(html: str) -> None:
    assert re.findall(r"(?:src|href)\s*=\s*\"(?!#|data:,)[^\"]*", html) == []
    assert re.findall(r"url\((?!#)", html) == []
    assert "@import" not in html
    ids = set(re.findall(r'\bid="([^"]+)"', html))
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= ids
    assert set(re.findall(r'href="#([^"]+)"', html)) <= ids
    assert re.findall(r"#[abc]0000\d", html) == []  # no stand-in colour is left


@pytest.mark.usefixtures("warm_python")
def test_the_same_result_gives_the_same_bytes(html: str, report: Path, result: CompareResult, tmp_path: Path) -> None:
    """In another process too, with another hash seed: nothing depends on time or on the order of a set."""
    saved = result.save(tmp_path)
    code = (
        "import sys; from headwise.lab.report import build_report; from headwise.lab.result import CompareResult\n"
        "build_report(CompareResult.load(sys.argv[1]), sys.argv[2])"
    )
    target = tmp_path / "again.html"
    subprocess.run([sys.executable, "-c", code, str(saved), str(target)], check=True)
    assert target.read_text(encoding="utf-8") == html == report.read_text(encoding="utf-8")


def test_one_variant_says_its_verdict_in_the_title() -> None:
    text = report_html(make_result(LINES[:2]))
    assert "<h1>llama is better than gpt2</h1>" in text
    variants, runs, setup, _ = make_inputs(["gpt2", "gpt2"])
    for run in runs:
        run.val_loss = 2.0 + run.seed
    assert "<h1>gpt2 #2 is equivalent to gpt2</h1>" in report_html(summarise(variants, runs, setup))


@pytest.mark.parametrize("case", ["one seed", "no baseline", "nothing measured", "ten variants"])
def test_thin_results_still_make_a_page(case: str, chromium: Browser, tmp_path: Path) -> None:
    variants, runs, setup, rounds = make_inputs(LINES[:3], n_seeds=1 if case == "one seed" else 6)
    if case == "no baseline":
        for run in runs:
            if run.variant == 0:
                run.error = "out of memory"
    if case == "nothing measured":
        rounds = [Measurements() for _ in variants]
        for run in runs:
            run.train_curve = run.val_curve = Series()
        for variant in variants:
            variant.params_by_part, variant.lr, variant.lr_grid = {}, None, []
        setup.environment = type(setup.environment)()
    if case == "ten variants":
        variants, runs, setup, rounds = make_inputs([f"gpt2(n_layers={i})" for i in range(11)])
    path = build_report(summarise(variants, runs, setup, rounds), tmp_path / "page.html")
    with opened(chromium, path, 390) as (page, complaints):
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator(".verdict").count() == len(variants) - 1
    assert complaints == []


def test_characters_no_font_of_matplotlib_has_cause_no_warning() -> None:
    text = report_html(make_result(["gpt2", "llama(名前=🙂)", "a & b < c > $d$ \\frac"], failures=False))
    assert "名前" in text
    assert "a &amp; b &lt; c &gt; $d$ \\frac</text>" in text  # in a plot, and not as a formula
