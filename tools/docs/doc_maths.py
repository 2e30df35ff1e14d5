"""Formulas `$…$` and `$$…$$` as MathML, at build time: pages need no script and no network to show them.

Markdown would read underscores and stars inside a formula as its own, so formulas leave the text before Markdown is
read and come back after.
"""

from __future__ import annotations

import re

from latex2mathml.converter import convert

# What is no formula whatever it holds: fenced blocks and inline code.
_CODE = re.compile(r"(^ *(`{3,}|~{3,}).*?^ *\2`* *$)|(`+)(?!`).*?(?<!`)\3(?!`)", re.DOTALL | re.MULTILINE)
# As GitHub reads them: no space inside the dollars, no digit behind the second.
_FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?!\s)(?P<inline>[^$\n]+?)(?<!\s)\$(?!\d)", re.DOTALL)
_MARK = "FORMULA{}MARK"


class FormulaError(ValueError):
    """A formula with something that the converter does not know."""


def take_out(markdown: str) -> tuple[str, list[str]]:
    """The text with a mark in place of each formula, and the formulas' HTML in the order of their marks."""
    formulas: list[str] = []

    def one(found: re.Match[str]) -> str:
        formulas.append(to_html(found["block"] or found["inline"], block=found["block"] is not None))
        mark = _MARK.format(len(formulas) - 1)
        return f"\n\n{mark}\n\n" if found["block"] is not None else mark

    pieces, end = [], 0
    for code in _CODE.finditer(markdown):
        pieces += [_FORMULA.sub(one, markdown[end : code.start()]), code[0]]
        end = code.end()
    pieces.append(_FORMULA.sub(one, markdown[end:]))
    return "".join(pieces), formulas


def put_back(html: str, formulas: list[str]) -> str:
    """The page with the formulas where their marks are."""
    for number, formula in reversed(list(enumerate(formulas))):
        mark = _MARK.format(number)
        html = html.replace(f"<p>{mark}</p>", formula).replace(mark, formula)
    return html


def to_html(latex: str, *, block: bool) -> str:
    """A formula's MathML.

    Raises:
        FormulaError: the converter left something as it was: an unknown command, or an alignment it cannot do.
    """
    mathml = convert(latex.strip(), display="block" if block else "inline")
    text = re.sub(r"<[^>]*>", " ", mathml)
    if "\\" in text or re.search(r"&(?!#?\w+;)", text):
        raise FormulaError(f"cannot convert {latex.strip()!r}")
    # Bars come out as operators with space around them; they are brackets here.
    mathml = re.sub(
        r"<mo>(&#x0007C;|&#x02016;|&#x02225;)</mo>", r'<mo lspace="0" rspace="0" stretchy="false">\1</mo>', mathml
    )
    return f'<div class="formula">{mathml}</div>' if block else mathml
