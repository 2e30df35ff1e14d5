"""A run from line to figures: what it reports, what it leaves alone, what it refuses."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import LINE, LINE_WITH_DROPOUT, QUICK

from headwise.data import Dataset
from headwise.errors import SettingsError
from headwise.model import build
from headwise.train import TrainResult, TrainSettings, evaluate, train
from headwise.train.folder import RunFolder
from headwise.train.job import prepare
from headwise.train.trainer import Trainer


def run(dataset: Dataset, line: str = LINE, **changes: Any) -> TrainResult:
    return train(line, dataset=dataset, **{**QUICK, **changes})


def same_bits(one: TrainResult, two: TrainResult) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters()))


def test_training_learns_and_reports_what_evaluation_gives(dataset: Dataset) -> None:
    result = run(dataset, steps=60, lr=1e-2)
    untrained = evaluate(build(result.spec), dataset.val).nats
    assert result.val_loss < untrained - 0.3
    again = evaluate(result.model, dataset.val)
    assert (result.val_loss, result.bits_per_byte) == (again.nats, again.bits_per_byte)
    assert not result.model.training


def test_records_come_at_their_steps_and_reach_the_callback(dataset: Dataset) -> None:
    seen: list[dict[str, Any]] = []
    result = run(dataset, steps=11, log_every=3, eval_every=4, on_progress=seen.append)
    assert [values["step"] for values in result.history] == [3, 4, 6, 8, 9, 11]
    assert [values["step"] for values in result.history if "val_loss" in values] == [4, 8, 11]
    assert seen == [{**values, "steps": 11} for values in result.history]
    assert [values["tokens"] for values in result.history] == [64 * values["step"] for values in result.history]
    assert result.history[-1]["val_loss"] == result.val_loss
    assert result.tokens == 11 * 64
    json.dumps(result.history, allow_nan=False)


def test_the_reported_loss_is_the_mean_since_the_record_before(dataset: Dataset) -> None:
    each = [values["loss"] for values in run(dataset, log_every=1, eval_every=0).history]
    thirds = [values["loss"] for values in run(dataset, log_every=3, eval_every=0).history]
    assert thirds == pytest.approx([sum(each[i : i + 3]) / 3 for i in range(0, 12, 3)])


def test_the_same_run_twice_gives_the_same_bits_and_seeds_differ(dataset: Dataset) -> None:
    one, two, other = (run(dataset, LINE_WITH_DROPOUT, seed=seed) for seed in (3, 3, 4))
    assert same_bits(one, two)
    assert one.val_loss == two.val_loss
    assert not same_bits(one, other)


def test_logging_evaluating_and_saving_change_nothing(dataset: Dataset, tmp_path: Path) -> None:
    """With dropout, so that one stray random number would show."""
    plain = run(dataset, LINE_WITH_DROPOUT, log_every=100, eval_every=0, checkpoint_every=0)
    watched = run(dataset, LINE_WITH_DROPOUT, log_every=1, eval_every=1, checkpoint_every=1, out=tmp_path / "run")
    assert same_bits(plain, watched)


def test_the_callers_torch_state_is_left_alone(dataset: Dataset) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    run(dataset, LINE_WITH_DROPOUT, threads=threads + 1, seed=9, steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("line", [LINE, "gpt2(architecture=encoder, d_model=16, n_layers=2, n_heads=2)"])
def test_accumulated_batches_equal_one_large_batch(dataset: Dataset, line: str) -> None:
    """An encoder masks a different number of tokens in each row, so a mean of means would not pass."""
    large = run(dataset, line, batch_size=6, log_every=1)
    small = run(dataset, line, batch_size=2, accumulate=3, log_every=1)
    for one, two in zip(large.history, small.history):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert two["tokens"] == one["tokens"]


@pytest.mark.parametrize(
    "line", ["gpt2(architecture=encoder)", "transformer", "llama(attention=gqa(kv_heads=1))", "gpt2(order=parallel)"]
)
def test_every_architecture_learns_its_objective(dataset: Dataset, line: str) -> None:
    from headwise.spec import parse

    spec = parse(line).replace(d_model=16, n_layers=2, n_heads=2)
    result = train(spec, dataset=dataset, **{**QUICK, "steps": 40, "lr": 1e-2, "log_every": 5})
    losses = [values["loss"] for values in result.history]
    assert losses[-1] < losses[0] - 0.2
    assert (result.bits_per_byte is None) == (spec.architecture == "encoder")


def test_checkpointed_activations_give_the_same_gradients(dataset: Dataset) -> None:
    plain = run(dataset, LINE_WITH_DROPOUT, log_every=1)
    recomputed = run(dataset, LINE_WITH_DROPOUT, log_every=1, activation_checkpointing=True)
    assert [v["grad_norm"] for v in plain.history] == pytest.approx([v["grad_norm"] for v in recomputed.history])


def test_bfloat16_autocast_stays_close_and_keeps_float32_parameters(dataset: Dataset) -> None:
    full, half = run(dataset, log_every=1), run(dataset, log_every=1, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert [v["loss"] for v in half.history] == pytest.approx([v["loss"] for v in full.history], rel=0.02)
    assert half.val_loss != full.val_loss


def test_the_compiled_step_gives_the_same_losses(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, differentiated and partitioned as for real, but run without generating C++, which takes half a minute."""
    plain = run(dataset, log_every=1)
    compiler = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiler)
    compiled = run(dataset, log_every=1, compile=True)
    assert [v["loss"] for v in compiled.history] == pytest.approx([v["loss"] for v in plain.history], rel=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, as its compiler loads
def test_a_run_in_generated_code_gives_the_same_losses(dataset: Dataset) -> None:
    """The same through the whole compiler, C++ and all, of one small layer."""
    line = "llama(d_model=16, n_layers=1, n_heads=2)"
    settings = {**QUICK, "steps": 3, "log_every": 1}
    plain, compiled = (train(line, dataset=dataset, compile=c, **settings) for c in (False, True))
    assert [v["loss"] for v in compiled.history] == pytest.approx([v["loss"] for v in plain.history], rel=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e9])
