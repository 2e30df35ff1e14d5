"""Promise 1: the fast forms err, against a float64 naive run, no more than the naive form does in float32.

Errors are root mean squares over all numbers: at most 2× the naive form's forward, 3× backward. With one or two tokens
a single number can decide both errors (a head's only output, divided by its own size where a norm follows), and their
ratio is then a matter of luck; so it is the geometric mean over several inputs there. Promise 5's gradcheck of the
naive form in float64 stands here too.
"""

from __future__ import annotations

from statistics import geometric_mean

import pytest
import torch
from conformance_lines import extra_inputs, model_of, one_layer, tokens
from torch import Tensor

from headwise import kernels
from headwise.model.base import LanguageModel

LENGTHS = [1, 2, 97, 257, 1025]
FEW, DRAWS = 2, 3


def run(model: LanguageModel, T: int, *, naive: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and all parameters' gradients of a random weighting of them, each as one float64 vector."""
    ids = tokens(1, T, seed=seed)
    weight = torch.randn(1, T, 61, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight = weight.to(next(model.parameters()).dtype)
    model.zero_grad()
    if naive:
        with kernels.naive():
            logits = model(ids, **extra_inputs(model, 1))
            (logits * weight).sum().backward()
    else:
        logits = model(ids, **extra_inputs(model, 1))
        (logits * weight).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach().double().flatten(), torch.cat(grads).double()


def rms(x: Tensor) -> float:
    return x.pow(2).mean().sqrt().item()


@pytest.mark.parametrize("T", LENGTHS)
def test_fast_form_errs_no_more_than_the_naive_form(line: str, T: int) -> None:
    ratios: list[list[float]] = []
    # One each: what a run leaves in its model cannot help another form.
    wide, plain, quick = (model_of(one_layer(line)) for _ in range(3))
    wide.double()
    for seed in range(DRAWS if T <= FEW else 1):
        exact = run(wide, T, naive=True, seed=seed)
        naive = run(plain, T, naive=True, seed=seed)
        fast = run(quick, T, naive=False, seed=seed)
        # Where the naive form happens to be exact to the last bit, one rounding of the result is allowed.
        roundings = [torch.finfo(torch.float32).eps * rms(e) for e in exact]
        ratios.append(
            [
                max(rms(f - e) - rounding, 1e-3 * rounding) / max(rms(n - e), 1e-3 * rounding)
                for e, n, f, rounding in zip(exact, naive, fast, roundings)
            ]
        )
    for what, factor, drawn in zip(("forward", "backward"), (2, 3), zip(*ratios)):
        assert geometric_mean(drawn) <= factor, f"{what}: fast errs {geometric_mean(drawn):.2f} times as much as naive"


def test_fast_form_in_float64_equals_the_naive_form(line: str) -> None:
    exact, fast = (run(model_of(one_layer(line)).double(), 300, naive=naive) for naive in (True, False))
    for e, f in zip(exact, fast):
        assert rms(f - e) <= 1e-10 * rms(e)


def test_naive_form_has_the_gradients_of_its_values(line: str) -> None:
    """gradcheck in float64 of a random weighting of the logits, along one random direction of all parameters at
    once.
    """
    model = model_of(line).double()
    ids = tokens(2, 5)
    extra = extra_inputs(model, 2)
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(2, 5, 61, generator=generator, dtype=torch.float64)
    directions = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in parameters.items()}

    def along(t: Tensor) -> Tensor:
        moved = {n: p.detach() + t * directions[n] for n, p in parameters.items()}
        with kernels.naive():
            return (torch.func.functional_call(model, moved, (ids,), extra) * weight).sum()

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(along, (t,), eps=1e-6, atol=1e-5, rtol=1e-4)
