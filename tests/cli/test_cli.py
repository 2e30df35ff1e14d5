"""The command line: light to start, the same spelling as the keyword arguments, one line for every mistake."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import run, run_json

from headwise.cli import COMMANDS, main
from headwise.cli.arguments import Parser
from headwise.errors import SettingsError
from headwise.io.atomic import WriteError
from headwise.lab.settings import CompareSettings
from headwise.registry import FAMILIES
from headwise.spec import parse
from headwise.spec.presets import PRESETS
from headwise.train import TrainSettings

GPT2 = "gpt2(d_model=16, n_layers=1, n_heads=2)"
QUICK = ["--seq-len", "16", "--batch-size=4", "--steps", "6", "--log_every", "2"]


@pytest.fixture(scope="module")
def trained(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", GPT2, "--data", text, *QUICK, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def compared(text: str, warm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "compare"
    flags = ["--seeds", "1", "--workers", "1", "--measure-rounds", "0", "--out", str(out)]
    words = ["gpt2", "llama", "--model.d_model", "16", "--model.n_layers=1", "--data", text, *QUICK, *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(warm / "python"))
        assert main(["compare", *words]) == 0
    return out


# --- starting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["no-such-command"]])
def test_what_needs_no_model_loads_no_library(argv: list[str]) -> None:
    """`headwise --help` answers at once: it imports a few modules of ours and nothing that takes long."""
    code = (
        "import sys; before = set(sys.modules)\n"
        f"from headwise.cli import main; status = main({argv!r})\n"
        "print()\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))\n"
        "print(len(set(sys.modules) - before), status)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, packages, counts = ran.stdout.splitlines()
    heavy = {"torch", "numpy", "pydantic", "pydantic_settings", "scipy", "matplotlib", "rich", "yaml", "jinja2"}
    assert not heavy & set(packages.split())
    count, status = map(int, counts.split())
    assert count < 100
    assert status == (2 if argv == ["no-such-command"] else 0)


def test_python_m_headwise_is_the_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "headwise", "--help"], capture_output=True, text=True, check=True)
    assert all(f"\n  {name} " in ran.stdout for name in COMMANDS)


def test_a_reader_that_has_enough_gets_no_traceback() -> None:
    """As in `headwise list --json | head -1`."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "headwise", "list", "--json"], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    os.close(reader)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (141, b"")


def test_without_a_command_the_overview_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys)[0] == 2
    assert run(capsys, "--help")[0] == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"usage: headwise {command}" in out
    assert "examples:\n  headwise " + command in out
    assert "--json" in out


