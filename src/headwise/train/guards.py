"""What watches over a run: values that are not finite, and the signals that ask it to end."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def all_finite(*values: float) -> bool:
    """Whether none of the numbers is NaN or infinite."""
    return all(math.isfinite(value) for value in values)


def find_culprit(model: nn.Module, forward: Callable[[], Tensor]) -> str:
    """Where the first value that is not finite comes from, in words: a parameter, a module's output or a gradient.

    Called only once something is wrong, with the gradients still there: it looks at every parameter, then runs
    `forward` again and looks at every module's output in order, and last at every gradient.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the parameter {name} itself holds {_kind(parameter)}"
    if (found := _first_bad_output(model, forward)) is not None:
        return found
    # The backward pass runs from the last layer to the first, so the last bad gradient is the first that went wrong.
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the forward pass is finite, the gradient of {name} holds {_kind(parameter.grad)}"
    return "every output and gradient is finite, their sum is not"


def _kind(tensor: Tensor) -> str:
    return "nan" if tensor.isnan().any() else "inf"


def _first_bad_output(model: nn.Module, forward: Callable[[], Tensor]) -> str | None:
    found: list[str] = []

    def look_at(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            for tensor in tensors:
                # −inf alone is how scores are masked, and no error.
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not (tensor < torch.inf).all():
                    found.append(f"the first is {_kind(tensor)} in the output of {name} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(look_at(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


class StopRequest:
    """Whether somebody asked the run to end, and how (`SIGINT` or `SIGTERM`)."""

    def __init__(self) -> None:
        self.signal: str | None = None


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request the loop honours at its next step; a second one acts at once.

    Outside the main thread Python cannot catch signals; the request then never comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name
        _restore(before)

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        _restore(before)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        # None: a handler that was not installed from Python, and cannot be put back from it.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
