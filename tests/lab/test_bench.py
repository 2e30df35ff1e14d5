"""Benchmarks: what a core leaves out, when a kind is left out, where lines cross, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import headwise as hw
from headwise import kernels
from headwise.errors import HeadwiseError, SettingsError
from headwise.kernels.attention import naive
from headwise.lab.bench import cases as bench_cases
from headwise.lab.bench import run as bench_run
from headwise.lab.bench.cases import BASELINE, Bed, attention_spec, cases, mechanism, stock, typical_calls
from headwise.lab.bench.result import BenchResult, Crossover, Point, Row, crossing, crossover, crossover_words
from headwise.lab.bench.settings import BenchSettings
from headwise.lab.display import Row as Shown
from headwise.lab.report.bench import report_html
from headwise.lab.result import Environment, Ratio
from headwise.lab.timing import interleaved, kept_bytes, peak_bytes
from headwise.registry import ATTENTION, POSITION
from headwise.spec.grammar import read_value

SMALL: dict[str, Any] = {"n_heads": 2, "head_dim": 8, "device": "cpu", "lengths": (16, 32), "rounds": 5}


def bed(**changes: Any) -> Bed:
    return Bed(BenchSettings(**{**SMALL, **changes}))


# --- settings ---------------------------------------------------------------------------------------------------------


def test_lengths_double_from_first_to_last_or_are_a_list() -> None:
    assert BenchSettings(lengths="512:16384").lengths == (512, 1024, 2048, 4096, 8192, 16384)
    assert BenchSettings(lengths="500:1999").lengths == (500, 1000)
    assert BenchSettings(lengths="7:7").lengths == (7,)
    assert BenchSettings(lengths="512,2048").lengths == (512, 2048)
    assert BenchSettings(lengths=64).lengths == (64,)


@pytest.mark.parametrize("lengths", ["512-2048", "2048:512", "0:8", "a,b", "", "1", "1:2:3"])
def test_malformed_lengths_say_how_to_write_them(lengths: str) -> None:
    with pytest.raises(SettingsError, match="lengths: ") as error:
        BenchSettings(lengths=lengths)
    assert "\n" not in str(error.value)


def test_kinds_are_split_where_no_bracket_holds_the_comma() -> None:
    found = BenchSettings(kinds=" softmax, window(256, kv_heads=2),mqa ").kinds
    assert found == ("softmax", "window(256, kv_heads=2)", "mqa")
    with pytest.raises(SettingsError, match="all stands alone"):
        BenchSettings(kinds="all,softmax")


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(SettingsError) as error:
        cases(bed(kinds="sofmax,window(0),window,pattern(softmax, mqa)", position="learned"))
    text = str(error.value)
    assert "did you mean 'softmax'" in text
    for piece in ("window(0)", "window: window: missing", "pattern is several kinds", "learned does not act"):
        assert piece in text
    with pytest.raises(SettingsError, match=r"unknown subject 'atention' \(did you mean 'attention'"):
        hw.bench("atention")
    with pytest.raises(SettingsError, match="rounds"):
        BenchSettings(rounds=4)


# --- cases ------------------------------------------------------------------------------------------------------------


def test_all_means_one_call_of_every_kind() -> None:
    calls = typical_calls()
    assert [ATTENTION.spec(read_value(call)).kind for call in calls] == ATTENTION.list()
    assert "window(256)" in calls
    assert [case.label for case in cases(bed())] == [BASELINE, *calls]


def test_a_kind_that_registers_itself_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    softmax = ATTENTION.get("softmax")
    entry = type(softmax)("newcomer", softmax.spec, softmax.module, "")
    monkeypatch.setitem(ATTENTION._entries, "newcomer", entry)
    assert "newcomer" in typical_calls()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("call", ["softmax", "gqa(kv_heads=1)", "window(5)", "softmax(qk_norm=true)"])
def test_a_core_is_the_layer_without_its_projections(call: str, causal: bool) -> None:
    """On the results of the projections it gives what the layer gave before its last map."""
    one = bed(kinds=call, causal=causal)
    spec = attention_spec(call, one)
    torch.manual_seed(0)
    work = mechanism(one, spec, POSITION.spec("rope"), 16)
    y_BTF = work.forward()
    layer = work.own
    assert isinstance(layer, torch.nn.Module)
    assert y_BTF.shape == (1, 16, 16)
    x_BTC = one.random(1, 16, 16)
    del layer._project
    code = POSITION.build("rope", one.dims(16)).encode(torch.arange(16), 16, 8)
    whole = layer(x_BTC, context=bench_cases.Context(causal=causal, encoding=code))[0]
    torch.testing.assert_close(layer.wo(y_BTF), whole)  # type: ignore[operator]
    gradients = torch.autograd.grad(y_BTF, work.leaves, torch.ones_like(y_BTF), allow_unused=True)
    assert sum(g is not None for g in gradients) == (5 if "qk_norm" in call else 3)


@pytest.mark.parametrize("call", typical_calls())
def test_the_core_of_every_kind_is_its_layers(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is registered: its projections are found, and what is left gives what the layer gave before its last
    map. A kind whose projections were missed would be charged for them."""
    one = bed(kinds=call, n_heads=4, head_dim=16)
    torch.manual_seed(0)
    layer = ATTENTION.build(attention_spec(call, one), one.dims(32))
    x_BTC = one.leaf(1, 32, 64)

    def forward() -> torch.Tensor:
        return layer(x_BTC, context=bench_cases.Context(causal=True))[0]

    weights: list[torch.Tensor] = []
    torch_linear = F.linear

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weights.append(weight)
        return torch_linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", noted)
    whole = forward()
    monkeypatch.undo()
    core, ready = bench_cases.core(layer, x_BTC, forward)
    assert sum(y.shape[-1] for y in ready) >= 3 * 8
    torch.testing.assert_close(F.linear(core(), weights[-1]), whole)
    (from_input,) = torch.autograd.grad(core().sum(), [x_BTC], allow_unused=True)
    assert from_input is None


