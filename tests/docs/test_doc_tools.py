"""What fills the pages: formulas to MathML, placeholders, the figures they show."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools" / "docs"), str(ROOT / "benchmarks")]

from doc_macros import MacroError, expand  # noqa: E402
from doc_maths import FormulaError, put_back, take_out  # noqa: E402

import mechanisms  # noqa: E402
from figures.measuring import kept_bytes  # noqa: E402
from tables import markdown, shown, table  # noqa: E402

FIGURES = json.loads((ROOT / "docs" / "figures" / "mechanisms.json").read_text(encoding="utf-8"))


def test_formulas_leave_the_text_and_come_back_as_mathml() -> None:
    text, formulas = take_out("with $a_i * b_i$ and *stars*\n\n$$\\frac{a}{b}$$\n")
    assert "$" not in text
    assert "_" not in text
    html = put_back("<p>FORMULA0MARK</p><p>FORMULA1MARK</p>", formulas)
    assert html.count("<math") == 2
    assert '<div class="formula"><math' in html
    assert "<mfrac>" in html


CODE = ["`$a$ and $b$`", "``a ` $b$ $c$``", "```bash\necho $HOME $PATH\n```", "~~~\n$a$\n~~~"]


@pytest.mark.parametrize("text", [*CODE, "from $5 to $6 a day", "$ a $"])
def test_code_and_sums_of_money_are_no_formulas(text: str) -> None:
    assert take_out(text) == (text, [])


def test_more_than_ten_formulas_keep_their_places() -> None:
    """A mark that begins like another, as 1 and 10 do, must not be taken for it."""
    text, formulas = take_out(" ".join(f"$x_{{{n}}}$" for n in range(12)))
    assert [part for part in put_back(text, formulas).split("</math>") if part] == [
        part for part in " ".join(formulas).split("</math>") if part
    ]


@pytest.mark.parametrize("formula", [r"\unheardof x", r"\begin{aligned} a &= b \end{aligned}"])
def test_what_cannot_be_converted_stops_the_build(formula: str) -> None:
    with pytest.raises(FormulaError, match="cannot convert"):
        take_out(f"${formula}$")


@pytest.mark.parametrize("call", ["nothing()", "counts(open('x'))", "counts(1 +)", 'refused("llama")'])
def test_placeholders_that_cannot_be_filled_stop_the_build(call: str) -> None:
    with pytest.raises(MacroError):
        expand(f"before {{{{ {call} }}}} after")


def test_counts_are_those_of_the_line() -> None:
    from headwise.lab.render import quantity
    from headwise.spec import count

    page = expand("{{ counts('llama(d_model=64, n_layers=2)', context=128) }}")
    assert quantity(count("llama(d_model=64, n_layers=2)", 128).params) in page
    assert "128 tokens" in page


def test_cells() -> None:
    assert shown([1.234, 1.2, 1.3], "ratio") == "1.23× (1.20–1.30)"
    assert shown([1.0, None, None], "ratio") == "1.00×"
    assert [shown(n, "bytes") for n in (12, 1234, 12.3e6, 4e9)] == ["12 B", "1.23 kB", "12.3 MB", "4 GB"]
    assert shown(None, "bytes") == "–"
    made = table("Title.", ("a", "A", "text"), ("b", "B", "count"), rows=[{"a": "x", "b": 1234}])
    assert markdown(made) == "Title.\n\n| A | B |\n|---|--:|\n| x | 1,234 |\n"


def test_kept_figures_are_those_that_the_command_makes() -> None:
    assert set(FIGURES["tables"]) == set(mechanisms.tables())
    assert {"cpu", "torch", "date"} <= set(FIGURES["machine"])


def test_a_table_without_timings_comes_out_as_it_is_kept() -> None:
    kept, made = FIGURES["tables"]["rope_error"], mechanisms.tables()["rope_error"]()
    assert made["columns"] == kept["columns"]
    assert [row["name"] for row in made["rows"]] == [row["name"] for row in kept["rows"]]
    for row in made["rows"][1:]:
        assert row["exact"] < 1e-9, "a score depends on the distance alone"
        assert row["ours"] < 1e-5
    assert made["rows"][-1]["single"] > 100 * made["rows"][-1]["ours"]


def test_bytes_kept_for_backward_are_counted_exactly() -> None:
    import torch

    x = torch.randn(100, 10, requires_grad=True)
    layer = torch.nn.Linear(10, 10)
    assert kept_bytes(lambda: layer(x), layer) == x.nbytes
    assert kept_bytes(lambda: x.exp()) == x.nbytes
