"""The report of an A/B in a real browser: nothing loaded, nothing executed, nothing cut off, the verdict first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made_abs import make_ab
from playwright.sync_api import Browser

from headwise.lab.ab.result import ABResult
from headwise.lab.report.ab import report_html

FIGURES = 6


@pytest.fixture(scope="module")
def result() -> ABResult:
    return make_ab()


@pytest.fixture(scope="module")
def report(result: ABResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ab") / "report.html"
    path.write_text(report_html(result))
    return path


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1440, "light")])
def test_page_is_quiet_complete_and_fits(chromium: Browser, report: Path, width: int, scheme: str) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    complaints: list[str] = []
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if request.url != report.as_uri() else None)
    page.goto(report.as_uri())
    boxes = [plot.bounding_box() for plot in page.locator("svg.plot").all() if plot.is_visible()]
    assert len(boxes) == FIGURES
    for box in boxes:
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("h1").text_content() == "4 ways to distil against flat"
    assert page.locator(".verdicts").first.locator(".verdict.better").count() == 3
    headings = page.locator("h2").all_text_contents()
    assert headings[:4] == [
        *("The claims of document 004", "Differences to the baseline", "Training", "Student and projected teacher")
    ]
    context.close()
    assert complaints == []


def test_the_report_says_in_words_that_a_cosine_is_worth_nothing(report: Path) -> None:
    html = report.read_text()
    assert re.search(r"reaches a cosine of 0\.97\d with its own teacher and 0\.96\d with shuffled ones", html)
    assert "This cosine shows no alignment" in html
    assert 'class="badge worse">collapsed' in html


def test_an_ab_without_likeness_claims_or_parts_has_no_empty_sections() -> None:
    html = report_html(make_ab("none", n_seeds=1))
    for anchor in ('id="claims"', 'id="likeness"', 'id="contrasts"'):
        assert anchor not in html
    assert "no seed finished on both sides" in html


def test_the_same_result_gives_the_same_page_and_a_script_in_a_name_is_text() -> None:
    odd = "<script>document.title='executed'</script>"
    result = make_ab("none", n_seeds=1).model_copy(update={"student": odd, "teacher": [odd]})
    html = report_html(result)
    assert "<script" not in html
    assert report_html(result) == html