def test_a_core_keeps_maps_that_read_something_else_than_the_input() -> None:
    """A map of a map's result is the mechanism's own work; only maps of the input are handed in ready."""

    class Latent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up, self.out = (torch.nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.up(self.down(x)).tanh())

    layer, x = Latent(), torch.randn(1, 3, 8, requires_grad=True)
    forward, ready = bench_cases.core(layer, x, lambda: layer(x))
    (down,) = ready
    torch.testing.assert_close(down, layer.down(x))
    torch.testing.assert_close(forward(), layer.up(layer.down(x)).tanh())
    used = torch.autograd.grad(forward().sum(), [x, down, *layer.parameters()], allow_unused=True)
    assert [g is not None for g in used] == [False, True, False, True, False]
    torch.testing.assert_close(F.linear(x, layer.up.weight), x @ layer.up.weight.T)  # torch's own is back


@pytest.mark.parametrize("level", ["core", "layer"])
def test_torchs_own_is_attention(level: str) -> None:
    one = bed(level=level)
    y = stock(one, 16).forward()
    if level == "layer":
        assert y.shape == (1, 16, 16)
        return
    q, k, v = (one.random(1, 2, 16, 8, seed=seed) for seed in range(3))
    torch.testing.assert_close(y, naive.attention(q, k, v, scale=8**-0.5)[0])


def test_the_readable_form_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []
    monkeypatch.setattr("headwise.attention.base.naive_wanted", lambda: wanted.append(kernels.naive_wanted()))
    one = bed(kinds="softmax", naive=True)
    for case in cases(one)[1:]:
        work = case.make(16)
        wanted.clear()
        case.step(work, one)()
        assert wanted == [case.label == "softmax, naive"]


def test_a_head_width_of_its_own_reaches_the_calls() -> None:
    one = bed(d_model=32)
    assert attention_spec("softmax", one).head_dim == 8  # type: ignore[attr-defined]
    assert attention_spec("softmax(head_dim=4)", one).head_dim == 4  # type: ignore[attr-defined]
    assert mechanism(one, attention_spec("softmax", one), POSITION.spec("none"), 16).forward().shape == (1, 16, 16)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    out = tmp_path_factory.mktemp("bench") / "out"
    made = hw.bench("attention", **SMALL, kinds="softmax,window(4)", naive=True, threads=1, out=out)
    assert BenchResult.model_validate_json((out / "result.json").read_text()) == made
    assert (out / "report.html").read_text() == report_html(made)
    return made


def test_every_kind_has_a_point_at_every_length(result: BenchResult) -> None:
    labels = [BASELINE, "softmax", "softmax, naive", "window(4)", "window(4), naive"]
    assert [row.label for row in result.rows] == labels
    for row in result.rows:
        assert [p.length for p in row.points] == result.lengths == [16, 32]
        for point in row.points:
            assert len(point.seconds) == 5
            assert min(point.seconds) > 0
            assert point.ratio is not None
            assert point.kept_bytes
            assert point.skipped is None
    assert result.row(BASELINE).crossover is None
    kept = {label: result.row(label).at(32).kept_bytes for label in labels}  # type: ignore[union-attr]
    assert kept["softmax"] == kept[BASELINE]  # q, k, v, the output and the sums of each row
    assert kept["softmax, naive"] > kept["softmax"]  # type: ignore[operator]


