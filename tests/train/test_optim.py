"""Parameter groups: what decays, whose learning rate differs, and the optimiser's state by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from headwise.errors import FormatError, SettingsError
from headwise.train import TrainSettings
from headwise.train.optim import lr_factors, make_optimizer, optimizer_tensors, restore_optimizer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "emb": nn.Embedding(5, 4),
            "blocks": nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(4), "up": nn.Linear(4, 4)}) for _ in range(2)),
        }
    )


def grouped(settings: TrainSettings) -> dict[str, tuple[float, float]]:
    """(weight decay, factor) of every parameter."""
    model = network()
    found = {
        id(parameter): (group["weight_decay"], group["factor"])
        for group in make_optimizer(model, settings).param_groups
        for parameter in group["params"]
    }
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_only_matrices_decay() -> None:
    groups = grouped(TrainSettings(weight_decay=0.1))
    decaying = {name for name, (decay, _) in groups.items() if decay}
    assert decaying == {"emb.weight", "blocks.0.up.weight", "blocks.1.up.weight"}
    assert len(groups) == len(list(network().parameters()))


def test_a_pattern_may_name_parameters_or_modules_and_matching_ones_multiply() -> None:
    factors = {
        name: factor
        for name, (_, factor) in grouped(
            TrainSettings(lr_multipliers={"*.up.*": 0.1, "blocks.1": 0.5, "emb": 2.0})
        ).items()
    }
    assert factors == {
        "emb.weight": 2.0,
        "blocks.0.norm.weight": 1.0,
        "blocks.0.norm.bias": 1.0,
        "blocks.0.up.weight": 0.1,
        "blocks.0.up.bias": 0.1,
        "blocks.1.norm.weight": 0.5,
        "blocks.1.norm.bias": 0.5,
        "blocks.1.up.weight": 0.05,
        "blocks.1.up.bias": 0.05,
    }


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(SettingsError, match=r"'blocks.0.upp' matches no parameter.*did you mean 'blocks.0.up'"):
        lr_factors([name for name, _ in network().named_parameters()], {"blocks.0.upp": 0.1})


def test_state_by_name_puts_an_optimizer_back_bit_by_bit() -> None:
    model, other = network(), network()
    settings = TrainSettings()
    optimizer, restored = make_optimizer(model, settings), make_optimizer(other, settings)
    for seed in range(3):
        step(model, optimizer, seed)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    assert {name.rpartition("/")[2] for name in saved} == {"exp_avg", "exp_avg_sq", "step"}
    other.load_state_dict(model.state_dict())
    restore_optimizer(other, restored, saved)
    step(model, optimizer, 3)
    step(other, restored, 3)
    for one, two in zip(model.parameters(), other.parameters()):
        assert torch.equal(one, two)


def test_state_of_another_model_is_refused() -> None:
    model = network()
    optimizer = make_optimizer(model, TrainSettings())
    with pytest.raises(FormatError, match="belongs to no parameter"):
        restore_optimizer(model, optimizer, {"head.weight/exp_avg": torch.zeros(2)})
    with pytest.raises(FormatError, match=r"shape \(2,\), its parameter \(5, 4\)"):
        restore_optimizer(model, optimizer, {"emb.weight/exp_avg": torch.zeros(2)})


def test_steps_are_those_of_torchs_own() -> None:
    ours, theirs = network(), network()
    optimizer = make_optimizer(ours, TrainSettings(lr=1e-2, weight_decay=0.1))
    matrices, vectors = ([p for p in theirs.parameters() if (p.ndim >= 2) is wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=TrainSettings().betas, fused=True)
    for seed in range(3):
        step(ours, optimizer, seed)
        step(theirs, reference, seed)
    for one, two in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(one, two)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_training_what_is_not_compiled_loads_no_compiler() -> None:
    """Each process that trains would wait for it; a mixture of experts has a part that can be compiled."""
    code = (
        "import sys, torch, headwise as hw\n"
        "from headwise.train import TrainSettings\n"
        "from headwise.train.optim import make_optimizer\n"
        "layer = hw.get_ffn('moe', d_model=8)\n"
        "optimizer = make_optimizer(layer, TrainSettings())\n"
        "layer(torch.randn(1, 5, 8)).sum().backward(), optimizer.step(), optimizer.zero_grad()\n"
        "print({'torch._dynamo', 'sympy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
