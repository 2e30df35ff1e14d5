"""Comparisons of real runs: fair, repeatable, resumable, and robust against every run that fails."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_comparisons import BREAKING, GPT2, LLAMA, QUICK, module_with, write_corpus

import headwise as hw
from headwise.errors import HeadwiseError, SettingsError, SpecError
from headwise.lab.compare import compare, resume_comparison
from headwise.lab.folder import CompareFolder
from headwise.lab.plan import make_plan
from headwise.lab.result import CompareResult
from headwise.lab.settings import FIRST_TUNE_SEED, CompareSettings
from headwise.lab.stats import assess
from headwise.train import TrainSettings, train

SEEDS = 10
# What becomes of real workers is the matter of test_runner.py; and a script of a user's, below, has its own.
pytestmark = pytest.mark.usefixtures("warm_python")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {**QUICK, "data": str(write_corpus(tmp_path_factory.mktemp("corpus")))}


@pytest.fixture(scope="module")
def finished(quick: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompareResult]:
    """A comparison with two workers, the baseline twice among its lines, speed and memory measured."""
    out = tmp_path_factory.mktemp("compare") / "out"
    lines = [GPT2, LLAMA, GPT2]
    return out, compare(lines, **{**quick, "seeds": SEEDS, "workers": 2, "measure_rounds": 1, "out": out})


def losses(result: CompareResult) -> list[list[float | None]]:
    return [variant.val_loss.per_seed for variant in result.variants]


# --- what a comparison is ---------------------------------------------------------------------------------------------


def test_a_run_is_the_run_that_train_makes(finished: tuple[Path, CompareResult], quick: dict[str, Any]) -> None:
    """The same batches and initial values for a seed whatever the line, and nothing of the other runs in it."""
    _, result = finished
    options = {name: value for name, value in quick.items() if name in TrainSettings.model_fields}
    for variant in result.variants[:2]:
        alone = train(variant.resolved, seed=3, threads=1, **options)
        assert variant.val_loss.per_seed[3] == alone.val_loss


def test_the_number_of_workers_changes_nothing(finished: tuple[Path, CompareResult], quick: dict[str, Any]) -> None:
    _, result = finished
    alone = compare([GPT2, LLAMA, GPT2], **quick, seeds=2)
    assert losses(alone) == [row[:2] for row in losses(result)]
    for one, two in zip(alone.variants, result.variants):
        assert [curve.train for curve in one.curves] == [curve.train for curve in two.curves[:2]]


def test_a_line_against_itself_is_never_better_or_worse(finished: tuple[Path, CompareResult]) -> None:
    _, result = finished
    twin = result.variants[2]
    assert twin.label == f"{GPT2} #2"
    assert twin.diff is not None
    assert (twin.diff.verdict, twin.diff.mean) == ("equivalent", 0.0)


def test_real_runs_that_differ_by_chance_alone_get_no_verdict_more_often_than_alpha(
    finished: tuple[Path, CompareResult],
) -> None:
    """Ten real losses of one architecture, split at random into two groups of five: all differences are chance.

    With 200 splits and α = 5 %, 10 claims are expected; splits of the same ten are not independent, so 20 may pass.
    """
    _, result = finished
    rng = random.Random(0)
    for variant in result.variants[:2]:
        values = list(variant.val_loss.per_seed)
        claims = 0
        for _ in range(200):
            rng.shuffle(values)
            (found,) = assess(values[:5], [values[5:]], margin=0.0)
            claims += found.verdict in ("better", "worse")
        assert claims <= 20


def test_the_folder_holds_the_documented_result(finished: tuple[Path, CompareResult]) -> None:
    out, result = finished
    about = json.loads((out / "result.json").read_text())
    assert about["baseline"] == GPT2
    assert about["seeds"] == list(range(SEEDS))
    for variant in about["variants"]:
        assert variant["params"] == sum(variant["params_by_part"].values())
        assert variant["flops_per_token"] > 0
        assert len(variant["val_loss"]["per_seed"]) == SEEDS
        low, high = variant["val_loss"]["ci95"]
        assert low <= variant["val_loss"]["mean"] <= high
        assert variant["train_tokens_per_s"] > 0
        assert variant["decode_tokens_per_s"] > 0
        assert len(variant["curves"][0]["train"]["step"]) == QUICK["steps"] / QUICK["log_every"]
    diff = about["variants"][1]["diff"]
    assert {"mean", "ci95", "p_holm", "effect_size", "min_detectable", "verdict"} <= set(diff)
    assert abs(about["variants"][1]["match_off"]) <= 0.01
    assert about["variants"][1]["match_note"].startswith("ffn.d_ff")
    assert about["command"].startswith(f"headwise compare '{GPT2}' '{LLAMA}' '{GPT2}'")
    assert CompareResult.load(out) == result
    with (out / "result.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["line"] for row in rows] == [GPT2, LLAMA, GPT2]
    assert float(rows[1]["val_loss"]) == result.variants[1].val_loss.mean
    assert LLAMA.split("(")[0] in (out / "report.html").read_text()
    assert "<table" in result._repr_html_()


def test_the_command_makes_the_same_comparison(quick: dict[str, Any], finished: tuple[Path, CompareResult]) -> None:
    """Read back by the command line's own parser, it has the lines and settings of the comparison it belongs to."""
    import shlex

    from headwise.cli.arguments import Parser

    _, result = finished
    parser = Parser("compare", "", "")
    parser.add_argument("lines", nargs="+")
    words = shlex.split(result.command)
    arguments = parser.read(words[2:], CompareSettings)
    assert words[:2] == ["headwise", "compare"]
    assert arguments.options.lines == [GPT2, LLAMA, GPT2]
    settings = CompareSettings(**arguments.settings)
    assert settings.model_dump(mode="json", exclude={"out", "workers"}) == {
        name: value for name, value in result.settings.items() if name != "workers"
    }


