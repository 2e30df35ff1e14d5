"""`headwise distill run` and `profile`: what they say, document 004's spellings, and what they refuse beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import run, run_json

import headwise as hw
from headwise.cli import main
from headwise.cli.distill import with_own_words
from headwise.data import load_tokenizer
from headwise.distill import DistillSettings
from headwise.io.checkpoint import list_checkpoints

STUDENT = "llama(d_model=8, n_layers=2, n_heads=2)"
QUICK = ["--seq-len", "16", "--batch-size", "4", "--log-every", "2", "--measure-rows", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def teacher(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("distill") / "teacher"
    line = "llama(d_model=16, n_layers=4, n_heads=2)"
    assert (
        main(["train", line, "--data", text, "--seq-len", "16", "--steps", "4", "--threads", "1", "--out", str(out)])
        == 0
    )
    return out


def argv(teacher: Path, text: str, *more: str) -> list[str]:
    return ["distill", "run", "--teacher", str(teacher), "--student", STUDENT, "--data", text, *QUICK, *more]


def test_document_004s_command_line_trains_and_resumes(
    teacher: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["--kv_projection_mode", "structured", "--share_dim_proj", "--init_uniform", "--lambda_kv", "0.5"]
    words += ["--use_structural_loss", "--lambda_struct", "0.1", "--max_steps", "6", "--output_dir", str(out)]
    words += ["--run_name", "v4_structured", "--checkpoint_every=4"]
    told = run_json(capsys, *argv(teacher, text, *words))
    assert (told["projection"], told["steps"], told["run_name"]) == ("structured", 6, "v4_structured")
    assert told["out"] == str(out)
    assert told["aligner_params"] == 3 * (2 * 2 + 4 * 8)
    held = json.loads((out / "run.json").read_text())["settings"]
    assert (held["share_dim_proj"], held["init_uniform"], held["structural_loss"]) == (True, True, True)
    (list_checkpoints(out / "checkpoints")[-1] / "model.safetensors").write_bytes(b"")
    again = run_json(capsys, "resume", str(out))
    assert again["val_loss"] == told["val_loss"]
    evaluated = run_json(capsys, "eval", str(out), "--data", text)
    assert evaluated["nats"] == pytest.approx(told["val_loss"], rel=0.05)
    status, said, _ = run(capsys, "generate", str(out), "--prompt", "the ", "--max-new-tokens", "3")
    assert (status, said[:4]) == (0, "the ")


@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_ten_steps_in_each_mode_are_sound(
    mode: str, teacher: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Document 004's smoke run."""
    out = tmp_path / "run"
    assert (
        run(capsys, *argv(teacher, text, "--kv_projection_mode", mode, "--max_steps", "10", "--out", str(out)))[0] == 0
    )
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_the_end_of_a_run_says_how_near_the_student_came_beside_the_control(
    teacher: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, line = tmp_path / "out", "llama(d_model=16, n_layers=2, n_heads=2, attention=pattern(softmax, linear))"
    words = ["distill", "run", "--teacher", str(teacher), "--student", line, "--data", text, *QUICK]
    status, said, _ = run(capsys, *words, "--steps", "2", "--out", str(out))
    assert status == 0
    figures = run_json(capsys, "resume", str(out))
    for name, what in (("k", "keys"), ("v", "values"), ("output", "attention outputs")):
        own, control = (next(x for x in figures[f"cosine_{name}{end}"] if x is not None) for end in ("", "_shuffled"))
        assert f"{what}: cosine {own:.3f} with the teacher's, {control:.3f} with those of other texts" in said


def test_the_caches_size_is_said_before_it_is_made(
    teacher: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--steps", "2", "--cache-teacher", "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    _, _, said = run(capsys, *argv(teacher, text, *more))
    sizes = [
        run_json(capsys, *argv(teacher, text, *more[:3], "--cache-dtype", dtype, "--dry-run"))["cache_bytes"]
        for dtype in ("bfloat16", "float32")
    ]
    n_tokens = sizes[0] // (4 * 2 * 8 * 2 * 2)  # layers, heads, width, keys and values, bytes
    assert 7 * 16 < n_tokens <= 8 * 16
    assert sizes[1] == 2 * sizes[0]
    assert f"the teacher's keys, values of 8 windows take {sizes[0] / 1e6:.3f} MB in bfloat16" in said
    assert list((tmp_path / "cache").glob("*.safetensors"))


def test_a_dry_run_says_sizes_and_writes_nothing(
    teacher: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = run_json(capsys, *argv(teacher, text, "--steps", "10", "--dry-run"))
    assert plan["tokens"] == 10 * 4 * 16
    assert plan["student"][1] == hw.count(plan["student"][0]).params
    assert plan["teachers"][0][1] == hw.count(str(hw.load(teacher).spec)).params
    assert plan["aligner_params"] == 2 * (2 * 2 + 4 * 8)
    told = run(capsys, *argv(teacher, text, "--epochs", "1", "--dry-run"))[1]
    assert "nothing was trained" in told
    assert "with --cache-teacher" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_profile_says_shapes_parameters_time_and_that_all_is_finite(
    mode: str, teacher: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["distill", "profile", "--projection", mode, "--teacher", str(teacher), "--student", STUDENT, "--data", text]
    found = run_json(capsys, *argv, *QUICK, "--rounds", "1")
    assert found["teacher_shapes"] == {"keys": [4, 4, 2, 16, 8], "values": [4, 4, 2, 16, 8]}
    assert found["student_shapes"] == found["aligned_shapes"] == {"k": [4, 2, 2, 16, 4], "v": [4, 2, 2, 16, 4]}
    assert found["signal_bytes"] == 2 * 4 * 4 * 2 * 16 * 8 * 4
    assert found["not_finite"] == []
    assert 0 < found["aligner_share"] < 1
    assert (found["params"]["aligner"] == 2 * (2 * 2 + 4 * 8)) == (mode == "structured")
    told = run(capsys, *argv, *QUICK, "--rounds", "1")[1]
    assert "every number is finite" in told
    assert "rounds: given 0" in run(capsys, *argv, *QUICK, "--rounds", "0")[2]
    assert "[B,L,H,T,D]" in told


def test_profile_names_what_is_not_finite(
    text: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hw.load(teacher)
    model.decoding_stack().blocks[3].attention.wv.weight.data[0, 0] = float("inf")
    hw.save_pretrained(model, tmp_path / "bad", load_tokenizer(teacher))
    argv = ["distill", "profile", "--teacher", str(tmp_path / "bad"), "--student", STUDENT, "--data", text, *QUICK]
    status, told, _ = run(capsys, *argv, "--rounds", "1")
    assert status == 1
    assert "NOT FINITE: teacher's values" in told


def test_every_subject_has_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    status, overview, _ = run(capsys, "distill", "--help")
    assert status == 0
    for subject in ("run", "profile", "ab", "compare"):
        assert f"  {subject}" in overview
        status, told, _ = run(capsys, "distill", subject, "--help")
        assert status == 0
        assert f"headwise distill {subject}" in told.partition("examples:")[2]
    assert run(capsys, "distill")[0] == 2
    assert run(capsys, "distill", "rum")[2].startswith("error: unknown subject 'rum' (did you mean 'run'?)")


def test_every_flag_of_document_004_is_a_field() -> None:
    words = with_own_words(
        ["--kv_projection_mode=flat", "--max_steps", "3", "--output_dir", "x", "--lambda_kv", "--max-steps"]
    )
    assert words == ["--projection=flat", "--steps", "3", "--out", "x", "--lambda_kv", "--steps"]
    for name in ("share_dim_proj", "init_uniform", "lambda_kv", "run_name", "epochs", "batch_size", "lr", "mlp_ratio"):
        assert name in DistillSettings.model_fields


BAD: list[tuple[list[str], str]] = [
    (["--teacher", "nowhere/model"], "nowhere/model is no folder"),
    (["--teacher", "taecher"], "teacher: there is no file or folder 'taecher', and as a line: "),
    (["--student", "lama"], "student: there is no file or folder 'lama', and as a line: "),
    (["--teacher", "llama(d_model=8", "--tokenizer", "char"], "not a call expression"),
    (["--projection", "round"], "projection: given 'round', should be 'none', 'flat' or 'structured'"),
    (["--lambda-kv", "-1"], "lambda_kv: given '-1', should be greater than or equal to 0"),
    (["--logit-kd", "0,1"], "logit_kd: given (0.0, 1.0), a temperature more than 0"),
    (["--logit-kd", "warm"], "logit_kd: given 'warm', should be a temperature and a weight, as 2,0.5"),
    (["--teacher-weights", "1,2"], "teacher_weights: 2 given for 1 teacher; one each"),
    (["--teacher-weights", "router"], "a router chooses among teachers; give two or more"),
    (["--epochs", "2", "--steps", "3"], "epochs: 2 and steps=3 exclude each other"),
    (["--structural-loss", "--projection", "none"], "structural_loss: compares projected caches"),
    (["--init-from", "runs/x"], "init_from: give the folder as the student, as --student runs/x"),
    (["--cache-dir", "x"], "cache_dir: nothing is cached without cache_teacher"),
    (["--seq-len", "64"], "seq_len: 64 is more than the teacher's max_seq_len=16"),
    (["--tokenizer", "byte"], "has another tokenizer"),
    (["--loss-on", "completion"], "loss_on completion: the parts of"),
    (["--format", "gsm8k"], "format gsm8k is read from files of JSON lines"),
    (["--student", "gpt2(attention=window(0))"], "attention.window"),
    (["--student", "transformer"], "is an encoder_decoder; a causal decoder is wanted"),
    (
        ["--teacher", "llama(d_model=8, n_layers=2, n_heads=2, attention=gla)", "--tokenizer", "char"],
        "keeps a state and no keys",
    ),
    (
        [
            "--teacher",
            "llama(d_model=8, n_layers=2, n_heads=2, attention=pattern(gqa(kv_heads=1), softmax))",
            "--tokenizer",
            "char",
        ],
        "one shape for all layers is wanted",
    ),
]


@pytest.mark.parametrize(("more", "message"), BAD)
def test_bad_input_is_one_clear_error_before_any_training(
    more: list[str], message: str, teacher: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    given: dict[str, Any] = {"--teacher": str(teacher), "--student": STUDENT, "--data": text, "--out": str(out)}
    replaced = {name: value for name, value in given.items() if name not in more}
    quick = QUICK[2:] if "--seq-len" in more else QUICK
    words = [word for pair in replaced.items() for word in pair]
    status, _, said = run(capsys, "distill", "run", *words, *quick, *more)
    assert status in (1, 2)
    assert said.startswith("error: ") or "\nerror: " in said
    assert message in said
    assert "Traceback" not in said
    assert not out.exists()


def test_limits_take_the_first_examples(
    teacher: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "<|prompt|>the head<|answer|> is wise"} for _ in range(9)]
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--train-limit", "4", "--val-limit", "2", "--epochs", "2", "--loss-on", "completion"]
    told = run_json(capsys, *argv(teacher, str(tmp_path), *more, "--out", str(tmp_path / "run")))
    assert told["steps"] == 2  # 4 windows, 4 at once, twice
    assert list(told["val_loss_by_part"]) == ["answer"]
    assert run(capsys, *argv(teacher, text, "--val-limit", "2"))[0] == 2


def test_segments_that_do_not_cover_the_text_are_refused_with_row_and_place(
    teacher: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    good = {"text": "the head is wise", "spans": [[0, 8, "prompt"], [8, 16, "answer"]]}
    bad = {"text": "the head is wise", "spans": [[0, 7, "prompt"], [8, 16, "answer"]]}
    rows.write_text("".join(json.dumps(row) + "\n" for row in [good, bad]))
    out = tmp_path / "run"
    status, _, said = run(capsys, *argv(teacher, str(rows), "--format", "marks", "--out", str(out)))
    assert status == 1
    assert "rows.jsonl' line 2: its segments do not cover the text: characters 7 to 8" in said
    assert not out.exists()


def test_all_problems_come_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, said = run(capsys, "distill", "run", "--lambda-kv=-1", "--kv-loss", "huber")
    for name in ("lambda_kv", "kv_loss", "teacher", "student"):
        assert f"  - {name}: " in said


def test_a_cache_of_another_teacher_or_data_set_is_refused(
    teacher: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["--cache-teacher", "--cache-dir", str(tmp_path / "cache"), "--steps", "2"]
    assert run(capsys, *argv(teacher, text, *cache, "--out", str(tmp_path / "first")))[0] == 0
    other = tmp_path / "other.txt"
    other.write_text(Path(text).read_text()[::-1])
    untrained = ["distill", "run", "--teacher", STUDENT, "--tokenizer", "char", "--student", STUDENT, "--data", text]
    for words, what in (
        ([*argv(teacher, str(other)), "--tokenizer", "teacher"], "data set"),
        ([*untrained, *QUICK], "teacher"),
        (argv(teacher, text, "--seq-len", "8"), "seq_len"),
        (argv(teacher, text, "--cache-dtype", "int8"), "dtype"),
    ):
        status, _, said = run(capsys, *words, *cache, "--out", str(tmp_path / "second"))
        assert status == 1
        assert f"was made with another {what}" in said
        assert not (tmp_path / "second").exists()
    status, _, said = run(capsys, *argv(teacher, text, *cache, "--hidden", "1", "--out", str(tmp_path / "second")))
    assert "the teacher cache in" in said
    assert status == 1
