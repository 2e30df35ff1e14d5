"""result.json: the promised schema, round trips, and the words and tables made from it."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from made_results import LINES, SCRIPT, make_inputs, make_result
from rich.console import Console

from headwise.errors import FormatError, SettingsError
from headwise.lab import stats
from headwise.lab.render import TERMINAL_COLUMNS, duration, quantity, signed
from headwise.lab.result import CompareResult, RunRecord, Series, render_table
from headwise.lab.summary import MAX_LABEL, make_labels, summarise, thin


@pytest.fixture(scope="module")
def result() -> CompareResult:
    return make_result()


def test_the_promised_schema_is_there(result: CompareResult, tmp_path: Path) -> None:
    """The names other programs read; a change here needs a new schema_version."""
    data = json.loads(result.save(tmp_path / "result.json").read_text(encoding="utf-8"))
    assert data["baseline"] == LINES[0]
    assert [v["line"] for v in data["variants"]] == LINES
    for variant in data["variants"]:
        promised = "line params flops_per_token val_loss diff train_tokens_per_s decode_tokens_per_s peak_memory_bytes"
        assert set(promised.split()) <= set(variant)
        assert {"mean", "ci95", "per_seed"} <= set(variant["val_loss"])
        assert len(variant["val_loss"]["per_seed"]) == len(data["seeds"])
    assert data["variants"][0]["diff"] is None
    promised = {"mean", "ci95", "p_holm", "effect_size", "min_detectable", "verdict"}
    assert all(promised <= set(v["diff"]) for v in data["variants"][1:])
    assert data["schema_version"] == 1


def test_saved_and_loaded_is_the_same(result: CompareResult, tmp_path: Path) -> None:
    result.save(tmp_path)
    assert CompareResult.load(tmp_path) == result == CompareResult.load(tmp_path / "result.json")
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "not a comparison's result"),
        (b"\xff\xfe", "cannot be read"),
        (b"[1, 2]", "not a comparison's result"),
        (b'{"baseline": "gpt2"}', "seeds: Field required"),
    ],
)
def test_a_file_that_is_no_result_says_so_in_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        CompareResult.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_newer_schema_asks_for_an_update(result: CompareResult, tmp_path: Path) -> None:
    """Checked before the fields: a newer file may well have fields that this version does not know."""
    data = json.loads(result.save(tmp_path / "result.json").read_text(encoding="utf-8"))
    data |= {"schema_version": 2, "something_new": 1}
    (tmp_path / "result.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(FormatError, match=r"schema 2.*update headwise"):
        CompareResult.load(tmp_path)


def test_numbers_are_those_of_the_statistics() -> None:
    variants, runs, setup, rounds = make_inputs()
    result = summarise(variants, runs, setup, rounds)
    rows = [[None] * 6 for _ in variants]
    for run in runs:
        if run.error is None and not math.isnan(run.val_loss):
            rows[run.variant][run.seed] = run.val_loss
    for variant, row, c in zip(result.variants[1:], rows[1:], stats.assess(rows[0], rows[1:]), strict=True):
        assert variant.val_loss.per_seed == row
        assert (variant.diff.mean, variant.diff.p_holm, variant.diff.verdict) == (c.mean, c.p_holm, c.verdict)
    assert result.variants[0].ratios.train.ratio == 1
    assert result.variants[1].ratios.memory.ratio == pytest.approx(5.9 / 6.1)
    assert result.variants[1].ratios.memory.lo is None
    assert result.margin_nats == pytest.approx(0.005 * result.variants[0].val_loss.mean)


def test_the_order_of_the_records_does_not_matter() -> None:
    variants, runs, setup, rounds = make_inputs()
    assert summarise(variants, runs[::-1], setup, rounds) == summarise(variants, runs, setup, rounds)


def test_failed_and_missing_runs_are_listed_and_lose_nothing_else() -> None:
    variants, runs, setup, rounds = make_inputs()
    missing = runs.pop(7)  # seed 1 of variant 1
    result = summarise(variants, runs, setup, rounds)
    failed = {(f.label, f.seed): f.error for f in result.failed_runs}
    assert failed == {
        (result.variants[2].label, 0): "the loss is not finite",
        (result.variants[1].label, missing.seed): "no record of this run",
        (result.variants[4].label, 5): runs[-2].error,
    }
    assert result.variants[1].diff.n == 5
    assert result.variants[3].diff.n == 6
    assert len(result.variants[1].curves) == 5


def test_a_comparison_whose_baseline_failed_still_has_a_result(tmp_path: Path) -> None:
    variants, runs, setup, rounds = make_inputs()
    for run in runs:
        if run.variant == 0:
            run.error = "out of memory"
    result = summarise(variants, runs, setup, rounds)
    assert {v.diff.verdict for v in result.variants[1:]} == {"undecided"}
    assert all("no seed finished" in line for line in result.verdict_lines())
    result.save(tmp_path)
    result._repr_html_()
    render_table(result)


def test_records_that_fit_nowhere_are_refused() -> None:
    variants, runs, setup, rounds = make_inputs()
    for bad in (RunRecord(variant=9, seed=0), RunRecord(variant=0, seed=77), runs[3]):
        with pytest.raises(SettingsError, match=f"variant {bad.variant}, seed {bad.seed}"):
            summarise(variants, [*runs, bad], setup, rounds)
    with pytest.raises(SettingsError, match="2 measurements for 6 variants"):
        summarise(variants, runs, setup, rounds[:2])
    with pytest.raises(SettingsError, match="nothing to compare"):
        summarise([], [], setup)


def test_labels_are_short_and_unique() -> None:
    long = "llama(" + "x" * 100
    labels = make_labels(["gpt2", "gpt2", long + "1)", long + "2)", "gpt2"])
    assert labels[:2] == ["gpt2", "gpt2 #2"]
    assert labels[4] == "gpt2 #3"
    assert len(set(labels)) == 5
    assert all(len(label) <= MAX_LABEL + 3 for label in labels)


def test_thinned_curves_keep_their_end_and_their_mean() -> None:
    series = Series(step=list(range(1, 1001)), loss=[math.exp(-i / 300) for i in range(1000)])
    thinned = thin(series, 200)
    assert len(thinned.step) == len(thinned.loss) == 200
    assert thinned.step[-1] == 1000
    assert sum(thinned.loss) / 200 == pytest.approx(sum(series.loss) / 1000)
    assert thin(thinned) == thinned
    assert thin(Series(step=[1, 2], loss=[math.nan, 2.0])) == Series(step=[2], loss=[2.0])


# --- words and tables -------------------------------------------------------------------------------------------------


def test_every_verdict_has_its_sentence(result: CompareResult) -> None:
    lines = result.verdict_lines()
    assert len(lines) == len(LINES) - 1
    for variant, line in zip(result.variants[1:], lines, strict=True):
        assert line.startswith(variant.label)
        assert variant.diff.verdict in line
        assert "\n" not in line
        if variant.diff.verdict == "undecided":
            assert "more seed" in line
    assert {v.diff.verdict for v in result.variants[1:]} == {"better", "worse", "equivalent", "undecided"}
    assert "identical" in lines[3]
    assert "1 seed left out" in lines[3]


@pytest.mark.parametrize("n_seeds", [1, 2, 4])
def test_few_seeds_are_called_too_few(n_seeds: int) -> None:
    result = make_result(LINES[:2], n_seeds=n_seeds)
    (line,) = result.verdict_lines()
    assert result.variants[1].diff.verdict == "undecided"
    assert "too few for a claim" in line


def test_a_real_but_negligible_difference_is_explained() -> None:
    variants, runs, setup, _ = make_inputs(LINES[:2])
    for run in runs:
        run.val_loss = 2.0 + 0.001 * run.variant + 1e-5 * run.seed * run.variant
    (line,) = summarise(variants, runs, setup).verdict_lines()
    assert "equivalent" in line
    assert "real, but smaller than the margin" in line


def test_csv_has_a_row_a_variant_and_exact_numbers(result: CompareResult, tmp_path: Path) -> None:
    text = result.to_csv(tmp_path / "result.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["line"] for row in rows] == LINES
    for row, variant in zip(rows, result.variants, strict=True):
        assert float(row["val_loss"]) == variant.val_loss.mean
        assert [row[f"val_loss_seed_{s}"] for s in result.seeds] == [
            "" if x is None else str(x) for x in variant.val_loss.per_seed
        ]
        assert row["verdict"] == (variant.diff.verdict if variant.diff else "")
    assert float(rows[1]["diff_lo"]) == result.variants[1].diff.ci95[0]


def test_notebook_table_escapes_lines(result: CompareResult) -> None:
    html = result._repr_html_()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert html.count("<tr>") == len(LINES) + 1
    for variant in result.variants[1:]:
        assert variant.diff.verdict in html


def printed(result: CompareResult, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(render_table(result))
    return console.file.getvalue()


def test_terminal_table_shows_lines_as_they_are(result: CompareResult) -> None:
    text = printed(result, 240)
    for variant in result.variants:
        assert variant.label in text
    assert all(name in text for name in TERMINAL_COLUMNS)
    plain = make_inputs(["gpt2", "llama[bold]"], failures=False)[:3]
    text = printed(summarise(*plain), 240)
    assert "llama[bold]" in text
    assert "Memory" not in text  # nothing was measured


@pytest.mark.parametrize("width", [72, 80])
def test_terminal_table_fits_a_terminal(result: CompareResult, width: int) -> None:
    text = printed(result, width)
    assert max(map(len, text.splitlines())) <= width
    for word in ("✓ better", "≈ equivalent", "? undecided", "more seeds", f"{result.variants[1].val_loss.mean:.4f}"):
        assert word in text  # only the line itself may be broken


def test_numbers_read_well() -> None:
    assert [signed(-0.01234), signed(0.5, 1), signed(-0.00001)] == ["−0.0123", "+0.5", "0.0000"]
    assert [quantity(x) for x in (65, 1234, 1_234_567, 124e6)] == ["65", "1.23 k", "1.23 M", "124 M"]
    assert [duration(x) for x in (3.21, 83, 3661)] == ["3.2 s", "1 min 23 s", "1 h 01 min"]


def test_results_load_without_torch_or_matplotlib() -> None:
    """A report is rebuilt and a result read on machines and in commands that should not pay for torch."""
    code = (
        "import sys, headwise.lab.summary, headwise.lab.render\n"
        "print([m for m in ('torch', 'matplotlib', 'rich', 'jinja2') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_awkward_line_is_kept_as_typed(result: CompareResult) -> None:
    assert result.variants[5].line == SCRIPT
