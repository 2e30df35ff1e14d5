"""mkdocs hooks: placeholders filled from the code and the measured figures, formulas as MathML."""

from __future__ import annotations

import logging
from typing import Any

from doc_macros import MacroError, expand
from doc_maths import FormulaError, put_back, take_out
from mkdocs.exceptions import PluginError

_formulas: dict[str, list[str]] = {}


def on_config(config: Any) -> None:
    """`mkdocs build --quiet` drops warnings before `--strict` has counted them, and then fails at nothing."""
    logger = logging.getLogger("mkdocs")
    logger.setLevel(min(logger.level, logging.WARNING))


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Before Markdown is read."""
    try:
        text, _formulas[page.file.src_uri] = take_out(expand(markdown))
    except (MacroError, FormulaError) as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from None
    return text


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """After it was read; wide tables get a frame that scrolls, so that phones do not."""
    html = html.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return put_back(html, _formulas.pop(page.file.src_uri))