@pytest.mark.parametrize(("command", "settings"), [("train", TrainSettings), ("compare", CompareSettings)])
def test_help_has_every_setting_with_its_description(
    command: str, settings: type[TrainSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    out = " ".join(run(capsys, command, "--help")[1].split()).replace("- ", "-")
    for name, field in settings.model_fields.items():
        if settings is CompareSettings and name == "init_from":  # which it refuses
            assert "--init-from" not in out
            continue
        assert f"--{name.replace('_', '-')}" in out
        assert field.description
        assert " ".join(field.description.split()).replace("- ", "-") in out
    assert "(default: 300)" in out
    assert "default: None" not in out


# --- flags ------------------------------------------------------------------------------------------------------------


def parsed(*argv: str, settings: type[TrainSettings] = CompareSettings) -> Any:
    parser = Parser("compare", "", "", model_flags=True)
    parser.add_argument("lines", nargs="*")
    return parser.read(argv, settings)


def test_flags_are_the_keyword_arguments() -> None:
    """One model reads both, so what is typed is what a caller would write."""
    typed = parsed(
        "gpt2", "--batch_size", "3", "--lr=3e-4", "--betas", "0.9,0.95", "--seeds", "0,1,2", "--no-deterministic",
        "--compile", "--lr-multipliers", "*.vein.*=0.1", "--lr-multipliers", "head=2",
        "--min_lr", "1e-5", "--size", "5m",
    )  # fmt: skip
    assert CompareSettings(**typed.settings) == CompareSettings(
        batch_size=3, lr=3e-4, betas=(0.9, 0.95), seeds=(0, 1, 2), deterministic=False, compile=True,
        lr_multipliers={"*.vein.*": 0.1, "head": 2.0}, min_lr=1e-5, size="5m",
    )  # fmt: skip
    assert typed.options.lines == ["gpt2"]
    assert CompareSettings(**parsed("--seeds", "8").settings).seeds == 8
    assert CompareSettings(**parsed("--seeds", "[8]").settings).seeds == (8,)
    assert CompareSettings(**parsed("--lr-grid", "3e-4,1e-3,3e-3").settings).lr_grid == (3e-4, 1e-3, 3e-3)
    assert CompareSettings(**parsed("--lr-grid", "3e-4", "--lr_grid", "1e-3").settings).lr_grid == (3e-4, 1e-3)


def test_every_setting_can_be_typed() -> None:
    """Each field's default, written as a flag, is read back as that default."""
    for name, field in CompareSettings.model_fields.items():
        value = field.get_default(call_default_factory=True)
        if value is None or value == () or value == {}:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words = [flag if value else flag.replace("--", "--no-")]
        else:
            words = [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        assert getattr(CompareSettings(**parsed(*words).settings), name) == value


def test_the_environment_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("steps", "STEPS", "lr", "LR"):
        monkeypatch.setenv(name, "7")
    assert parsed("--seeds", "8").settings == {"seeds": "8"}


def test_dotted_flags_speak_of_the_model() -> None:
    found = parsed(
        "gpt2", "--model.attention.kind", "window", "--model.d_model=64", "--attn.window", "8", "--steps", "3"
    )
    assert found.flags == {"model.attention.kind": "window", "model.d_model": "64", "attn.window": "8"}
    assert (found.options.lines, found.settings) == (["gpt2"], {"steps": "3"})
    with pytest.raises(SettingsError, match=r"--model\.d_model needs a value"):
        parsed("gpt2", "--model.d_model", "--steps", "3")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--sedes", "3"], "unknown flag --sedes (did you mean '--seeds'?)"),
        (["--batchsize=3"], "did you mean '--batch-size'?"),
        (["--modle.d_model", "3"], "did you mean '--model."),
        (["--steps"], "expected one argument"),
        (["--lr-multipliers", "nonsense"], "--lr-multipliers: its value is no list or mapping"),
        (["--lr-grid", "[1,"], "--lr-grid: its value is no list"),
        (["--compile=maybe"], "--compile"),
    ],
)
def test_mistakes_are_one_line_with_the_right_spelling(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "compare", "gpt2", "llama", *argv)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


def test_all_mistakes_come_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "train", "gpt2", "--steps", "-1", "--lr", "fast", "--schedule", "zigzag")
    assert status == 2
    assert "error: 3 problems\n" in err
    status, _, err = run(capsys, "show", "gpt2(", "llamma", "gpt2(d_modl=3)", "llama")
    assert status == 2
    assert "error: 3 problems\n" in err
    assert "did you mean 'd_model'" in err


def test_errors_have_the_exit_status_they_ask_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status, _, err = run(capsys, "compar", "gpt2")
    assert (status, "did you mean 'compare'" in err) == (2, True)
    assert run(capsys, "train", "gpt2", "--data", str(tmp_path / "missing.txt"))[0] == 1

    def fail(error: BaseException) -> tuple[int, str]:
        def entries(kind: str) -> None:
            raise error

        monkeypatch.setattr(importlib.import_module("headwise.cli.list"), "entries", entries)
        status, out, err = run(capsys, "list", "--json")
        assert out == ""
        return status, err

    assert fail(KeyboardInterrupt()) == (130, "error: interrupted\n")
    assert fail(OSError(28, "No space left on device", "/data/x")) == (1, "error: /data/x: No space left on device\n")
    assert fail(WriteError("cannot write 'x': disk full")) == (1, "error: cannot write 'x': disk full\n")
    with pytest.raises(ZeroDivisionError):  # a bug is a bug, and shows where
        fail(ZeroDivisionError())


# --- commands ---------------------------------------------------------------------------------------------------------


def test_list_has_everything_registered(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "list")
    assert set(found) == {"preset", "command", *FAMILIES}
    for family, registry in FAMILIES.items():
        assert [row["name"] for row in found[family]] == registry.list()
        assert {alias for row in found[family] for alias in row["aliases"]} == set(registry.aliases())
    assert [row["name"] for row in found["preset"]] == sorted(PRESETS)
    assert all(row["summary"] for rows in found.values() for row in rows)
    assert run_json(capsys, "list", "attention") == found["attention"]
    _, out, _ = run(capsys, "list", "norm")
    assert all(row["name"] in out for row in found["norm"])
    assert "did you mean 'attention'" in run(capsys, "list", "attentoin")[2]


