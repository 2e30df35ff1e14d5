"""What is measured: torch's own attention, every kind's layer or its core, and the same at any length.

**Layer**: the module as `get_attention` builds it, from the residual stream [B,T,C] and back to it. Torch's own beside
it is what people write by hand: a linear map to queries, keys and values, `scaled_dot_product_attention`, a map out.

**Core**: the same layer without its projections. The results of the linear maps from the layer's input (queries, keys,
values, gates) are handed in ready, the map to its output is left out, and everything between counts: rotations, feature
maps, softplus, maps between the two. Torch's own is `scaled_dot_product_attention` on ready q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headwise import kernels
from headwise.attention import Attention, AttentionSpec, Context
from headwise.dims import Dims
from headwise.errors import HeadwiseError, Problem, SettingsError, SpecError
from headwise.lab.bench.settings import BenchSettings
from headwise.position import Encoding, PositionSpec
from headwise.registry import ATTENTION, POSITION, ComponentSpec, Pattern
from headwise.spec.grammar import read_value
from headwise.train.job import resolve_device

Source = Literal["torch", "headwise", "peer"]
BASELINE = "sdpa"


class Work(NamedTuple):
    """A mechanism made ready at one length: its forward pass, what gets gradients, and whose parameters it uses."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    own: nn.Module | None


@dataclass(frozen=True)
class Case:
    """One row of a benchmark, which can be made ready at any length."""

    label: str
    source: Source
    make: Callable[[int], Work]
    naive: bool = False

    def forward(self, work: Work) -> Tensor:
        """One forward pass, in the form that is measured."""
        with kernels.naive() if self.naive else nullcontext():
            return work.forward()

    def step(self, work: Work, bed: Bed) -> Callable[[], None]:
        """The forward pass, and the backward pass where that is measured, to the end on whatever device."""

        def run() -> None:
            with torch.set_grad_enabled(bed.settings.backward):
                y = self.forward(work)
            if bed.settings.backward:
                # Not y.sum(): its gradient has no memory of its own, which kernels have to copy first.
                torch.autograd.grad(y, work.leaves, bed.random(*y.shape, seed=1), allow_unused=True)
            if bed.device.type == "cuda":
                torch.cuda.synchronize(bed.device)

        return run