# --- going on ---------------------------------------------------------------------------------------------------------


def test_the_same_call_again_trains_nothing_and_more_seeds_only_themselves(
    quick: dict[str, Any], tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    settings = {**quick, "out": tmp_path / "out", "on_progress": events.append}
    first = compare([GPT2, LLAMA], seeds=2, **settings)
    assert {(e["variant"], e["seed"]) for e in events} == {(v, s) for v in (0, 1) for s in (0, 1)}
    assert {e["state"] for e in events} == {"started", "progress", "done"}
    events.clear()
    again = compare([GPT2, LLAMA], seeds=2, **settings)
    assert (events, losses(again)) == ([], losses(first))
    more = compare([GPT2, LLAMA], seeds=3, margin=0.01, **settings)
    assert {e["seed"] for e in events} == {2}
    assert [row[:2] for row in losses(more)] == losses(first)
    assert len(CompareResult.load(tmp_path / "out").seeds) == 3

    for changes, said in (
        ({"lr": 1e-2}, r"lr=0\.01 \(was 0\.001\)"),
        ({"steps": 13}, r"steps=13 \(was 12\)"),
        ({"match": "none"}, r"match='none'"),
        ({"threads": 2}, r"threads=2"),
    ):
        with pytest.raises(SettingsError, match=said):
            compare([GPT2, LLAMA], **{**settings, **changes})
    with pytest.raises(SettingsError, match=r"lines 'llama.*were 'gpt2"):
        compare([LLAMA, GPT2], **settings)
    Path(settings["data"]).with_name("other.txt").write_text("abcdefgh" * 400)
    with pytest.raises(SettingsError, match="data="):
        compare([GPT2, LLAMA], **{**settings, "data": str(Path(settings["data"]).with_name("other.txt"))})


def test_lines_are_resumed_as_they_were_typed(quick: dict[str, Any], tmp_path: Path) -> None:
    """An alias, a file: the runs of the first call are found again, and the report says what was typed."""
    out, file = tmp_path / "out", tmp_path / "mine.yaml"
    file.write_text("preset: llama\nd_model: 32\nn_layers: 1\nn_heads: 2\n")
    lines = [GPT2.replace(")", ", attention=gqa(kv_heads=1))"), str(file)]
    first = compare(lines, **quick, seeds=1, out=out)
    events: list[dict[str, Any]] = []
    again = resume_comparison(out, on_progress=events.append)
    assert [variant.line for variant in again.variants] == lines
    assert (events, losses(again)) == ([], losses(first))
    file.unlink()
    gone = resume_comparison(out, on_progress=events.append)
    assert gone.variants[1].line == LLAMA
    assert (events, losses(gone)) == ([], losses(first))


def test_a_folder_of_something_else_is_left_alone(quick: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(SettingsError, match="exists and is not empty"):
        compare([GPT2, LLAMA], **quick, out=tmp_path)
    with CompareFolder(tmp_path / "busy").locked(), pytest.raises(SettingsError, match="another comparison is running"):
        compare([GPT2, LLAMA], **quick, out=tmp_path / "busy")


def begin(out: Path, quick: dict[str, Any]) -> subprocess.Popen[str]:
    """The comparison of the tests below as a command, once its first checkpoints are written."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in quick.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "headwise", "compare", GPT2, LLAMA, *flags, f"--out={out}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(out.glob("runs/0-*/seed-0/checkpoints/step-*")):
        time.sleep(0.02)
    return process


@pytest.fixture(scope="module")
def longer(quick: dict[str, Any]) -> tuple[dict[str, Any], CompareResult]:
    """Runs that last long enough to be stopped in the middle, and their result."""
    settings = {**quick, "steps": 200, "checkpoint_every": 20, "seeds": 2}
    return settings, compare([GPT2, LLAMA], **settings)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_comparison_ends_with_the_same_bits(
    how: signal.Signals, longer: tuple[dict[str, Any], CompareResult], tmp_path: Path
) -> None:
    settings, uninterrupted = longer
    out = tmp_path / "out"
    process = begin(out, settings)
    process.send_signal(how)
    _, errors = process.communicate(timeout=120)
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert f"go on with `headwise resume {out}`" in errors.splitlines()[-1]
        assert "Traceback" not in errors
    assert not (out / "result.json").exists()
    events: list[dict[str, Any]] = []
    resumed = resume_comparison(out, on_progress=events.append)
    # The run that had a checkpoint went on from it.
    assert min(e["step"] for e in events if (e["variant"], e["seed"], e["state"]) == (0, 0, "progress")) > 20
    assert losses(resumed) == losses(uninterrupted)


# --- failures ---------------------------------------------------------------------------------------------------------


def test_runs_that_fail_are_reported_and_lose_no_other(
    quick: dict[str, Any], finished: tuple[Path, CompareResult], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    lines = [GPT2, GPT2.replace(")", ", ffn=fragile)"), GPT2.replace(")", ", ffn=deadly)"), LLAMA]
    with module_with(BREAKING, "breaking_in_compare", tmp_path):
        result = compare(lines, **quick, seeds=2, out=out)
    gpt2, llama, _ = losses(finished[1])
    assert losses(result) == [gpt2[:2], [None, None], [None, None], llama[:2]]
    errors = {(run.line, run.seed): run.error for run in result.failed_runs}
    assert errors == {
        **{(lines[1], seed): "RuntimeError: it broke" for seed in (0, 1)},
        **{(lines[2], s): "the worker process was ended by SIGKILL (the system may be out of memory)" for s in (0, 1)},
    }
    assert "it broke" in next(out.glob("runs/1-*/seed-0/traceback.txt")).read_text()
    assert (out / "report.html").exists()


def test_where_every_run_fails_there_is_still_a_result(quick: dict[str, Any], tmp_path: Path) -> None:
    wild = {**quick, "lr": 1e30, "warmup": 0, "seeds": 1, "out": tmp_path}
    result = compare([GPT2, LLAMA], **wild)
    assert losses(result) == [[None], [None]]
    assert all("not finite" in run.error or "nan" in run.error for run in result.failed_runs)
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("grid", "at_edge"), [((1e-5, 1e-2), True), ((1e-2, 1e-5, 1e30), False)])
def test_the_learning_rate_is_chosen_on_seeds_of_its_own(
    grid: tuple[float, ...], at_edge: bool, quick: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dozen steps at 1e-5 move nothing, and at 1e30 everything breaks: 1e-2 is best for every line."""
    out = tmp_path / "out"
    result = compare([GPT2, LLAMA], **quick, lr_grid=grid, tune_seeds=1, seeds=1, warmup=0, out=out, progress=True)
    for variant in result.variants:
        trials = {trial.lr: trial for trial in variant.lr_grid}
        assert tuple(trials) == grid
        assert all(trial.seeds == [FIRST_TUNE_SEED] for trial in trials.values())
        assert [lr for lr in grid if trials[lr].val_loss is None] == [lr for lr in grid if lr > 1]
        assert variant.lr == 1e-2
    said = capsys.readouterr().err
    assert said.count(": learning rate 0.01") == 2
    assert said.count("0.01 is at the edge of the grid") == 2 * at_edge
    run = json.loads(next(out.glob("runs/0-*/seed-0/run.json")).read_text())
    assert (run["settings"]["lr"], run["settings"]["seed"]) == (1e-2, 0)


def test_equal_time_gives_a_dearer_step_fewer_of_them(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwise.lab.compare.CALIBRATION_ROUNDS", 3)
    deep = "gpt2(d_model=32, n_layers=4, n_heads=2)"
    settings = {**quick, "match": "time", "seeds": 1, "out": tmp_path}
    result = compare([GPT2, deep], **settings)
    base, variant = result.variants
    assert base.steps == QUICK["steps"]
    assert variant.steps is not None
    assert 1 <= variant.steps < QUICK["steps"]
    assert variant.match_note.startswith(f"{variant.steps} steps in the time of {QUICK['steps']}")
    assert [curve.train.step[-1] for curve in variant.curves] == [variant.steps]
    assert compare([GPT2, deep], **{**settings, "seeds": 2}).variants[1].steps == variant.steps


def test_encoders_are_compared_by_masked_tokens(quick: dict[str, Any]) -> None:
    lines = [line.replace(")", ", architecture=encoder)") for line in (GPT2, LLAMA)]
    result = compare(lines, **quick, seeds=1)
    assert result.objective == "masked language modelling"
    assert all(math.isfinite(row[0] or math.nan) for row in losses(result))


# --- refusals, before anything runs -----------------------------------------------------------------------------------


def test_all_problems_of_all_lines_come_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        compare(["gpt2(d_modl=3)", "llama", "llamma", "gpt2(n_layers=0)"])
    text = str(caught.value)
    assert text.startswith("3 problems\n")
    for part in ("'gpt2(d_modl=3)': d_modl", "'llamma': preset", "'gpt2(n_layers=0)': n_layers", "did you mean"):
        assert part in text
    with pytest.raises(SpecError) as caught:
        compare(["gpt2(vocab_size=3)", "llama(max_seq_len=8)"])
    assert "vocab_size" in str(caught.value)
    assert "max_seq_len=8" in str(caught.value)
    with pytest.raises(SpecError, match=r"in 'gpt2.*lr_multipliers: '\*\.w_gate' matches no parameter"):
        compare(["gpt2", "llama"], lr_multipliers={"*.w_gate": 0.1})


@pytest.mark.parametrize(
    ("lines", "settings", "said"),
    [
        (["gpt2"], {}, "at least two"),
        ("gpt2", {}, "give a list"),
        (["gpt2", "gpt2(architecture=encoder)"], {}, "different objectives"),
        (["gpt2", "transformer"], {}, "'transformer' is encoder_decoder"),
        (["gpt2", "llama"], {"seeds": 0}, "at least one is needed"),
        (["gpt2", "llama"], {"seeds": [1, 1]}, "has a seed twice"),
        (["gpt2", "llama"], {"seeds": "some"}, "a number of seeds such as 6"),
        (["gpt2", "llama"], {"lr": 1e-3, "lr_grid": [1e-3, 1e-2]}, "exclude each other"),
        (["gpt2", "llama"], {"lr_grid": [1e-3, 1e-2], "seeds": [FIRST_TUNE_SEED]}, "for tuning and for the verdict"),
        (["gpt2", "llama"], {"lr_grid": [1e-3, 1e-2], "min_lr": 5e-3}, "min_lr: 0.005 is more than 0.001 of lr_grid"),
        (["gpt2", "llama"], {"sedes": 3}, "did you mean 'seeds'"),
        (["gpt2", "llama"], {"workers": 0}, "workers"),
        (["gpt2", "llama"], {"device": "tpu"}, "^device: given 'tpu', should be auto"),
    ],
)
def test_what_cannot_be_compared_is_refused(lines: list[str], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        compare(lines, **settings)


def test_a_worker_starts_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWISE_WORKER", "1")
    with pytest.raises(HeadwiseError, match="if __name__ == '__main__'"):
        compare(["gpt2", "llama"])


def test_seeds_are_a_number_or_a_list() -> None:
    assert CompareSettings(seeds=3, seed=5).seed_list == [5, 6, 7]
    assert CompareSettings(seeds="0,2,4").seed_list == [0, 2, 4]
    assert CompareSettings(seeds="[9]").seed_list == [9]
    assert CompareSettings(seeds=(4, 1)).seed_list == [4, 1]


def test_specs_and_lines_are_the_same_plan(quick: dict[str, Any]) -> None:
    settings = CompareSettings(**quick)
    plans = [make_plan(lines, settings) for lines in ([GPT2, LLAMA], [hw.parse(GPT2), hw.parse(LLAMA)])]
    assert plans[0].variants == [
        v.model_copy(update={"line": n.line}) for v, n in zip(plans[1].variants, plans[0].variants)
    ]


# --- mechanisms of the caller's own ----------------------------------------------------------------------------------


def test_a_script_may_define_a_mechanism_and_compare_it(quick: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"""
from typing import Literal
import headwise as hw
from headwise.ffn.mlp import MLP, MLPSpec

class MineSpec(MLPSpec):
    kind: Literal["mine"] = "mine"

@hw.register_ffn(MineSpec)
class Mine(MLP):
    pass

if __name__ == "__main__":
    result = hw.compare([{GPT2!r}, {GPT2.replace(")", ", ffn=mine)")!r}], seeds=1, **{quick!r})
    print(result.variants[1].val_loss.mean is not None, len(result.failed_runs))
"""
    )
    ran = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=dict(os.environ), timeout=120
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("True 0\n", "", 0)