def test_show_counts_side_by_side(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: llama\nd_model: 64\n")
    found = run_json(capsys, "show", 'gpt2(size="124m")', str(file), "--context", "128")
    assert found[0]["params"] == 124_439_808
    assert [each["context"] for each in found] == [128, 128]
    assert "d_model=64" in found[1]["resolved"]
    for each in found:
        assert each["params"] == sum(each["params_by_part"].values())
    _, out, _ = run(capsys, "show", 'gpt2(size="124m")', str(file))
    assert "124,439,808" in out
    assert "active for a token" not in out
    _, out, _ = run(capsys, "show", 'mixtral(size="8x7b")', "gpt2")
    assert "active for a token" in out
    assert "12,879,925,248" in out
    wider = run_json(capsys, "show", "gpt2", "--size", "10m")[0]["params"]
    assert 8e6 < wider < 12e6


def test_show_applies_flags_and_prints_yaml_that_is_the_same_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--model.attention.kind", "window", "--model.attention.window=8", "--ffn.impl", "geglu"]
    status, out, _ = run(capsys, "show", "llama", *flags, "--yaml")
    (tmp_path / "line.yaml").write_text(out)
    assert status == 0
    assert parse(tmp_path / "line.yaml") == parse("llama(attention=window(8), ffn=geglu)")


def test_train_generate_eval_resume(
    trained: Path, text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figures = json.loads((trained / "result.json").read_text())
    assert run_json(capsys, "resume", str(trained))["val_loss"] == figures["val_loss"]
    loss = run_json(capsys, "eval", str(trained), "--data", text)
    assert loss["nats"] == pytest.approx(figures["val_loss"], rel=1e-6)
    on_train = run_json(capsys, "eval", str(trained), "--data", text, "--split", "train")
    assert on_train["n_tokens"] > loss["n_tokens"]
    both = run_json(capsys, "eval", str(trained), "--data", text, "--split", "all")
    assert both["n_tokens"] == loss["n_tokens"] + on_train["n_tokens"]
    mean = (loss["nats"] * loss["n_tokens"] + on_train["nats"] * on_train["n_tokens"]) / both["n_tokens"]
    assert both["nats"] == pytest.approx(mean)
    assert min(loss["bits_per_byte"], on_train["bits_per_byte"]) < both["bits_per_byte"]
    assert both["bits_per_byte"] < max(loss["bits_per_byte"], on_train["bits_per_byte"])
    options = ["--prompt", "the ", "--max-new-tokens", "12", "--seed", "3"]
    written = run_json(capsys, "generate", str(trained), *options)
    assert len(written["text"]) == 12
    assert run(capsys, "generate", str(trained), *options)[1] == f"the {written['text']}\n"
    status, _, err = run(capsys, "train", GPT2, "--data", text, *QUICK, "--out", str(trained))
    assert (status, "choose another" in err) == (2, True)
    assert run(capsys, "generate", str(tmp_path))[0] == 1
    assert run(capsys, "resume", str(tmp_path))[0] == 1


def test_train_chooses_a_folder_and_says_which(
    text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "train", GPT2, "--data", text, *QUICK)
    (folder,) = (tmp_path / "runs").iterdir()
    assert status == 0
    assert f"training in runs/{folder.name}" in err
    assert f"in runs/{folder.name}" in out
    assert (folder / "result.json").exists()


def test_a_dry_run_says_what_would_run_and_writes_nothing(
    text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = run_json(
        capsys, "compare", "gpt2", "llama", "--data", text, "--seeds", "5", "--lr-grid", "1e-3,1e-2", "--dry-run"
    )
    assert plan["runs"] == 2 * (5 + 2 * 2)
    assert plan["tokens_per_run"] == 300 * 12 * 64
    assert plan["seconds"] > 0
    a, b = (line["params"] for line in plan["lines"])
    assert abs(b / a - 1) <= 0.01
    status, out, _ = run(capsys, "train", GPT2, "--data", text, "--dry-run")
    assert status == 0
    assert "nothing was trained" in out
    assert list(tmp_path.iterdir()) == []


def test_compare_and_report(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, "resume", str(compared))
    assert result["out"] == str(compared)
    assert [variant["line"] for variant in result["variants"]] == [
        "gpt2(d_model=16, n_layers=1)",
        "llama(d_model=16, n_layers=1)",
    ]
    status, out, err = run(capsys, "resume", str(compared))
    assert status == 0
    assert "undecided" in out
    assert f"report: {compared / 'report.html'}" in out
    assert f"going on in {compared}" in err
    (compared / "report.html").unlink()
    (compared / "result.csv").unlink()
    assert run_json(capsys, "report", str(compared)) == {"report": str(compared / "report.html")}
    assert (compared / "report.html").exists()
    assert (compared / "result.csv").exists()
    status, _, err = run(capsys, "report", str(compared.parent))
    assert (status, err.count("\n")) == (1, 1)


def test_a_line_without_any_finished_run_is_a_failure(
    text: str, warm: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(warm / "python"))
    flags = ["--seeds", "1", "--workers", "1", "--measure-rounds", "0", "--lr", "1e30", "--warmup", "0"]
    status, out, _ = run(capsys, "compare", GPT2, GPT2, "--data", text, *QUICK, *flags, "--out", str(tmp_path / "out"))
    assert status == 1
    assert "failed: " in out


def test_a_prompt_that_cannot_be_encoded_leaves_stdout_empty(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "generate", str(trained), "--prompt", "Ω")
    assert (code, out) == (1, "")
    assert "'Ω'" in err
    assert err.count("\n") == 1


def test_an_out_that_is_a_file_is_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    code, out, err = run(capsys, "train", GPT2, "--data", text, *QUICK, "--out", str(taken))
    assert (code, out, err) == (2, "", f"error: out: {taken} is a file; choose a folder\n")


@pytest.mark.parametrize("command", ["train", "compare", "show"])
def test_wrong_lines_and_wrong_settings_are_told_together(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["gpt3", "llama(d_modle=4)"][: 1 if command == "train" else 2]
    wrong = {"show": ["--context", "0"]}.get(command, ["--lr", "-1", "--device", "gpu", "--betas", "0.9"])
    status, out, err = run(capsys, command, *lines, *wrong)
    assert (status, out) == (2, "")
    parts = ["unknown preset 'gpt3'", "did you mean 'd_model'?"][: len(lines)]
    parts += (
        ["context: given"] if command == "show" else ["lr: given '-1'", "device: given 'gpu'", "betas: given [0.9]"]
    )
    assert f"error: {len(parts)} problems\n" in err
    for part in parts:
        assert part in err


def test_shown_columns_are_headed_by_what_they_count(capsys: pytest.CaptureFixture[str]) -> None:
    (facts,) = run_json(capsys, "show", "llama", "--model.attention.kind", "window", "--model.attention.window", "8")
    assert facts["line"] == "llama(attention=window(8))"


def test_lists_have_no_trailing_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "list")
    assert out.splitlines()
    assert all(line == line.rstrip() for line in out.splitlines())


def test_bench_measures_prints_and_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--kinds", "softmax,window(4)", "--lengths", "16:32", "--rounds", "5", "--n-heads", "2", "--head-dim", "8"]
    status, out, _ = run(capsys, "bench", "attention", *flags, "--device", "cpu", "--out", str(tmp_path / "out"))
    assert status == 0
    assert all(word in out for word in ("sdpa", "softmax", "window(4)", "baseline", "×"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "result.json"}
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    found = run_json(capsys, "bench", "attention", *flags, "--device", "cpu", "--no-backward")
    assert found["lengths"] == written["lengths"] == [16, 32]
    assert found["settings"]["backward"] is False
    planned = run_json(capsys, "bench", "attention", *flags, "--dry-run", "--out", str(tmp_path / "other"))
    assert planned["kinds"] == ["sdpa", "softmax", "window(4)"]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["atention"], "did you mean 'attention'"),
        (["attention", "--kinds", "sofmax"], "did you mean 'softmax'"),
        (["attention", "--lengths", "512-1024"], "lengths: given '512-1024', should be FIRST:LAST"),
        (["attention", "--rounds", "3"], "rounds: "),
        (["attention", "--kinds", "softmax", "--position", "rope", "--head-dim", "7"], "rope turns pairs"),
        (["attention", "--budgte", "3"], "did you mean '--budget'"),
        ([], "SUBJECT"),
    ],
)
def test_a_mistake_in_a_benchmark_is_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "bench", *argv)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert said in err