class Bed:
    """What all cases of a benchmark share: settings, device, widths, and random tensors drawn once."""

    def __init__(self, settings: BenchSettings) -> None:
        self.settings = settings
        self.device = resolve_device(settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        if settings.dtype == "float16" and self.device.type != "cuda":
            raise SettingsError(f"dtype: float16 needs a GPU, the device is {self.device}; use bfloat16 or float32")
        self.random = cache(self._random)

    def dims(self, length: int) -> Dims:
        return Dims(self.settings.width, self.settings.n_heads, max_seq_len=length)

    def _random(self, *shape: int, seed: int = 0) -> Tensor:
        """A tensor of these widths, the same for all who ask."""
        made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return made.to(self.device, self.dtype)

    def leaf(self, *shape: int, seed: int = 0) -> Tensor:
        """Such a tensor that gets gradients."""
        return self.random(*shape, seed=seed).detach().requires_grad_(self.settings.backward)

    def forget(self) -> None:
        """Give the tensors' memory back, before another length."""
        self.random.cache_clear()


def cases(bed: Bed) -> list[Case]:
    """Torch's own attention first, then every kind asked for, each followed by its readable form if that is wanted.

    Raises:
        SettingsError: calls that are no attention, or that cannot be built at these widths; all problems at once.
            Among all kinds one that cannot be built is no mistake: it is left out when its turn comes.
    """
    settings, problems = bed.settings, []
    everything = settings.kinds == ("all",)
    made = [Case(BASELINE, "torch", lambda length: stock(bed, length))]
    try:
        position = _position(bed)
    except SpecError as error:
        position, problems = POSITION.spec("none"), [f"position: {p}" for p in error.problems]
    for call in dict.fromkeys(typical_calls() if everything else settings.kinds):
        try:
            spec = attention_spec(call, bed)
            if not everything and (wrong := _problems(spec, position, bed.dims(max(settings.lengths)))):
                raise SpecError(wrong)
        except SpecError as error:
            problems += [f"kinds: {call}: {p}" for p in error.problems]
            continue
        make = partial(mechanism, bed, spec, position)
        made.append(Case(call, "headwise", make))
        if settings.naive:
            made.append(Case(f"{call}, naive", "headwise", partial(make, naive=True), naive=True))
    if problems:
        raise SettingsError(problems if len(problems) > 1 else problems[0])
    if settings.peers:
        from headwise.lab.bench.peers import peers

        made += peers(bed)
    return made


def typical_calls() -> list[str]:
    """One call of each registered attention: the bare kind where that says enough, else its spec's `typical` or first
    example."""
    return [_typical(kind) for kind in ATTENTION.list()]


def _typical(kind: str) -> str:
    spec = ATTENTION.get(kind).spec
    try:
        bare = ATTENTION.spec(kind)
    except SpecError:
        bare = None
    examples = [e for e in spec.examples if ATTENTION.spec(read_value(e)).kind == kind]
    return spec.typical or (kind if bare is not None or not examples else examples[0])


def attention_spec(call: str, bed: Bed) -> ComponentSpec:
    """The spec of a call, with the benchmark's head width where it names none. SpecError: it is no attention."""
    spec = ATTENTION.spec(read_value(call))
    if isinstance(spec, Pattern):
        raise SpecError("a pattern is several kinds; name each by itself")
    dims = bed.dims(max(bed.settings.lengths))
    if isinstance(spec, AttentionSpec) and spec.head_dim is None and dims.head_dim != bed.settings.head_dim:
        spec = spec.model_copy(update={"head_dim": bed.settings.head_dim})
    return spec


def _position(bed: Bed) -> ComponentSpec:
    spec = POSITION.spec(read_value(bed.settings.position))
    if isinstance(spec, Pattern) or (isinstance(spec, PositionSpec) and spec.embeds):
        kinds = [k for k in POSITION.list() if not getattr(POSITION.get(k).spec, "embeds", False)]
        raise SpecError([Problem("", f"{spec.kind} does not act in the attention; allowed: {', '.join(kinds)}")])
    return spec


def _problems(spec: ComponentSpec, position: ComponentSpec, dims: Dims) -> list[Problem]:
    """What keeps a kind, or this position code in it, from being built at these widths."""
    if not isinstance(position, PositionSpec):
        return spec.check(dims)
    return spec.check(dims) or position.check_head(_turned(spec, dims))


def _turned(spec: ComponentSpec, dims: Dims) -> int:
    """How wide the heads are that the position code sees."""
    return spec.rotary_dim(dims) if isinstance(spec, AttentionSpec) else dims.head_dim


def stock(bed: Bed, length: int) -> Work:
    """Torch's own attention, as it is written by hand."""

    def meet(*heads_BTHD: Tensor) -> Tensor:
        q_BHTD, k_BHTD, v_BHTD = (x.transpose(1, 2) for x in heads_BTHD)
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=bed.settings.causal).transpose(1, 2)

    return by_hand(bed, length, meet)


def by_hand(bed: Bed, length: int, meet: Callable[..., Tensor], gates: tuple[int, ...] = ()) -> Work:
    """A layer of plain linear maps, or its core alone, at one length.

    `meet` makes [B,T,H,D] of queries, keys, values [B,T,H,D] and as many gates [B,T,H,·], of the widths given.
    """
    s = bed.settings
    widths = (s.head_dim, s.head_dim, s.head_dim, *gates)
    if s.level == "core":
        # Heads one after another in memory, as most kernels read and write them.
        leaves = [bed.leaf(s.batch_size, s.n_heads, length, w, seed=seed) for seed, w in enumerate(widths)]
        return Work(lambda: meet(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2), leaves, None)
    inner = s.n_heads * s.head_dim
    shares = [s.n_heads * w for w in widths]
    own = nn.ModuleList([nn.Linear(s.width, sum(shares), bias=False), nn.Linear(inner, s.width, bias=False)])
    own.to(bed.device, bed.dtype)
    x_BTC = bed.leaf(s.batch_size, length, s.width)

    def forward() -> Tensor:
        heads = own[0](x_BTC).split(shares, dim=-1)
        return own[1](meet(*(h.unflatten(-1, (s.n_heads, -1)) for h in heads)).flatten(2))

    return Work(forward, [x_BTC, *own.parameters()], own)


