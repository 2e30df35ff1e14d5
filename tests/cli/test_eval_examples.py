"""`headwise eval` on texts whose parts are known, with questions to answer, and with lm-eval's tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import run, run_json

from headwise.data import load_examples
from headwise.data.tokenizers import ByteTokenizer
from headwise.distill.exact_match import exact_match
from headwise.io.pretrained import save_pretrained
from headwise.model import build
from headwise.spec import parse
from headwise.train.parts import evaluate_examples


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "bytes"
    spec = parse("llama").resolve(size="10k", vocab_size=257, max_seq_len=64)
    save_pretrained(build(spec, seed=0), folder, ByteTokenizer(eos=True))
    return str(folder)


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data") / "sums"
    folder.mkdir()
    for name, numbers in (("train", range(6)), ("test", range(6, 10))):
        rows = [{"question": f"{n}+1?", "answer": f"{n + 1} it is\n#### {n + 1}"} for n in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_the_loss_of_each_part_is_told(model: str, sums: str, capsys: pytest.CaptureFixture[str]) -> None:
    import headwise as hw

    examples = load_examples(sums, ByteTokenizer(eos=True))
    wanted = evaluate_examples(hw.load(model), examples.val)
    found = run_json(capsys, "eval", model, "--data", sums)
    assert found["by_part"] == pytest.approx(wanted.by_part)
    assert (found["nats"], found["n_tokens"]) == (pytest.approx(wanted.nats), examples.val.n_targets)
    both = run_json(capsys, "eval", model, "--data", sums, "--split", "all")
    assert both["n_tokens"] == examples.val.n_targets + examples.train.n_targets
    on_train = evaluate_examples(hw.load(model), examples.train)
    mean = sum(r.by_part["answer"] * r.tokens_by_part["answer"] for r in (wanted, on_train))
    assert both["by_part"]["answer"] == pytest.approx(mean / both["tokens_by_part"]["answer"])
    status, out, _ = run(capsys, "eval", model, "--data", sums, "--limit", "2")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["prompt", "reasoning", "answer"]
    assert "tokens of sums (val)" in out
    assert run_json(capsys, "eval", model, "--data", sums, "--limit", "2")["n_tokens"] < wanted.n_tokens


def test_questions_are_answered_behind_examples(model: str, sums: str, capsys: pytest.CaptureFixture[str]) -> None:
    import headwise as hw

    flags = ["--exact-match", "--shots", "2", "--max-new-tokens", "4", "--limit", "3"]
    found = run_json(capsys, "eval", model, "--data", sums, *flags)["exact_match"]
    assert (found["questions"], found["shots"]) == (3, 2)
    tokenizer = ByteTokenizer(eos=True)
    examples = load_examples(sums, tokenizer)
    shots = examples.train.texts[:2]
    wanted = exact_match(hw.load(model), tokenizer, examples.val.texts[:3], shots=shots, max_new_tokens=4)
    assert found == {**wanted.figures(), "shots": 2}
    out = run(capsys, "eval", model, "--data", sums, *flags)[1]
    assert "exact match of 3 questions, 2 examples before each:" in out
    assert "the number behind ####" in out
    beyond = run_json(capsys, "eval", model, "--data", sums, *flags, "--split", "train")["exact_match"]
    assert beyond["questions"] == 1, "a question is not asked behind itself"


def test_an_lm_eval_task_is_asked(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from headwise.lab import harness

    asked = []

    def evaluate_tasks(*args: object, **options: object) -> dict[str, dict[str, float]]:
        asked.append((args[2], options))
        return {"sums": {"acc,none": 0.25, "acc_stderr,none": 0.125, "em,strict": 0.5, "sample_len": 4}}

    monkeypatch.setattr(harness, "evaluate_tasks", evaluate_tasks)
    flags = ["--tasks", "sums, other", "--include-path", str(tmp_path), "--limit", "4", "--shots", "1", "--chat"]
    found = run_json(capsys, "eval", model, *flags)
    assert found["tasks"]["sums"]["acc,none"] == 0.25
    names, options = asked[0]
    assert names == ["sums", "other"]
    assert options == {"include_path": tmp_path, "shots": 1, "limit": 4, "chat": True, "batch_size": 8}
    out = run(capsys, "eval", model, *flags)[1]
    assert [line.split() for line in out.splitlines()] == [
        ["sums", "acc", "0.2500", "±", "0.1250"],
        ["sums", "em", "(strict)", "0.5000"],
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--exact-match", "--limit", "3"], "exact_match: is for examples, and these data are plain text"),
        (["--chat"], "chat: is for tasks; name some"),
        (["--tasks", "x", "--exact-match", "--quantise", "int8"], "quantise: does not go with tasks"),
        (["--format", "gsm8k"], "format gsm8k is read from files of JSON lines"),
        (["--format", "gsm8"], "format: given 'gsm8'"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    model: str, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "eval", model, *flags)
    assert status in (1, 2)
    assert words in err
