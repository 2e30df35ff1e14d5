"""Values that are not finite stop a run before the update, by name; signals become requests."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import LINE, QUICK
from torch import Tensor, nn

from headwise.data import Dataset
from headwise.errors import TrainingError
from headwise.io.checkpoint import load_newest
from headwise.train import TrainSettings, resume, train
from headwise.train.guards import catch_signals, find_culprit
from headwise.train.job import prepare
from headwise.train.trainer import Trainer


@pytest.fixture
def trainer(dataset: Dataset) -> Trainer:
    made = Trainer(prepare(LINE, TrainSettings(**QUICK), dataset))
    for _ in range(3):
        made.update()
    return made


def poison_output(value: float) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output + value

    return hook


def poison_gradient(gradient: Tensor) -> Tensor:
    return gradient * torch.nan


def check_stopped(trainer: Trainer, *parts: str) -> None:
    before = {name: tensor.clone() for name, tensor in {**trainer.tensors()[0], **trainer.tensors()[1]}.items()}
    with pytest.raises(TrainingError) as caught:
        trainer.update()
    for part in ("step 4:", "Stopped before the update", *parts):
        assert part in str(caught.value)
    after = {**trainer.tensors()[0], **trainer.tensors()[1]}
    for name, tensor in before.items():
        if not name.startswith("rng/"):
            assert torch.equal(tensor, after[name]), name
    assert trainer.at.step == 3


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "nan"), (float("inf"), "nan")])
def test_a_bad_output_is_traced_to_the_module_it_began_in(trainer: Trainer, value: float, kind: str) -> None:
    trainer.model.get_submodule("stack.blocks.1.ffn").register_forward_hook(poison_output(value))
    check_stopped(trainer, f"the loss is {kind}", "in the output of stack.blocks.1.ffn (")


def test_a_bad_gradient_is_traced_to_its_parameter(trainer: Trainer) -> None:
    name = "stack.blocks.0.attention.wo.weight"
    trainer.model.get_parameter(name).register_hook(poison_gradient)
    check_stopped(trainer, "the forward pass is finite", f"the gradient of {name} holds nan")


def test_a_bad_parameter_is_named(trainer: Trainer) -> None:
    name = "stack.blocks.1.attention_norm.weight"
    with torch.no_grad():
        trainer.model.get_parameter(name)[0] = torch.inf
    with pytest.raises(TrainingError, match=f"the parameter {name} itself holds inf"):
        trainer.update()


def test_minus_infinity_in_a_mask_is_no_culprit() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x < 0, -torch.inf)

    model = nn.Sequential(Masked(), nn.Softmax(-1), nn.Linear(2, 2))
    with torch.no_grad():
        model[2].weight[0, 0] = 1e38
    words = find_culprit(model, lambda: model(torch.tensor([[-1.0, 1.0]])) * torch.inf)
    assert words == "every output and gradient is finite, their sum is not"


def test_the_last_good_checkpoint_stays_and_is_named(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data turn bad at step 10: checkpoints of 4 and 8 stay, nothing is written after."""
    from headwise.data import Batches

    get = Batches.batch

    def bad_from_ten(self: Batches, step: int) -> Any:
        if step >= 9:
            monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda *a, **k: torch.full_like(a[0], torch.nan))
        return get(self, step)

    monkeypatch.setattr(Batches, "batch", bad_from_ten)
    with pytest.raises(TrainingError, match=r"step 10: the loss is nan.*the checkpoint of step 8 in .* is intact"):
        train(LINE, dataset=dataset, out=tmp_path / "run", **QUICK)
    monkeypatch.undo()
    newest = load_newest(tmp_path / "run" / "checkpoints", pytest.fail)
    assert newest is not None
    assert newest.step == 8
    finished = resume(tmp_path / "run", dataset=dataset)
    assert finished.val_loss == train(LINE, dataset=dataset, **QUICK).val_loss


def test_a_diverging_run_stops_without_a_folder_too(dataset: Dataset) -> None:
    with pytest.raises(TrainingError, match="Stopped before the update; a lower lr"):
        train(LINE, dataset=dataset, **{**QUICK, "lr": 1e30, "clip": 0, "warmup": 0})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_and_the_second_acts(number: signal.Signals) -> None:
    class Acted(Exception):
        pass

    def act(number: int, frame: object) -> None:
        raise Acted

    before = signal.signal(number, act)
    try:
        with catch_signals() as request:
            assert request.signal is None
            os.kill(os.getpid(), number)
            assert request.signal == number.name
            with pytest.raises(Acted):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is act
    finally:
        signal.signal(number, before)


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    handler = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with catch_signals() as request:
            seen.append((request.signal, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, handler)]
