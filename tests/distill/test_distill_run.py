"""A whole distillation: what it writes, what it trains, and that it ends with the same bits however it got there."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_distillations import QUICK, STUDENT, check_same, check_same_student, newest, records, run

import headwise as hw
from headwise.data import load_tokenizer
from headwise.data.examples import load_examples
from headwise.distill import DistillSettings, Teacher, distill_or_resume, resume
from headwise.distill.job import prepare, settled
from headwise.distill.trainer import DistillTrainer
from headwise.errors import DataError, FormatError, Interrupted, SettingsError, TrainingError
from headwise.lab.swap import SwapSettings, swap_saved
from headwise.train import train
from headwise.train.folder import RunFolder
from headwise.train.parts import evaluate_examples

EVERYTHING: dict[str, Any] = {"structural_loss": True, "hidden": 0.3, "logit_kd": (2.0, 0.5), "layer_map": "learned"}
WITH_DROPOUT = "llama(d_model=8, n_layers=2, n_heads=2, dropout=0.2)"
MEASURES = [f"{measure}_{of}{control}" for measure in ("cosine", "cka") for of in "kv" for control in ("", "_shuffled")]


def mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def kill_at(step: int) -> Callable[[dict[str, Any]], None]:
    def on_progress(values: dict[str, Any]) -> None:
        if values["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_progress


# ---- what a run leaves ----


@pytest.fixture(scope="module")
def whole(teacher: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with everything, dropout too, that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(teacher, text_file, WITH_DROPOUT, out=out, projection="flat", projector_dropout=0.1, **EVERYTHING)
    return out


def test_records_figures_and_folder(whole: Path, teacher: Path, text_file: Path) -> None:
    told = records(whole)
    losses = {"loss_task", "loss_k", "loss_v", "loss_struct", "loss_hidden", "loss_logits"}
    assert [record["step"] for record in told] == [1, 2, 3, 4, 5, 6]
    assert all(losses <= record.keys() for record in told)
    weights = {"loss_k": 0.5, "loss_v": 0.5, "loss_struct": 0.1, "loss_hidden": 0.3, "loss_logits": 0.5}
    for record in told:
        parts = record["loss_task"] + sum(weight * record[name] for name, weight in weights.items())
        assert record["loss"] == pytest.approx(parts, rel=1e-5)
    evaluated = [record for record in told if "val_loss" in record]
    assert [record["step"] for record in evaluated] == [3, 6]
    assert all(len(record[name]) == 2 for record in evaluated for name in MEASURES)
    figures = json.loads((whole / "result.json").read_text())
    assert figures["val_loss_by_part"] == {"text": pytest.approx(figures["val_loss"])}
    assert figures["teacher"] == [str(teacher)]
    assert {name: figures[name] for name in MEASURES} == {name: told[-1][name] for name in MEASURES}
    model = hw.load(whole)
    assert figures["params"] == sum(p.numel() for p in model.parameters())
    data = load_examples(str(text_file), load_tokenizer(whole))
    assert evaluate_examples(model, data.val, seq_len=16).nats == pytest.approx(figures["val_loss"], abs=1e-12)
    beside = [tensor.numel() for name, tensor in newest(whole).optimizer.items() if name.startswith("beside/")]
    assert figures["aligner_params"] <= sum(beside)


def test_the_folder_is_a_runs_and_a_saved_model_like_any(whole: Path, tmp_path: Path) -> None:
    """Its settings, as far as training shares them, are found by whoever reads run folders."""
    assert RunFolder(whole).is_distilled
    assert RunFolder(whole).settings().steps == 6
    assert RunFolder(whole).settings_as(DistillSettings).hidden == 0.3
    swapped = swap_saved(whole, SwapSettings(attention="gqa(kv_heads=1)", out=tmp_path / "swapped"))
    assert swapped.n_tokens > 0
    with pytest.raises(SettingsError, match="headwise resume"):
        hw.resume(whole)


# ---- the same bits ----


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_interrupted_it_goes_on_to_the_same_bits(
    step: int, whole: Path, teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = {"projection": "flat", "projector_dropout": 0.1, **EVERYTHING}
    with pytest.raises(Interrupted, match=f"SIGINT: stopped after step {step} of 6"):
        run(teacher, text_file, WITH_DROPOUT, out=out, on_progress=kill_at(step), **settings)
    resume(out)
    check_same(out, whole)


def test_records_between_two_losses_survive_a_stop(teacher: Path, text_file: Path, tmp_path: Path) -> None:
    """What a record sums up over several steps is part of the checkpoint in the middle of them."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(teacher, text_file, out=whole, log_every=4, eval_every=0, checkpoint_every=3, steps=8)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-000008")
    resume(cut)
    check_same(whole, cut)


def test_the_same_call_goes_on_and_another_is_refused(teacher: Path, text_file: Path, tmp_path: Path) -> None:
    settings = DistillSettings(
        teacher=str(teacher), student=STUDENT, data=str(text_file), out=tmp_path / "run", **QUICK
    )
    with pytest.raises(Interrupted):
        distill_or_resume(settings, on_progress=kill_at(2))
    first = distill_or_resume(settings)
    assert distill_or_resume(settings, run_name="again").figures() == first.figures()
    with pytest.raises(SettingsError, match=r"holds another run: .*lambda_kv"):
        distill_or_resume(settings, lambda_kv=2.0)


