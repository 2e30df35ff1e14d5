"""Recipes: what each stage trains and by which loss, exact resume within them, and that healing heals."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_distillations import QUICK, check_same, newest, records, run
from torch import Tensor

import headwise as hw
from headwise.data import load_tokenizer
from headwise.distill import DistillSettings, distill, resume
from headwise.distill.recipes import Stage, staged_schedule, stages_of
from headwise.errors import HeadwiseError, Interrupted, SettingsError
from headwise.lab.swap import SwapSettings, swap_saved
from headwise.train.schedules import make_schedule


@pytest.fixture(scope="module")
def swapped(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with linear attention."""
    out = tmp_path_factory.mktemp("swapped") / "model"
    swap_saved(teacher, SwapSettings(attention="linear", out=out))
    return out


def follow(student: Path, data: Path, **changes: Any) -> Any:
    """A recipe without a word about the teacher."""
    return distill(student=str(student), data=str(data), **{**QUICK, **changes})


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def test_healing_brings_a_model_back_to_what_it_was(
    swapped: Path, teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    """The attention of this teacher does little, so that a swap hardly hurts it: here it is hurt on purpose."""
    model = hw.load(swapped)
    torch.manual_seed(0)
    with torch.no_grad():
        for block in model.decoding_stack().blocks:
            block.attention.wo.weight.normal_(std=0.2)
    hw.save_pretrained(model, tmp_path / "hurt", load_tokenizer(swapped))
    shutil.copy(swapped / "swap.json", tmp_path / "hurt")
    result = follow(tmp_path / "hurt", text_file, recipe="heal", steps=40, eval_every=0, lambda_task=0.0, lr=1e-2)
    first, last = result.history[0], result.history[-1]
    for name in ("loss_hidden", "loss_logits"):
        assert last[name] < 0.5 * first[name]
    assert result.teachers == (str(teacher),)


def test_lolcats_trains_attention_and_then_low_rank_updates(swapped: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = follow(swapped, text_file, recipe="lolcats", lora_rank=1, checkpoint_every=3, out=out, lr=3e-4)
    start = hw.load(swapped).state_dict()
    cut = shutil.copytree(out, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints" / "step-000006")
    middle, end = hw.load(cut).state_dict(), result.model.state_dict()
    assert all(".attention." in name for name in moved(start, middle))
    assert moved(middle, end)
    for name in moved(middle, end):
        assert name.rpartition(".")[0].endswith(("wq", "wk", "wv", "wo"))
        assert torch.linalg.matrix_rank(end[name] - middle[name], rtol=1e-3) == 1
    told = records(out)
    assert ["loss_transfer" in record for record in told] == [True] * 3 + [False] * 3
    assert ["loss_task" in record for record in told] == [False] * 3 + [True] * 3


def test_mohawk_mixes_then_hides_then_predicts(swapped: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    follow(swapped, text_file, recipe="mohawk", stages=(1, 1, 1), checkpoint_every=4, out=out)
    told = records(out)
    for name, steps in (("loss_mixing", {1, 2}), ("loss_blocks", {3, 4}), ("loss_logits", {5, 6})):
        assert {record["step"] for record in told if name in record} == steps
    (out / "checkpoints" / "step-000006").rename(out / "later")
    assert all(".attention." in name for name in moved(hw.load(swapped).state_dict(), hw.load(out).state_dict()))


@pytest.mark.parametrize("recipe", ["lolcats", "mohawk"])
@pytest.mark.parametrize("step", [1, 4])
def test_a_stopped_recipe_goes_on_to_the_same_bits(
    recipe: str, step: int, swapped: Path, text_file: Path, tmp_path: Path
) -> None:
    def kill(values: dict[str, Any]) -> None:
        if values["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = follow(swapped, text_file, recipe=recipe, out=whole)
    with pytest.raises(Interrupted):
        follow(swapped, text_file, recipe=recipe, out=cut, on_progress=kill)
    resume(cut)
    check_same(whole, cut)
    assert not moved(hw.load(whole).state_dict(), result.model.state_dict())
    assert not any("parametrizations" in name for name in newest(cut).model)


def test_a_record_across_two_stages_has_the_means_of_both(swapped: Path, text_file: Path) -> None:
    """Each loss over the updates that had it."""
    fine, coarse = (follow(swapped, text_file, recipe="lolcats", log_every=every, eval_every=0) for every in (1, 6))
    for name, steps in (("loss_transfer", slice(0, 3)), ("loss_task", slice(3, 6))):
        values = [record[name] for record in fine.history[steps]]
        assert coarse.history[-1][name] == pytest.approx(sum(values) / 3, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5, 100])
def test_stages_fill_the_steps_and_each_has_a_schedule_of_its_own(steps: int) -> None:
    settings = DistillSettings(teacher="a", student="b", recipe="mohawk", stages=(1, 2, 2), steps=steps, warmup=1)
    stages = stages_of(settings)
    assert [stage.first for stage in stages] == [0, *(stage.last for stage in stages)][:-1]
    assert stages[-1].last == steps
    rate = staged_schedule(settings, stages)
    for stage in stages:
        alone = make_schedule(settings.model_copy(update={"steps": stage.last - stage.first}))
        assert [rate(step) for step in range(stage.first, stage.last)] == [
            alone(step) for step in range(stage.last - stage.first)
        ]
    assert stages_of(DistillSettings(teacher="a", student="b", steps=steps)) == [Stage(None, "all", 0, steps)]


def test_what_cannot_be_compared_is_refused_before_anything(teacher: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(SettingsError, match=r"teacher: none given, and .* does not say what it was made from"):
        follow(teacher, text_file, recipe="heal", out=out)
    with pytest.raises(HeadwiseError, match=r"d_model=8 .*n_layers=2"):
        run(teacher, text_file, recipe="mohawk", out=out)
    narrow = swap_saved(teacher, SwapSettings(attention="tva(rank=2)", out=tmp_path / "narrow")).out
    with pytest.raises(HeadwiseError, match="only like heads can be compared"):
        follow(narrow, text_file, recipe="lolcats", out=out)
    for changes, message in (
        ({"recipe": "lolcats", "stages": (1.0,)}, "stages: 1 shares given, lolcats has 2"),
        ({"recipe": "mohawk", "cache_teacher": True}, "cache_teacher: mohawk shows"),
        ({"recipe": "heal", "teacher": ("a", "b")}, "recipe: heal follows one teacher"),
    ):
        with pytest.raises(SettingsError, match=message):
            follow(narrow, text_file, out=out, **changes)
    assert not out.exists()
