"""A/B runs of real, tiny distillations: fair, resumable, one teacher cache for all, and honest about a collapse."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_comparisons import write_corpus

from headwise.cli import main
from headwise.cli.arguments import Parser
from headwise.distill.run import distill
from headwise.distill.settings import DistillSettings
from headwise.errors import DataError, FormatError, HeadwiseError, SettingsError
from headwise.lab.ab import ABResult, ABSettings, ab, compare_runs, resume_ab
from headwise.lab.ab.markdown import markdown
from headwise.lab.ab.words import likeness
from headwise.lab.worker import MARK

TEACHER = "llama(d_model=32, n_layers=2, n_heads=4)"
STUDENT = "llama(d_model=16, n_layers=1, n_heads=2)"
pytestmark = pytest.mark.usefixtures("warm_python")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    sizes = {"seq_len": 16, "batch_size": 4, "steps": 6, "log_every": 2, "measure_rows": 4, "workers": 1}
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    return {**sizes, "teacher": TEACHER, "student": STUDENT, "data": str(corpus), "tokenizer": "char"}


@pytest.fixture(scope="module")
def begun(quick: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ABResult]:
    """Two arms, one seed, the teacher's cache kept in a folder of its own."""
    folder = tmp_path_factory.mktemp("ab")
    cache = {"cache_teacher": True, "cache_dtype": "float32", "cache_dir": folder / "cache"}
    return folder, ab(**quick, **cache, arms="none,flat", seeds=1, out=folder / "out")


def test_a_run_is_the_run_that_distill_makes(begun: tuple[Path, ABResult], quick: dict[str, Any]) -> None:
    """With a live teacher, to the bit: nothing of the workers, the other arms or the cache is in it."""
    _, result = begun
    options = {name: value for name, value in quick.items() if name in DistillSettings.model_fields}
    for arm, variant in zip(result.arms, result.variants, strict=True):
        alone = distill(**options, **arm.settings, seed=0, threads=1, progress=False)
        assert variant.val_loss.per_seed == [alone.val_loss]
        assert variant.params == alone.params
        assert arm.alignment["cosine_k"].layers == alone.likeness["cosine_k"]
        assert arm.alignment["cosine_k"].shuffled_layers == alone.likeness["cosine_k_shuffled"]


def test_the_folder_holds_every_report(begun: tuple[Path, ABResult]) -> None:
    folder, result = begun
    out = folder / "out"
    assert ABResult.load(out) == result
    assert (out / "AB_RESULTS.md").read_text() == markdown(result)
    assert "none against flat" in (out / "AB_RESULTS.md").read_text()
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert result.variants[0].val_loss.per_seed[0] is not None
    curve = result.variants[0].curves[0]
    assert (curve.train.step, curve.val.step) == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
    lines = [json.loads(line) for line in (out / "runs/flat/seed-0/metrics.jsonl").read_text().splitlines()]
    assert curve.train.loss == [line["loss_task"] for line in lines]
    assert len(list((folder / "cache").glob("header.json"))) == 1