@pytest.mark.parametrize("projection", ["flat", "structured"])
def test_training_from_the_cache_is_training_beside_the_teacher(
    projection: str, teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    """In float32 to the bit, hidden states, queries and predictions among it."""
    said: list[str] = []
    settings = {**EVERYTHING, "projection": projection, "out": None}
    live = run(teacher, text_file, **settings)
    cached = run(
        teacher, text_file, **settings, cache_teacher=True, cache_dtype="float32", cache_dir=tmp_path, say=said.append
    )
    check_same_student(live, cached)
    assert "the teacher's final, hidden, keys, queries, values of 12 windows take" in said[0]
    assert "MB in float32" in said[0]
    losses = [[record["loss"] for record in result.history] for result in (live, cached)]
    assert losses[0] == losses[1]


def test_a_smaller_cache_is_near(teacher: Path, text_file: Path, tmp_path: Path) -> None:
    live = run(teacher, text_file)
    for dtype in ("bfloat16", "int8"):
        cached = run(teacher, text_file, cache_teacher=True, cache_dtype=dtype, cache_dir=tmp_path / dtype)
        assert cached.val_loss == pytest.approx(live.val_loss, rel=1e-2)
        assert cached.val_loss != live.val_loss


def test_a_second_run_finds_the_cache_of_the_first(teacher: Path, text_file: Path, tmp_path: Path) -> None:
    said: list[str] = []
    for projection in ("flat", "structured"):
        run(teacher, text_file, projection=projection, cache_teacher=True, cache_dir=tmp_path, say=said.append)
    assert len(said) == 1


# ---- what is trained ----


def test_without_a_teacher_no_teacher_matters(teacher: Path, text_file: Path) -> None:
    """The arm `none` is plain training: whatever the teacher, and whatever weight nothing is given."""
    one = run(teacher, text_file, projection="none")
    other = run("gpt2(d_model=8, n_layers=1, n_heads=1)", text_file, projection="none", tokenizer="char")
    check_same_student(one, other)
    state = torch.get_rng_state()
    check_same_student(one, run(teacher, text_file, projection="flat", lambda_kv=0.0))
    assert torch.equal(torch.get_rng_state(), state)  # nor does a run draw from its caller's random numbers
    plain, beside = (run(teacher, text_file, WITH_DROPOUT, projection=p, lambda_kv=0.0) for p in ("none", "flat"))
    check_same_student(plain, beside)  # the projector's random start has not moved the student's dropout
    assert one.history[-1]["loss"] == pytest.approx(one.history[-1]["loss_task"], rel=1e-6)
    assert not {"loss_k", "loss_v"} & one.history[-1].keys()


def test_keys_and_values_train_the_student_and_leave_the_teacher(teacher: Path, text_file: Path) -> None:
    before = Teacher.load(str(teacher)).fingerprint
    plain, result = run(teacher, text_file, projection="none"), run(teacher, text_file, lambda_kv=5.0)
    moved = {
        name
        for name, tensor in result.model.state_dict().items()
        if not torch.equal(tensor, plain.model.state_dict()[name])
    }
    assert {"stack.blocks.1.attention.wk.weight", "stack.blocks.1.attention.wv.weight"} <= moved
    assert Teacher.load(str(teacher)).fingerprint == before


def test_the_projectors_gradients_do_not_slow_the_student(teacher: Path, text_file: Path) -> None:
    """They are clipped apart, and looked at."""
    job = prepare(
        settled(DistillSettings(teacher=str(teacher), student=STUDENT, data=str(text_file), **QUICK, clip=0.5))
    )
    trainer = DistillTrainer(job)
    own, beside = trainer.model.embedding.weight, next(trainer.beside.parameters())
    own.grad, beside.grad = torch.full_like(own, 1e-6), torch.full_like(beside, 1e3)
    trainer.before_step()
    assert beside.grad.norm() == pytest.approx(0.5, rel=1e-4)
    assert torch.equal(own.grad, torch.full_like(own, 1e-6))
    assert not any(parameter is beside for parameter in trainer.parameters)
    beside.grad.fill_(torch.nan)
    with pytest.raises(TrainingError, match="the norm of the projector's gradients is nan"):
        trainer.before_step()


def test_likeness_grows_and_beats_the_control_with_a_projector_that_cannot_collapse(
    teacher: Path, text_file: Path
) -> None:
    result = run(
        teacher, text_file, steps=60, eval_every=0, lr=1e-2, freeze_projector=True, kv_loss="cosine", lambda_kv=2
    )
    assert result.aligner_params == 0
    for own, control in zip(result.likeness["cosine_v"], result.likeness["cosine_v_shuffled"]):
        assert own is not None
        assert control is not None
        assert own > control + 0.1


def test_a_trained_projector_on_the_teachers_side_collapses(teacher: Path, text_file: Path) -> None:
    """With no other loss the cosine with shuffled teachers rises with the true one (document 004's trap). CKA is taken
    before the projector, and its control stays where it was."""
    settings = {"lr": 3e-2, "kv_loss": "cosine", "lambda_task": 0.0, "weight_decay": 0.0, "batch_size": 4}
    result = run(teacher, text_file, projection="flat", steps=60, eval_every=59, **settings)
    start = run(teacher, text_file, projection="flat", steps=1, **settings)
    for name in ("cosine_k", "cosine_v"):
        own, control, before = (
            mean(each)
            for each in (result.likeness[name], result.likeness[f"{name}_shuffled"], start.likeness[f"{name}_shuffled"])
        )
        assert own > 0.95
        assert control > before + 0.3
    assert mean(result.likeness["cka_v_shuffled"]) < 0.1 < mean(result.likeness["cka_v"])


def test_a_student_starts_from_a_folder(teacher: Path, text_file: Path, tmp_path: Path) -> None:
    start = train(STUDENT, data=str(text_file), out=tmp_path / "start", seq_len=16, steps=3, threads=1)
    result = run(teacher, text_file, str(tmp_path / "start"), lr=1e-12, weight_decay=0.0)
    for name, tensor in start.model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], tensor, rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("rope", ["unrotate", "asis"])
