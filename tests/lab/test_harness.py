"""lm-eval asks a model of ours: its numbers are those of the model, token by token."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from headwise.data.tokenizers import ByteTokenizer, CharTokenizer
from headwise.errors import DataError, SettingsError
from headwise.lab.harness import HarnessModel, evaluate_tasks
from headwise.model import build
from headwise.model.base import LanguageModel
from headwise.spec import parse


def model_of(line: str = "llama", max_seq_len: int = 64) -> LanguageModel:
    torch.manual_seed(0)
    model = build(parse(line).resolve(size="10k", vocab_size=257, max_seq_len=max_seq_len), seed=0)
    torch.nn.init.normal_(model.embedding.weight, std=0.5)  # so that tokens are not all alike
    return model


BYTES = ByteTokenizer(eos=True)


@torch.no_grad()
def naive(model: LanguageModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """By definition: one token after the other, each with a pass of its own."""
    total, greedy = 0.0, True
    for n, token in enumerate(continuation):
        logs_V = model.eval()(torch.tensor([context + continuation[:n]]))[0, -1].log_softmax(0)
        total += float(logs_V[token])
        greedy &= int(logs_V.argmax()) == token
    return total, greedy


@pytest.mark.parametrize("line", ["llama", "llama(attention=gla)"])
def test_a_continuation_has_the_log_probability_of_its_tokens(line: str) -> None:
    model = model_of(line)
    pairs = [("the answer is", " 42"), ("a", "b"), ("one and", " a good deal more than one"), ("", "start")]
    best = BYTES.decode([int(model(torch.tensor([BYTES.encode("abc").tolist()]))[0, -1, :256].argmax())])
    pairs += [("abc", best)] if best.isascii() else []
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    found = HarnessModel(model.train(), BYTES, batch_size=2).loglikelihood(asked, disable_tqdm=True)
    assert model.training
    for (context, continuation), (logprob, greedy) in zip(pairs, found):
        before = BYTES.encode(context).tolist() or [BYTES.eos_id]
        wanted = naive(model, before, BYTES.encode(continuation).tolist())
        assert logprob == pytest.approx(wanted[0], rel=1e-4)
        assert greedy == wanted[1]


def test_a_text_longer_than_the_model_loses_its_beginning() -> None:
    model = model_of(max_seq_len=8)
    lm = HarnessModel(model, BYTES)
    (found,) = lm.loglikelihood([Instance("loglikelihood", {}, ("0123456789", "ab"), 0)], disable_tqdm=True)
    wanted = naive(model, BYTES.encode("3456789").tolist(), BYTES.encode("ab").tolist())
    assert found[0] == pytest.approx(wanted[0], rel=1e-4)


def test_a_whole_text_is_scored_window_by_window() -> None:
    model, text = model_of(max_seq_len=8), "a text of twenty ch."
    ids = [256, *BYTES.encode(text).tolist()]
    (found,) = HarnessModel(model, BYTES).loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    cuts = [(0, 8), (8, 16), (12, 20)]  # inputs; the last window reads further back, and predicts what is new
    wanted = sum(
        naive(model, ids[start : max(start, done) + 1], ids[max(start, done) + 1 : stop + 1])[0]
        for (start, stop), done in zip(cuts, (0, 8, 16))
    )
    assert found == pytest.approx(wanted, rel=1e-4)


def test_texts_are_written_up_to_the_stop_string() -> None:
    from headwise.generate import complete
    from headwise.generate.request import Request
    from headwise.generate.sampling import Sampling

    model = model_of()
    free = complete(model, BYTES, Request("Once", Sampling(temperature=0.0), max_new_tokens=12)).text
    asked = [
        ("Once", {"max_gen_toks": 12}),
        ("Once", {"max_gen_toks": 12, "until": [free[3]]}),
        ("Twice", {"until": "x"}),
    ]
    lm = HarnessModel(model, BYTES)
    found = lm.generate_until([Instance("generate_until", {}, pair, n) for n, pair in enumerate(asked)])
    assert found[0] == free
    assert found[1] == free[: free.index(free[3])]
    drawn = {"max_gen_toks": 12, "do_sample": True, "temperature": 2.0}
    assert lm.generate_until([Instance("generate_until", {}, ("Once", drawn), 0)]) != [free]


def test_what_cannot_be_asked_is_said() -> None:
    encoder = build(parse("gpt2(architecture=encoder)").resolve(size="10k", vocab_size=257, max_seq_len=64), seed=0)
    with pytest.raises(SettingsError, match="asks a decoder, and this is an encoder"):
        HarnessModel(encoder, BYTES)
    endless = HarnessModel(model_of(), CharTokenizer("abc"))
    with pytest.raises(DataError, match="char tokenizer has no token that stands between texts"):
        endless.loglikelihood([Instance("loglikelihood", {}, ("", "abc"), 0)], disable_tqdm=True)


# ---- tasks ----

TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["3", "4"]
doc_to_target: right
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"{n}+{n % 3}=", "right": n % 2} for n in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(TASK.format(file=tmp_path / "sums.jsonl"))
    return tmp_path / "tasks"


def test_a_task_of_ones_own_is_asked_and_scored(tasks: Path) -> None:
    model = model_of()
    found = evaluate_tasks(model, BYTES, ["sums"], include_path=tasks)
    right = 0
    for n in range(6):
        context = BYTES.encode(f"{n}+{n % 3}=").tolist()
        scores = [naive(model, context, BYTES.encode(f" {choice}").tolist())[0] for choice in "34"]
        right += (scores[1] > scores[0]) == bool(n % 2)
    assert found["sums"]["acc,none"] == pytest.approx(right / 6)
    assert evaluate_tasks(model, BYTES, ["sums"], include_path=tasks, limit=2)["sums"]["sample_len"] == 2


def test_tasks_and_folders_that_are_not_there_are_named(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headwise.lab import harness

    class Few(harness.TaskManager):  # the harness's own tasks take it 20 seconds to list
        def __init__(self, include_path: Path | None, include_defaults: bool) -> None:
            super().__init__(include_path=include_path or os.fspath(tasks), include_defaults=False)

    monkeypatch.setattr(harness, "TaskManager", Few)
    with pytest.raises(SettingsError, match=r"lm-eval knows no 'sum' \(did you mean 'sums'\?\)"):
        evaluate_tasks(model_of(), BYTES, ["sum"], include_path=tasks)
    with pytest.raises(SettingsError, match=r"include_path: .* is no folder"):
        evaluate_tasks(model_of(), BYTES, ["sums"], include_path=tasks / "nothing")
    with pytest.raises(SettingsError, match="no chat template"):
        evaluate_tasks(model_of(), BYTES, ["sums"], include_path=tasks, chat=True)
    (tasks.parent / "sums.jsonl").unlink()
    with pytest.raises(DataError, match=r"lm-eval cannot do sums: .*; check its data and the network"):
        evaluate_tasks(model_of(), BYTES, ["sums"], include_path=tasks)