def test_it_goes_on_with_more_seeds_and_arms_and_the_same_cache(
    begun: tuple[Path, ABResult], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, before = begun
    out = folder / "out"
    kept = (out / "runs/flat/seed-0/metrics.jsonl").stat().st_mtime_ns
    settings = ABSettings(**json.loads((out / "ab.json").read_text())["settings"], out=out)
    more = settings.model_dump(exclude_unset=True) | {"arms": "none,flat,structured", "seeds": 2}
    result = ab(**more)
    assert (out / "runs/flat/seed-0/metrics.jsonl").stat().st_mtime_ns == kept
    assert [variant.label for variant in result.variants] == ["flat", "none", "structured"]
    assert result.variants[0].val_loss.per_seed[0] == before.variants[0].val_loss.per_seed[0]
    assert not result.failed_runs
    header = json.loads((folder / "cache/header.json").read_text())
    assert set(header["fields"]) == {"keys", "values"}
    pair = compare_runs(out / "runs/flat/seed-0", out / "runs/none/seed-1")
    assert [v.val_loss.mean for v in pair.variants] == [result.variants[i].val_loss.per_seed[i] for i in (0, 1)]
    assert any("Their seeds differ" in note for note in pair.notes)
    assert main(["resume", str(out), "--json"]) == 0  # all is done: it is only read
    again = json.loads(capsys.readouterr().out)["variants"]
    assert again == [variant.model_dump(mode="json") for variant in result.variants]
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").exists()
    with pytest.raises(SettingsError, match=r"holds another A/B; different here: lambda_kv=0.1 \(was 0.5\)"):
        ab(**{**more, "lambda_kv": 0.1})
    (folder / "moved").mkdir()
    with pytest.raises(FormatError, match="holds no A/B"):
        resume_ab(folder / "moved")


def test_the_command_makes_the_same_ab(begun: tuple[Path, ABResult]) -> None:
    """Read back by the command line's own parser; and that of an arm is the run of its first seed."""
    _, result = begun
    words = shlex.split(result.command)
    assert words[:3] == ["headwise", "distill", "ab"]
    settings = ABSettings(**Parser("distill ab", "", "").read(words[3:], ABSettings).settings)
    dumped = settings.model_dump(mode="json", exclude={"out", "workers", "projection"})
    assert dumped == {name: value for name, value in result.settings.items() if name != "workers"} | {
        "teacher": [TEACHER]
    }
    arm = shlex.split(result.arms[1].command)
    one = DistillSettings(**Parser("distill run", "", "").read(arm[3:], DistillSettings).settings)
    assert (one.projection, one.seed, one.steps, one.eval_every) == ("none", 0, 6, 1)


def test_two_finished_runs_are_compared_in_the_same_words(
    begun: tuple[Path, ABResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = begun
    runs = [str(folder / f"out/runs/{name}/seed-0") for name in ("flat", "none")]
    made = compare_runs(*runs)
    assert [v.val_loss.per_seed for v in made.variants] == [v.val_loss.per_seed[:1] for v in result.variants[:2]]
    assert made.arms[0].alignment["cka_k"].layers == result.arms[0].alignment["cka_k"].layers
    assert made.variants[1].diff is not None
    assert made.variants[1].diff.verdict == "undecided"
    target = tmp_path / "AB_RESULTS.md"
    assert main(["distill", "compare", "--baseline", runs[0], "--experimental", runs[1], "--output", str(target)]) == 0
    text = target.read_text()
    assert text.startswith("# KV-cache distillation: none/seed-0 against flat/seed-0: undecided")
    assert "One run each: nothing is claimed from that" in text
    assert "projection='none' (was 'flat')" in text
    assert f"report: {target}" in capsys.readouterr().out


def test_runs_that_cannot_be_compared(begun: tuple[Path, ABResult], quick: dict[str, Any], tmp_path: Path) -> None:
    run = begun[0] / "out/runs/flat/seed-0"
    with pytest.raises(FormatError, match="holds no run; give the --out of a finished"):
        compare_runs(run, tmp_path)
    shutil.copytree(run, tmp_path / "stopped")
    (tmp_path / "stopped/result.json").unlink()
    with pytest.raises(FormatError, match="stopped is not finished; go on with `headwise resume"):
        compare_runs(run, tmp_path / "stopped")
    other = tmp_path / "other.txt"
    other.write_text(Path(quick["data"]).read_text()[:6000])
    options = {name: value for name, value in quick.items() if name in DistillSettings.model_fields}
    distill(**{**options, "data": str(other)}, projection="none", out=tmp_path / "run", progress=False)
    with pytest.raises(SettingsError, match="were trained on different data, small and other"):
        compare_runs(run, tmp_path / "run")


# --- before anything runs ---------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_before_anything_runs(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SettingsError, match=r"arms: in 'structured:side=left': side: given 'left'"):
        ab(**quick, arms="flat,structured:side=left", out=out)
    with pytest.raises(DataError):
        ab(**{**quick, "data": str(tmp_path / "nothing.txt")}, out=out)
    with pytest.raises(SettingsError, match="seq_len: 16 is more than the student's max_seq_len=8"):
        ab(**{**quick, "student": "llama(d_model=16, n_layers=1, n_heads=2, max_seq_len=8)"}, out=out)
    assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(SettingsError, match="exists and is not empty"):
        ab(**quick, out=tmp_path / "full")
    monkeypatch.setenv(MARK, "1")
    with pytest.raises(HeadwiseError, match="a worker process cannot start an A/B"):
        ab(**quick)


# --- the collapse -----------------------------------------------------------------------------------------------------


def test_a_trained_projector_on_the_teachers_side_collapses_and_the_report_says_so(
    quick: dict[str, Any], tmp_path: Path
) -> None:
    """The control that document 004's experiment lacked. Nothing but the loss of keys and values counts, the student is
    too small to follow, and the projector on the teacher's side may move: it learns to say the same whatever it reads.
    The cosine goes to 1, and so does the one against shuffled teachers. Beside a projector held fixed neither does."""
    sizes = {"steps": 120, "eval_every": 10, "measure_rows": 16, "lr": 3e-2, "weight_decay": 0.0, "lambda_task": 0.0}
    options = {name: value for name, value in quick.items() if name in DistillSettings.model_fields} | sizes
    options["teacher"] = "llama(d_model=32, n_layers=6, n_heads=4, position=learned)"
    for name, changes in {"fixed": {"freeze_projector": True}, "trained": {"projection": "flat"}}.items():
        distill(**options, **changes, out=tmp_path / name, progress=False)  # type: ignore[arg-type]
    result = compare_runs(tmp_path / "fixed", tmp_path / "trained")
    fixed, trained = result.arms
    for name in ("cosine_k", "cosine_v"):
        alignment = trained.alignment[name]
        assert alignment.mean is not None
        assert alignment.shuffled is not None
        assert alignment.mean > 0.9
        assert alignment.shuffled > 0.9
        assert alignment.shuffled_course.loss[-1] > alignment.shuffled_course.loss[0] + 0.2
    assert trained.collapse == "collapsed"
    assert "This cosine shows no alignment" in likeness(trained)
    assert "the other rose from" in likeness(trained)
    assert "(collapse)" in markdown(result)
    assert fixed.collapse != "collapsed"
    assert (fixed.alignment["cosine_k"].gap or 0) > 0.2
