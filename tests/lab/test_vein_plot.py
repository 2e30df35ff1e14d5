"""What the veins of a comparison's lines lose: kept with the runs, and drawn only where there is something to draw."""

from __future__ import annotations

import json
import re
from pathlib import Path

from made_results import make_inputs

from headwise.lab.folder import read_record
from headwise.lab.report import plots, report_html
from headwise.lab.report.svg import NARROW, WIDE
from headwise.lab.result import CompareResult, Series
from headwise.lab.summary import MAX_CURVE_POINTS, summarise
from headwise.train.folder import RunFolder

LINES = ["llama", "llama(ffn=vft(rank=16))", "llama(ffn=vft(rank=4))"]


def with_veins(apart: float = 0.1) -> CompareResult:
    """Three lines, the last two with a vein in each of two layers, whose ε falls from 0.9 to 0.1 + layer · apart."""
    variants, runs, setup, rounds = make_inputs(LINES, n_seeds=3, failures=False)
    steps = list(range(1, 301))
    for run in runs:
        for layer in (0, 1) if run.variant else ():
            end = 0.1 + layer * apart + run.seed / 100
            values = [0.9 + (end - 0.9) * step / 300 for step in steps]
            run.eps[f"stack.blocks.{layer}.ffn"] = Series(step=steps, loss=values)
    return summarise(variants, runs, setup, rounds)


def test_the_plot_says_where_every_layer_ends() -> None:
    result = with_veins()
    plot = plots.eps_plot(result)
    assert plot is not None
    for line in LINES[1:]:
        assert f"{line}: layer 0 ends at 0.110, layer 1 ends at 0.210" in plot.text
    assert plot.wide.count("layer 1</text>") == 2
    page = report_html(result)
    assert "What the veins lose" in page
    assert plot.wide in page


def test_names_of_layers_that_end_together_stand_one_above_the_other() -> None:
    """Beside the plotted area, in the order of the curves."""
    plot = plots.eps_plot(with_veins(apart=1e-4))
    assert plot is not None
    for picture, width in ((plot.wide, WIDE), (plot.narrow, NARROW)):
        names = re.findall(r'x="([\d.]+)" y="([\d.]+)"[^>]*>layer (\d)<', picture)
        assert [layer for *_, layer in names] == ["0", "1"] * 2
        for (x, low, _), (_, high, _) in zip(names[::2], names[1::2]):
            assert float(low) - float(high) >= 12
            assert float(x) + 42 <= width


def test_without_veins_there_is_no_plot() -> None:
    result = summarise(*make_inputs(LINES, failures=False))
    assert plots.eps_plot(result) is None
    assert "What the veins lose" not in report_html(result)


def test_the_curves_are_thinned_and_survive_the_file(tmp_path: Path) -> None:
    result = with_veins()
    eps = result.variants[1].curves[0].eps
    assert set(eps) == {"stack.blocks.0.ffn", "stack.blocks.1.ffn"}
    assert all(len(series.step) == MAX_CURVE_POINTS for series in eps.values())
    assert CompareResult.load(result.save(tmp_path)) == result


def test_a_runs_log_gives_its_record(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    records = [
        {"step": step, "loss": 2.0, "stack.blocks.0.ffn.eps_mean": 0.9 - step / 100, "stack.blocks.0.ffn.eps_max": 1.0}
        for step in (10, 20)
    ]
    folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    folder.result_json.write_text(json.dumps({"val_loss": 2.0, "bits_per_byte": 3.0, "seconds": 1.0}))
    record = read_record(folder, 0, 0)
    assert record is not None
    assert record.eps == {"stack.blocks.0.ffn": Series(step=[10, 20], loss=[0.8, 0.7])}