def test_gradients_are_clipped_to_the_norm_and_otherwise_untouched(dataset: Dataset, clip: float) -> None:
    trainer = Trainer(prepare(LINE, TrainSettings(**QUICK, clip=clip), dataset))
    norms: list[float] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    trainer.optimizer.register_step_pre_hook(look)
    trainer.update()
    assert trainer.last_norm > 0.1
    assert norms == [pytest.approx(0.05, rel=1e-3) if clip == 0.05 else pytest.approx(trainer.last_norm, rel=1e-6)]


def test_a_learning_rate_factor_of_zero_freezes(dataset: Dataset) -> None:
    result = run(dataset, lr_multipliers={"stack.blocks.0": 0.0})
    start = dict(build(result.spec).named_parameters())
    for name, parameter in result.model.named_parameters():
        assert torch.equal(parameter, start[name]) == name.startswith("stack.blocks.0."), name


def test_without_out_nothing_is_written(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(dataset, checkpoint_every=1)
    assert list(tmp_path.iterdir()) == []
    assert result.out is None
    assert result.metrics is None


def test_the_run_folder_holds_what_it_should(dataset: Dataset, tmp_path: Path) -> None:
    result = run(dataset, out=tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["checkpoints", "metrics.jsonl", "result.json", "run.json", "tokenizer"]
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["resolved_line"] == str(result.spec)
    assert about["data"]["fingerprint"] == dataset.fingerprint
    assert TrainSettings(**about["settings"]).differences(result.settings) == []
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result.figures()
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step-000008", "step-000012"]


def test_a_folder_in_use_is_refused_with_the_way_out(dataset: Dataset, tmp_path: Path) -> None:
    run(dataset, out=tmp_path / "run")
    with pytest.raises(SettingsError, match=r"already holds a run \(at step 12\).*headwise resume .*another --out"):
        run(dataset, out=tmp_path / "run")
    with pytest.raises(SettingsError, match="already holds a run"):  # at once, before data are looked for
        train(LINE, data="nowhere.txt", out=tmp_path / "run")
    with pytest.raises(SettingsError, match="already holds a run"):
        RunFolder(tmp_path / "run").create(LINE, prepare(LINE, TrainSettings(**QUICK), dataset))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(SettingsError, match="not empty"):
        run(dataset, out=tmp_path / "other")
    (tmp_path / "empty").mkdir()
    run(dataset, out=tmp_path / "empty")


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        ("gpt2(d_model=16, n_layers=1, n_heads=2, vocab_size=10)", {}, "vocab_size: the line says 10"),
        ("gpt2(d_model=16, n_layers=1, n_heads=2, max_seq_len=8)", {}, "max_seq_len=8; choose at most 8"),
        (LINE, {"lr_multipliers": {"*.vein.*": 0.1}}, r"'\*\.vein\.\*' matches no parameter"),
        (LINE, {"device": "cuda:99"}, "'cuda:99' is not on this machine"),
        (LINE, {"leaning_rate": 1}, "unknown setting 'leaning_rate'"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(
    dataset: Dataset, tmp_path: Path, line: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        run(dataset, line, out=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_settings_may_be_given_whole_or_by_keyword(dataset: Dataset) -> None:
    whole = train(LINE, TrainSettings(**QUICK), dataset=dataset)
    mixed = train(LINE, TrainSettings(**{**QUICK, "steps": 3}), dataset=dataset, steps=12)
    assert whole.val_loss == mixed.val_loss == run(dataset).val_loss
