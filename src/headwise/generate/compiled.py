"""The step that decodes one token as one compiled program (`torch.compile`).

A token of a small model is some thousand small operations, and to start them takes longer than to do them. Compiled, a
step is its matrix products and little else. Compiling takes a minute or so for thirty layers, since every layer is
traced, and about half of that when the same model was compiled before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from headwise.errors import HeadwiseError, SettingsError

if TYPE_CHECKING:
    from torch import Tensor

    from headwise.cache import ModelCache
    from headwise.model.base import LanguageModel

    Step = Callable[[LanguageModel, Tensor, ModelCache], Tensor]

CACHES = ("auto", "contiguous")
# What torch looks at before each token: lengths and sizes in the cache, which may decide on another program (a window
# that fills), and how torch itself is set. All else it would look at, a quarter of the step's time, is model and cache,
# whose parts do not change between two tokens.
GUARDS = ("SHAPE_ENV", "GRAD_MODE", "GLOBAL_STATE")

PROGRAMS = 64  # of one model at most: each window that fills makes one more

_steps: WeakKeyDictionary[LanguageModel, tuple[object, Step]] = WeakKeyDictionary()


def cache_kind(kind: str) -> str:
    """The kind of cache that a compiled step fills: one that grows, or a recurrence's state.

    Raises:
        SettingsError: another kind was asked for; most go by rules that cannot be compiled once for all lengths.
    """
    if kind not in CACHES:
        raise SettingsError(f"cache: {kind} does not go with compile; allowed: {', '.join(CACHES)}")
    return "contiguous"


def step_of(model: LanguageModel) -> Step:
    """What makes logits [1,1,V] of the model, one new id int64 [1,1] and a cache; compiled when it is first called.

    The program belongs to the model as it is now: parameters may change, parts may not. A model whose parts have
    changed (quantised, moved, a mechanism swapped) gets a new one.

    Raises:
        HeadwiseError: when called, what the compiler says, where it cannot be used.
    """
    parts = tuple((id(module), type(module)) for module in model.modules())
    parameter = next(model.parameters())
    state = (parts, parameter.dtype, parameter.device)
    if model not in _steps or _steps[model][0] != state:
        _steps[model] = (state, _new_step())
    return _steps[model][1]


def _new_step() -> Step:
    from torch._dynamo.exc import FailOnRecompileLimitHit  # loads the compiler

    def step(model: LanguageModel, ids_11: Tensor, cache: ModelCache) -> Tensor:
        logits: Tensor = model(ids_11, cache=cache, last=True)
        return logits

    # Compiled programs are kept by code object. This model's are its own: nothing before a token asks which model.
    step.__code__ = step.__code__.replace()
    options: dict[str, Any] = {"guard_filter_fn": _conditions, "size_asserts": False, "alignment_asserts": False}
    compiled = torch.compile(step, fullgraph=True, dynamic=True, options=options)

    def run(model: LanguageModel, ids_11: Tensor, cache: ModelCache) -> Tensor:
        for layer in cache.layers:
            layer.reserve(2)  # one more than is stored: a full buffer would be contiguous, which is another program
        try:
            # Numbers of the model, as a norm's ε, are constants, or each would be one more condition.
            with torch._dynamo.config.patch(specialize_float=True, recompile_limit=PROGRAMS):
                logits: Tensor = compiled(model, ids_11, cache)
        except HeadwiseError:
            raise
        except (RuntimeError, FailOnRecompileLimitHit) as error:
            said = str(error).strip().partition("\n")[0]
            raise HeadwiseError(f"compile: torch.compile failed: {said}; leave compile out, or mend that") from error
        return logits

    return run


def _conditions(entries: Sequence[Any]) -> list[bool]:
    return [each.guard_type in GUARDS for each in entries]
