"""float16's gradient scaling. Settings allow it on a GPU only; torch's scaler works on the CPU all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import LINE, QUICK

from headwise.data import Dataset
from headwise.errors import TrainingError
from headwise.io.checkpoint import load_checkpoint, save_checkpoint
from headwise.train import TrainSettings
from headwise.train.job import Job, prepare
from headwise.train.trainer import Trainer


@pytest.fixture
def job(dataset: Dataset) -> Job:
    prepared = prepare(LINE, TrainSettings(**QUICK), dataset)
    settings = prepared.settings.model_copy(update={"dtype": "float16"})
    return Job(prepared.spec, settings, dataset, prepared.device)


def parameters(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_scaled_training_follows_float32(job: Job) -> None:
    full = Trainer(Job(job.spec, TrainSettings(**QUICK), job.dataset, job.device))
    scaled = Trainer(job)
    for _ in range(5):
        full.update()
        scaled.update()
        assert scaled.last_norm == pytest.approx(full.last_norm, rel=0.05)
    assert scaled.at.since_loss == pytest.approx(full.at.since_loss, rel=0.01)


def test_a_scale_that_is_too_high_skips_the_update_and_halves(job: Job) -> None:
    trainer = Trainer(job)
    trainer.update()
    before, scale = parameters(trainer), 2.0**100
    trainer.scaler.update(scale)
    trainer.update()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(trainer)))
    assert trainer.scaler.get_scale() == scale / 2
    assert trainer.take_record()["grad_norm"] is None
    trainer.scaler.update(1.0)
    trainer.update()
    assert not all(torch.equal(a, b) for a, b in zip(before, parameters(trainer)))


def test_a_scale_that_cannot_shrink_further_is_no_excuse(job: Job) -> None:
    trainer = Trainer(job)
    trainer.update()
    trainer.scaler.update(1.0)
    trainer.model.get_parameter("head.weight").register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingError, match="the norm of the gradients"):
        trainer.update()


def test_the_scale_is_part_of_a_checkpoint(job: Job, tmp_path: Path) -> None:
    trainer, restored = Trainer(job), Trainer(job)
    for _ in range(3):
        trainer.update()
    trainer.scaler.update(1024.0)
    path = save_checkpoint(tmp_path, 3, *trainer.tensors(), trainer.numbers())
    restored.restore(load_checkpoint(path))
    assert restored.scaler.get_scale() == 1024.0
    for _ in range(3):
        trainer.update()
        restored.update()
    assert all(torch.equal(a, b) for a, b in zip(parameters(trainer), parameters(restored)))