def test_the_command_makes_the_same_settings_again(result: BenchResult) -> None:
    import shlex

    from headwise.cli.arguments import Parser

    parser = Parser("bench", "", "")
    parser.add_argument("subject")
    typed = parser.read(shlex.split(result.command)[2:], BenchSettings)
    again = BenchSettings(**typed.settings).model_dump(mode="json", exclude={"out", "d_model"})
    assert again == {name: value for name, value in result.settings.items() if name != "d_model"}


def test_forward_alone_keeps_nothing_for_a_backward_pass() -> None:
    made = hw.bench("attention", **SMALL, kinds="softmax", backward=False, level="layer")
    assert all(p.kept_bytes is None and p.seconds for row in made.rows for p in row.points)


def _account(known: list[tuple[int, float, float]], spent: float = 0.0) -> bench_run._Account:
    case = bench_cases.Case("x", "headwise", lambda length: pytest.fail("made"))
    return bench_run._Account(case, Shown("x", 1), spent, known=known)


def test_cost_is_predicted_between_linear_and_quadratic() -> None:
    assert _account([(64, 1.0, 10.0)]).predicted(128) == (4.0, 40.0)
    assert _account([(64, 1.0, 10.0), (128, 2.0, 80.0)]).predicted(256) == (4.0, 320.0)
    assert _account([(64, 1.0, 0.0), (128, 0.5, 0.0)]).predicted(256) == (1.0, 0.0)


def test_a_length_beyond_the_budget_or_the_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    one = bed(budget=10.0, rounds=5)
    run = bench_run._Run(one, cases(one)[:2], bench_run.make_display(False))
    monkeypatch.setattr(bench_run, "free_bytes", lambda device: 1e6)
    dear = _account([(16, 1.0, 1.0)], spent=3.0)  # 4 s a step at 32 tokens, 8 steps
    assert run._too_dear(dear, 32) == "left out: about 35.0 s in all, over the budget of 10.0 s"
    large = _account([(16, 1e-6, 1e6)])
    assert run._too_dear(large, 32) == "left out: about 4.00 MB of memory, 1.00 MB are free"
    assert run._too_dear(_account([(16, 0.1, 1.0)]), 32) is None
    run.accounts[0].known, run.accounts[0].spent = [(16, 9.0, 1.0)], 99.0
    assert run._too_dear(run.accounts[0], 32) is None  # torch's own


