"""Everything that can be chosen about a benchmark of mechanisms."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode

from headwise.train.settings import Settings

# Fewer rounds give no interval worth the name.
LEAST_ROUNDS = 5


def _calls(value: Any) -> Any:
    """`softmax,window(256)` → ("softmax", "window(256)"): split at the commas that stand in no bracket."""
    if not isinstance(value, str):
        return value
    calls, depth = [""], 0
    for letter in value:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            calls.append("")
        else:
            calls[-1] += letter
    return tuple(call.strip() for call in calls if call.strip())


def _lengths(value: Any) -> Any:
    """`512:4096` → 512, 1024, 2048, 4096; a list as `512,2048` stays one."""
    if not isinstance(value, str):
        return (value,) if isinstance(value, int) else value
    try:
        numbers = [int(item) for item in re.split("[:,]", value.strip(" []"))]
    except ValueError:
        numbers = []
    if not numbers or (":" in value and (len(numbers) != 2 or not 0 < numbers[0] <= numbers[1])):
        raise ValueError("should be FIRST:LAST, doubling from one to the other, as 512:16384, or a list, as 512,2048")
    if ":" not in value:
        return tuple(numbers)
    first, last = numbers
    return tuple(first << n for n in range((last // first).bit_length()))


class BenchSettings(Settings):
    """How mechanisms are measured against torch's own attention."""

    kinds: Annotated[tuple[str, ...], BeforeValidator(_calls), NoDecode] = Field(
        ("all",), description="all registered kinds, or calls, as softmax,window(256)"
    )
    lengths: Annotated[tuple[int, ...], BeforeValidator(_lengths), NoDecode] = Field(
        (512, 1024, 2048, 4096), description="tokens: FIRST:LAST, doubling, as 512:16384, or a list, as 512,2048"
    )
    level: Literal["core", "layer"] = Field(
        "core", description="core: what lies between the projections from and to the residual stream; layer: with them"
    )
    backward: bool = Field(True, description="measure forward and backward, or with --no-backward forward alone")
    causal: bool = Field(True, description="a token sees only itself and those before it")
    position: str = Field("none", description="the position code that every kind but torch's own gets, as rope")
    naive: bool = Field(False, description="also measure each kind's readable form")
    peers: bool = Field(False, description="also measure other libraries' attention, where they are installed")
    batch_size: int = Field(1, ge=1, description="sequences at once")
    n_heads: int = Field(8, ge=1, description="query heads")
    head_dim: int = Field(64, ge=1, description="width of a head where a call gives none")
    d_model: int | None = Field(None, ge=1, description="width of the residual stream; default n_heads × head_dim")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type of weights and vectors")
    device: str = Field("auto", description="cpu, cuda, cuda:N, mps or auto: a GPU where there is one")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; default torch's own choice")
    rounds: int = Field(7, ge=LEAST_ROUNDS, description="rounds in which all kinds take turns; 6 give a 95 % interval")
    budget: float = Field(
        60.0, gt=0, allow_inf_nan=False, description="seconds that one kind may take; lengths beyond are left out"
    )
    out: Path | None = Field(None, description="folder for report.html and result.json; without one nothing is written")

    def contradictions(self) -> Iterable[tuple[tuple[str, ...], str]]:
        if not self.kinds:
            yield ("kinds",), "kinds: none given; write all, or calls, as softmax,window(256)"
        if "all" in self.kinds and len(self.kinds) > 1:
            yield ("kinds",), f"kinds: {','.join(self.kinds)} given; all stands alone, calls stand without it"
        if not self.lengths:
            yield ("lengths",), "lengths: none given; write FIRST:LAST, as 512:16384, or a list, as 512,2048"
        if bad := [n for n in self.lengths if n < 2]:
            yield ("lengths",), f"lengths: {bad[0]} given; at least 2 tokens are needed"
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            yield ("out",), f"out: {self.out} is a file; choose a folder"
        if self.dtype == "float16" and self.device == "cpu":
            yield ("dtype", "device"), "dtype: float16 needs a GPU; on the CPU use bfloat16 or float32"

    @property
    def width(self) -> int:
        """d_model in force."""
        return self.d_model or self.n_heads * self.head_dim