def mechanism(bed: Bed, spec: ComponentSpec, position: ComponentSpec, length: int, *, naive: bool = False) -> Work:
    """A registered kind's layer, or its core, at one length."""
    dims = bed.dims(length)
    if wrong := _problems(spec, position, dims):
        raise SpecError(wrong)
    layer = ATTENTION.build(spec, dims)
    for module in layer.modules():
        if callable(own_rule := getattr(module, "initialise", None)):
            own_rule(torch.Generator().manual_seed(0))
    layer.to(bed.device, bed.dtype)
    encoding = Encoding()
    if position.kind != "none":
        code = POSITION.build(position, dims)
        encoding = code.encode(torch.arange(length, device=bed.device), length, _turned(spec, dims))
    context = Context(causal=bed.settings.causal, encoding=encoding)
    return layer_work(bed, length, layer, lambda x_BTC: layer(x_BTC, context=context)[0], naive=naive)


def layer_work(
    bed: Bed, length: int, layer: nn.Module, call: Callable[[Tensor], Tensor], *, naive: bool = False
) -> Work:
    """A layer, called so, or its core, at one length."""
    x_BTC = bed.leaf(bed.settings.batch_size, length, bed.settings.width)
    forward: Callable[[], Tensor] = partial(call, x_BTC)
    inputs = [x_BTC]
    if bed.settings.level == "core":
        with torch.set_grad_enabled(bed.settings.backward), kernels.naive() if naive else nullcontext():
            forward, inputs = core(layer, x_BTC, forward)
    return Work(forward, [*inputs, *(p for p in layer.parameters() if p.requires_grad)], layer)


def core(layer: nn.Module, x_BTC: Tensor, forward: Callable[[], Tensor]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A layer's forward pass without its projections from `x_BTC` and to its output, and what they had given.

    One pass is run as it is and every linear map in it noted; later passes take the same way, but a map of `x_BTC`
    itself gives what it gave then, and the last map, whose result is the layer's, hands its input on.
    """
    ready: list[Tensor] = []

    def keep(y: Tensor) -> Tensor:
        ready.append(y.detach().contiguous().requires_grad_(y.requires_grad))
        return ready[-1]

    torch_linear = F.linear
    if isinstance(layer, Attention) and type(layer)._project is Attention._project:
        # As a whole: in training the base puts the maps' weights side by side first, which is part of projecting.
        project, given = layer._project, list[Tensor]()

        def projected(x_BTC: Tensor, source_BSC: Tensor) -> tuple[Tensor, ...]:
            if not given:
                with _linear(torch_linear):
                    given.extend(keep(y) for y in project(x_BTC, source_BSC))
            return tuple(given)

        layer._project = projected  # type: ignore[method-assign]
    calls: list[tuple[bool, Tensor]] = []

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = torch_linear(x, weight, bias)
        calls.append((x is x_BTC, y))
        return y

    with _linear(noted):
        out = forward()
    plan = [keep(y) if of_input else ("out" if y is out else None) for of_input, y in calls]

    def replayed() -> Tensor:
        steps = iter(plan)

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            step = next(steps)
            if isinstance(step, Tensor):
                return step
            return torch_linear(x, weight, bias) if step is None else x

        with _linear(linear):
            return forward()

    return replayed, ready


@contextmanager
def _linear(replacement: Callable[..., Tensor]) -> Iterator[None]:
    """Let every linear map be `replacement`."""
    before: Any = F.linear
    try:
        F.linear = replacement
        yield
    finally:
        F.linear = before


def refusal(error: Exception) -> str | None:
    """Why a case cannot be measured at a length, in one line, or None where `error` is a fault and no such reason."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "not enough memory" in text:
        return "out of memory"
    return text if isinstance(error, HeadwiseError) else None