def test_a_kind_that_refuses_a_length_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(one: Bed, length: int) -> bench_cases.Work:
        if length == 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried …")
        raise HeadwiseError("not at\nthis length")

    made = cases(bed(kinds="softmax"))
    extra = bench_cases.Case("fragile", "peer", lambda length: refuse(bed(), length))
    monkeypatch.setattr(bench_run, "cases", lambda one: [*made, extra])
    found = hw.bench("attention", **SMALL, kinds="softmax", threads=1)
    assert [p.skipped for p in found.row("fragile").points] == ["not at this length", "out of memory"]
    assert found.row("fragile").crossover == Crossover(outcome="unknown")
    assert all(p.seconds for p in found.row("softmax").points)
    fault = bench_cases.Case("fault", "peer", lambda length: 1 // 0)  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(bench_run, "cases", lambda one: [*made, fault])
    with pytest.raises(ZeroDivisionError):  # a bug is a bug, and shows where
        hw.bench("attention", **SMALL, kinds="softmax")


def test_a_long_first_length_is_approached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known before the first length, so a long one alone could take an hour before the budget is seen."""
    monkeypatch.setattr(bench_run, "LONG", 16)
    lengths = []
    made = cases(bed(kinds="softmax"))

    def noted(case: bench_cases.Case) -> bench_cases.Case:
        return bench_cases.Case(case.label, case.source, lambda n: lengths.append(n) or case.make(n))  # type: ignore[func-returns-value]

    monkeypatch.setattr(bench_run, "cases", lambda one: [noted(case) for case in made])
    found = hw.bench("attention", **{**SMALL, "lengths": 32}, kinds="softmax")
    assert lengths == [4, 8, 32] * 2
    assert [p.length for p in found.rows[1].points] == [32]


# --- crossovers -------------------------------------------------------------------------------------------------------


def points(*ratios: float, spread: float = 0.0) -> list[Point]:
    return [
        Point(length=512 << i, ratio=Ratio(ratio=r, lo=r - spread, hi=r + spread), seconds=[1.0])
        for i, r in enumerate(ratios)
    ]


def test_crossings_are_drawn_in_the_logarithms() -> None:
    assert crossing([512, 2048], [2.0, 0.5]) == pytest.approx(1024)
    assert crossing([512, 1024], [0.9, 0.8]) == 512
    assert crossing([512, 1024], [0.9, 1.0]) is None
    assert crossing([512, 1024, 2048, 4096], [0.5, 2.0, 2.0, 0.5]) == pytest.approx(2048 * 2**0.5)


@given(st.floats(0.3, 3), st.floats(0.2, 2))
def test_a_power_law_crosses_where_it_should(scale: float, power: float) -> None:
    """ratio = scale · (1000 / length)^power crosses 1 at 1000 · scale^(1/power), seen where that was measured."""
    lengths = [64 << i for i in range(12)]
    found = crossing(lengths, [scale * (1000 / n) ** power for n in lengths])
    true = 1000 * scale ** (1 / power)
    if true >= lengths[-1]:
        assert found is None
    else:
        assert found == pytest.approx(max(true, lengths[0]))


def test_words_of_a_crossover_are_honest() -> None:
    def words(found: list[Point]) -> str:
        return crossover_words(Row(label="x", source="headwise", points=found, crossover=crossover(found)))

    assert words(points(2.0, 1.0, 0.5)) == "from ≈ 1,020 (1,020 to 1,020)"
    assert words(points(0.9, 0.8)) == "at every length from 512"
    assert words(points(0.9, 0.99, spread=0.05)) == "at every length from 512, unsure"
    assert words(points(0.9, 1.5)) == "not up to 1,024"
    assert words(points(0.9, 1.02, spread=0.05)) == "not up to 1,024, unsure"
    assert words([Point(length=512, skipped="left out")]) == "not measured"
    # The upper end of the interval never comes below 1: no end to the range is claimed.
    assert words(points(2.0, 0.95, spread=0.1)) == "from ≈ 976, unsure"


# --- measuring --------------------------------------------------------------------------------------------------------


def test_tasks_take_turns_at_going_first() -> None:
    order: list[str] = []
    done: list[str] = []
    tasks = {name: (lambda name=name: order.append(name)) for name in "abc"}  # type: ignore[misc]
    seconds = interleaved(tasks, 3, done=done.append)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert order[3:] == done
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 3)
    assert interleaved({}, 3) == {}


def test_kept_bytes_are_those_of_what_is_saved() -> None:
    x, w = torch.randn(10, 10, requires_grad=True), torch.nn.Linear(10, 10, bias=False)
    assert kept_bytes(lambda: x.exp()) == 400
    assert kept_bytes(lambda: w(x), w) == 400
    assert kept_bytes(lambda: w(x)) == 800


def test_the_peak_is_that_of_the_work() -> None:
    found = peak_bytes(lambda: torch.ones(2**22).sum(), torch.device("cpu"))
    assert found is None or 15e6 < found < 40e6


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_needs_nothing_else_and_escapes_what_it_shows(result: BenchResult) -> None:
    row = Row(label="<b>&'", source="peer", points=[Point(length=16, skipped="<i>no</i>")], crossover=crossover([]))
    html = report_html(result.model_copy(update={"rows": [*result.rows, row]}))
    assert "<b>&" not in html
    assert "<i>no" not in html
    assert "http" not in html.replace("http-equiv", "").replace('xmlns="http', "")
    assert "<script" not in html
    assert all(f">{label}<" in html.replace("<wbr>", "") for label in ("softmax", "window(4)", "softmax, naive"))
    assert report_html(result) == report_html(result)


def test_a_result_without_any_figure_still_has_a_report() -> None:
    rows = [Row(label=BASELINE, source="torch", points=[Point(length=16, skipped="out of memory")])]
    settings = BenchSettings(**SMALL).model_dump(mode="json", exclude={"out"}) | {"d_model": 16, "threads": 1}
    empty = BenchResult(settings=settings, environment=Environment(), command="x", lengths=[16], rows=rows)
    assert "out of memory" in report_html(empty)
    json.dumps(empty.model_dump(mode="json"), allow_nan=False)


def test_an_out_that_is_a_file_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(SettingsError, match="is a file"):
        hw.bench("attention", out=tmp_path / "taken")
