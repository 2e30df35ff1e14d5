"""The vein's settings: its learning rate, a frozen start, a threshold on a schedule, and its error in the log."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import LINE, QUICK

import headwise as hw
from headwise.data import Dataset
from headwise.errors import Interrupted, SettingsError
from headwise.ffn.vft import NormalCompensator
from headwise.io.checkpoint import list_checkpoints, load_checkpoint
from headwise.train import TrainResult, TrainSettings, resume, train
from headwise.train.optim import make_optimizer
from headwise.train.vein import VeinSchedule
from headwise.vein import vein_parameters

VEIN = "llama(d_model=16, n_layers=2, n_heads=2, attention=tva(4), ffn=vft(4, s_normals=1, tau=0.9))"


def run(dataset: Dataset, line: str = VEIN, **changes: Any) -> TrainResult:
    return train(line, dataset=dataset, **{**QUICK, **changes})


def test_the_veins_learning_rate_is_a_share_of_the_others() -> None:
    model = hw.build(VEIN)
    settings = TrainSettings(vein_lr=0.2, lr_multipliers={"stack.blocks.1": 0.5})
    factors = {id(p): g["factor"] for g in make_optimizer(model, settings).param_groups for p in g["params"]}
    veins = vein_parameters(model)
    for name, parameter in model.named_parameters():
        expected = (0.2 if name in veins else 1.0) * (0.5 if name.startswith("stack.blocks.1.") else 1.0)
        assert factors[id(parameter)] == pytest.approx(expected), name


def test_a_frozen_vein_neither_moves_nor_decays_and_then_learns(dataset: Dataset) -> None:
    start = hw.build(run(dataset, steps=1).spec, seed=0)
    frozen, freed = (run(dataset, vein_freeze=n).model for n in (12, 11))
    for name in vein_parameters(start):
        assert torch.equal(frozen.get_parameter(name), start.get_parameter(name))
        assert not torch.equal(freed.get_parameter(name), start.get_parameter(name))
    for name, parameter in start.named_parameters():
        if name not in vein_parameters(start) and parameter.ndim > 1:
            assert not torch.equal(frozen.get_parameter(name), parameter), name


def test_a_frozen_vein_leaves_no_moments_behind(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(dataset, out=out, vein_freeze=6, checkpoint_every=4)
    checkpoint = load_checkpoint(next(p for p in list_checkpoints(out / "checkpoints") if p.name.endswith("12")))
    steps = {name: t.item() for name, t in checkpoint.optimizer.items() if name.endswith("/step")}
    assert steps["stack.blocks.0.attention.vein.V.weight/step"] == 6
    assert steps["stack.blocks.0.attention.wq.weight/step"] == 12


def test_tau_passes_through_its_values_evenly() -> None:
    model = hw.build(VEIN)
    schedule = VeinSchedule(model, TrainSettings(steps=10, tau_schedule=(0.25, 0.18, 0.1)))
    compensators = [m for m in model.modules() if isinstance(m, NormalCompensator)]
    seen = []
    for step in range(10):
        schedule.set(step)
        seen.append({c.tau for c in compensators})
    assert seen == [{0.25}] * 4 + [{0.18}] * 3 + [{0.1}] * 3


def test_the_schedules_last_tau_is_the_models(dataset: Dataset, tmp_path: Path) -> None:
    """The trained model is evaluated, saved and loaded with the τ it has come to; the share over τ follows it."""
    result = run(dataset, out=tmp_path / "run", tau_schedule=(0.0, 5.0))
    assert "tau=5.0" in str(result.spec)
    shares = [record["stack.blocks.0.ffn.eps_frac_over_tau"] for record in result.history]
    assert [record["step"] for record in result.history] == [2, 4, 6, 8, 10, 12]
    assert shares == [1.0] * 3 + [0.0] * 3
    loaded = hw.load(tmp_path / "run")
    assert {m.tau for m in loaded.modules() if isinstance(m, NormalCompensator)} == {5.0}


@pytest.mark.parametrize("step", [2, 4, 7, 9])
def test_stopped_in_any_phase_it_goes_on_to_the_same_bits(step: int, dataset: Dataset, tmp_path: Path) -> None:
    def stop(values: dict[str, Any]) -> None:
        if values["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    changes: dict[str, Any] = {"vein_lr": 0.3, "vein_freeze": 5, "tau_schedule": (0.95, 0.9, 0.6), "log_every": 1}
    run(dataset, out=tmp_path / "whole", **changes)
    with pytest.raises(Interrupted):
        run(dataset, out=tmp_path / "parts", on_progress=stop, **changes)
    resume(tmp_path / "parts", dataset=dataset)
    ends = [load_checkpoint(list_checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("whole", "parts")]
    for left, right in ((ends[0].model, ends[1].model), (ends[0].optimizer, ends[1].optimizer)):
        assert left.keys() == right.keys()
        assert all(torch.equal(t, right[name]) for name, t in left.items())
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_s")}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    assert "stack.blocks.1.ffn.eps_mean" in logs[0][0]


def test_compiled_runs_follow_the_same_phases(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Freezing and τ change under a compiled step; traced without the C++ compiler, the losses stay the same."""
    changes: dict[str, Any] = {"vein_freeze": 1, "tau_schedule": (0.95, 0.6), "steps": 2, "log_every": 1}
    line = VEIN.replace("n_layers=2", "n_layers=1")
    plain = run(dataset, line, **changes)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="aot_eager", **options))
    torch._dynamo.reset()
    compiled = run(dataset, line, compile=True, **changes)
    for one, two in zip(plain.history, compiled.history, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        name = "stack.blocks.0.ffn.eps_frac_over_tau"
        assert two[name] == pytest.approx(one[name], abs=0.02)


def test_tensorboard_gets_the_error_of_every_layer(dataset: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(dataset, out=tmp_path / "run", tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {f"stack.blocks.{n}.ffn.eps_mean" for n in (0, 1)} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        (LINE, {"vein_lr": 0.2}, "vein_lr: .* has no vein; leave vein_lr out"),
        (LINE, {"vein_freeze": 3}, "vein_freeze: .* has no vein"),
        (VEIN.replace("tva(4)", "tva(4, folded=true)").replace("ffn=vft(4, s_normals=1, tau=0.9)", "ffn=mlp"),
         {"vein_lr": 0.2}, "attention=tva\\(rank=8\\) not folded"),
        (VEIN.replace("s_normals=1, ", ""), {"tau_schedule": (0.2,)}, "no normal compensation whose τ could change"),
        (VEIN, {"tau_schedule": (0.2, -0.1)}, "tau_schedule: given \\[-0.1\\]"),
        (VEIN, {"tau_schedule": (0.2,) * 13}, "tau_schedule: 13 values are more than steps=12"),
    ],
)  # fmt: skip
def test_settings_that_fit_no_vein(
    line: str, changes: dict[str, Any], message: str, dataset: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        run(dataset, line, out=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_comparison_wants_a_vein_in_one_line_at_least() -> None:
    with pytest.raises(SettingsError, match="vein_lr: none of the lines has a vein"):
        hw.compare(["llama", "gpt2"], vein_lr=0.2)
