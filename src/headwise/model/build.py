"""From a spec to a module."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from headwise.model.base import LanguageModel
from headwise.model.decoder import Decoder
from headwise.model.encoder_decoder import EncoderDecoder
from headwise.model.init import generator_for, initialise
from headwise.spec import ModelSpec, parse


class _Undrawn(TorchFunctionMode):
    """Leaves initial values out. On the meta device there are none, but to draw them torch would load its compiler
    (seconds, and a hundred megabytes)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__.endswith(("normal_", "uniform_")):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build(
    spec: ModelSpec | str | Mapping[str, Any],
    seed: int = 0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """The module of a spec (or line), with the initial values of `seed`.

    Open widths are resolved at the default size. The global random state is left as it was.

    Args:
        spec: what `parse` returns, or anything it reads.
        seed: makes the initial values; the same seed gives the same values on every device.
        device, dtype: where and in what precision the parameters are kept; float32 on the CPU by default. The device
            "meta" builds without memory or values.

    Raises:
        SpecError: the spec is no architecture.
    """
    spec = parse(spec)
    spec = spec if spec.is_resolved else spec.resolve()
    on_meta = device is not None and torch.device(device).type == "meta"
    # torch's own initial values would move the global generators; ours replace them. What a mechanism draws while it is
    # made, and leaves so, is a function of the seed too.
    with torch.random.fork_rng(devices=[]), ExitStack() as context:
        context.enter_context(torch.device("meta" if on_meta else "cpu"))
        if on_meta:
            context.enter_context(_Undrawn())
        torch.default_generator.set_state(generator_for(seed, "").get_state())
        model = EncoderDecoder(spec) if spec.architecture == "encoder_decoder" else Decoder(spec)
    if not on_meta:
        initialise(model, spec, seed)
    return model.to(device=device, dtype=dtype)
