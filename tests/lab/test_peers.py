"""flash-linear-attention, which the benchmark measures beside ours: it computes the same, so that times compare."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.kernels.delta_rule import naive as delta_rule
from headwise.kernels.linear_attention import naive as linear_attention
from headwise.lab.bench.cases import Bed, Case
from headwise.lab.bench.peers import RULES, peers
from headwise.lab.bench.settings import BenchSettings

B, H, T, D = 2, 3, 64, 8


def bed(**changes: Any) -> Bed:
    return Bed(BenchSettings(**{"n_heads": H, "head_dim": D, "batch_size": B, "device": "cpu", **changes}))


def fla(one: Bed) -> dict[str, Case]:
    return {name: case for case in peers(one) for name in RULES if case.label == f"fla {name}, readable"}


def ours(name: str, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> Tensor:
    """[B,H,T,D] by our definitions, of heads [B,H,T,D] and gates [B,H,T,1] before their non-linearities."""
    scale, unit = D**-0.5, partial(F.normalize, dim=-1)
    if name == "linear":
        return linear_attention.normalised(F.elu(q) + 1, F.elu(k) + 1, v)[0]
    if name == "retention":
        log_decay = torch.log1p(-(2.0 ** (-5 - torch.arange(H))))[None, :, None]
        return linear_attention.recurrent(scale * q, k, v, log_decay=log_decay)[0]
    step = gates[0].squeeze(-1).sigmoid()
    log_decay = F.logsigmoid(gates[1].squeeze(-1)) if name == "gated_deltanet" else None
    return delta_rule.recurrent(scale * unit(q), unit(k), v, step, log_decay=log_decay)[0]


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.readable is not None])
def test_what_it_computes_is_our_definition(name: str) -> None:
    work = fla(bed(level="core"))[name].make(T)
    y_BHTD, wanted_BHTD = work.forward(), ours(name, *work.leaves)
    torch.testing.assert_close(y_BHTD, wanted_BHTD, atol=1e-5, rtol=1e-4)
    for found, wanted in zip(gradients(y_BHTD, work.leaves), gradients(wanted_BHTD, work.leaves), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)


def gradients(y: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), leaves)


def test_gated_linear_attention_is_our_definition() -> None:
    """Its readable form goes token by token, so that the benchmark has it on a GPU alone; here it is asked itself."""
    from fla.ops.gla.naive import naive_recurrent_gla

    q, k, v, gate = (bed().random(B, H, T, D, seed=seed) for seed in range(4))
    log_decay = F.logsigmoid(gate)
    wanted, _ = linear_attention.recurrent(D**-0.5 * q, k, v, log_decay=log_decay)
    found, _ = naive_recurrent_gla(*(x.transpose(1, 2) for x in (q, k, v, log_decay)))
    torch.testing.assert_close(found.transpose(1, 2), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("level", ["core", "layer"])
@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.readable is not None])
def test_a_step_is_measured_to_its_end(name: str, level: str) -> None:
    one = bed(level=level)
    case = fla(one)[name]
    work = case.make(T)
    case.step(work, one)()
    assert case.source == "peer"
    assert work.forward().shape == ((B, H, T, D) if level == "core" else (B, T, H * D))
    assert (work.own is None) == (level == "core")


def test_lengths_that_it_does_not_take_are_refused() -> None:
    make: Callable[[int], object] = fla(bed(level="core"))["deltanet"].make
    with pytest.raises(HeadwiseError, match="takes lengths that 32 divides"):
        make(48)
    assert not fla(bed(causal=False))