def test_every_side_and_rope_runs(side: str, rope: str, teacher: Path, text_file: Path) -> None:
    result = run(teacher, text_file, side=side, rope=rope, structural_loss=True, layer_map="cka")
    assert all(value is not None for value in result.likeness["cka_k"])
    assert len(result.likeness["cosine_k"]) == (2 if side == "teacher" else 4)


@pytest.mark.parametrize(
    ("attention", "kv", "outputs"),
    [
        ("linear", (False, False), (True, True)),
        ("pattern(softmax, gla)", (True, False), (False, True)),
        ("tva(rank=2)", (True, True), (False, False)),
        ("mla(kv_lora_rank=4, qk_rope_head_dim=2)", (True, True), (False, False)),
    ],
)
def test_students_of_every_cache(
    attention: str, kv: tuple[bool, ...], outputs: tuple[bool, ...], teacher: Path, text_file: Path
) -> None:
    """A layer that keeps no keys and values is matched by what its attention makes."""
    result = run(teacher, text_file, f"llama(d_model=8, n_layers=2, n_heads=2, attention={attention})")
    for name, has in (("cosine_k", kv), ("cka_v", kv), ("cosine_output", outputs)):
        assert [value is not None for value in result.likeness.get(name, [None, None])] == list(has)
    assert ("loss_k" in result.history[-1]) == any(kv)
    assert ("loss_output" in result.history[-1]) == any(outputs)


def test_a_teacher_without_keys_teaches_by_other_means(text_file: Path) -> None:
    """Where nothing is projected its kind does not matter; there is nothing of it to measure then."""
    recurrent = "llama(d_model=16, n_layers=3, n_heads=2, attention=gla)"
    settings = {"tokenizer": "char", "projection": "none", "hidden": 0.5, "logit_kd": (1.0, 1.0)}
    for layer_map in ("ratio", "learned", "cka"):
        result = run(recurrent, text_file, layer_map=layer_map, **settings)
        assert result.likeness == {}
        assert {"loss_hidden", "loss_logits"} <= result.history[-1].keys()


def test_epochs_are_as_many_steps_as_the_windows_need_and_go_on_like_them(
    teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = {name: value for name, value in QUICK.items() if name != "steps"}
    given = DistillSettings(
        teacher=str(teacher), student=STUDENT, data=str(text_file), out=tmp_path / "run", **settings
    )
    first = distill_or_resume(given, epochs=0.1)
    windows = -(-(3600 - 1) // 16)
    assert first.steps == -(-windows // 20)
    assert distill_or_resume(given, epochs=0.1).figures() == first.figures()
    with pytest.raises(SettingsError, match=r"steps=23 \(was 12\)"):
        distill_or_resume(given, epochs=0.2)


# ---- what changed meanwhile ----


def test_other_data_and_another_teacher_are_refused(teacher: Path, text_file: Path, tmp_path: Path) -> None:
    data, model = tmp_path / "text.txt", tmp_path / "model"
    data.write_text(text_file.read_text())
    loaded = hw.load(teacher)
    hw.save_pretrained(loaded, model, load_tokenizer(teacher))
    with pytest.raises(Interrupted):
        run(model, data, out=tmp_path / "run", on_progress=kill_at(2))
    data.write_text(text_file.read_text()[::-1])
    with pytest.raises(DataError, match=r"the data of the run in .* have changed"):
        resume(tmp_path / "run")
    data.write_text(text_file.read_text())
    with torch.no_grad():
        loaded.embedding.weight.add_(1e-3)
    hw.save_pretrained(loaded, model, load_tokenizer(teacher))
    with pytest.raises(DataError, match=r"the teacher of the run in .* has changed"):
        resume(tmp_path / "run")
    with pytest.raises(FormatError, match="is a training run and no distillation"):
        resume(teacher)
