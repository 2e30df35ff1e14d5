"""Choosing the next token from its logits.

The steps and their order are those of Hugging Face's logits processors (transformers, `generation/logits_process.py`):

1. `logit_bias`: added to the logits of single tokens (`sequence_bias` there).
2. `repetition_penalty` θ: the logit of a token of the prompt or of the new text is divided by θ where it is positive,
   multiplied where it is negative (CTRL, Keskar et al. 2019, arXiv:1909.05858).
3. `frequency_penalty`, `presence_penalty`: minus that much for each time, and once, that the token stands in the *new*
   text (OpenAI's definition; transformers has neither).
4. What a constraint forbids becomes −∞.

At temperature 0 the largest is taken (the first of several). Otherwise a token is drawn after these:

5. `temperature` t: logits / t.
6. `top_k`: only the k likeliest, and what ties with the k-th (Fan et al. 2018, arXiv:1805.04833).
7. `top_p`: the fewest of the likeliest that add up to p (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).
8. `min_p`: those at least min_p times as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082).
9. `typical_p`: those whose −log p lies nearest to its mean, the entropy, until they add up to typical_p (Meister et al.
   2023, arXiv:2202.00666).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from headwise.errors import HeadwiseError, SettingsError, short

if TYPE_CHECKING:
    from torch import Generator, Tensor


class History(NamedTuple):
    """The ids before the token to choose: those that were given, and those that were chosen after them."""

    prompt: Sequence[int] = ()
    new: Sequence[int] = ()


_NONE = History()


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the module's docstring defines each step. `temperature` 0 is greedy: nothing is random.

    `seed` makes the draws; requests of one batch draw from generators of their own, see `generator`. `logit_bias` maps
    ids to what is added; −∞ bans a token.

    Raises `SettingsError` with all values that are out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        def between(low: float, high: float, *, above: bool = False) -> str:
            return f"should be {'more than' if above else 'at least'} {low:g} and at most {high:g}"

        finite = [abs(v) < math.inf for v in (self.presence_penalty, self.frequency_penalty)]
        bad_bias = {i: b for i, b in self.logit_bias.items() if not (i >= 0 and b < math.inf)}
        rules = {
            "temperature": (0 <= self.temperature < math.inf, "should be at least 0 (0 is greedy)"),
            "top_k": (self.top_k is None or self.top_k >= 1, "should be at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, between(0, 1, above=True)),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, between(0, 1)),
            "typical_p": (self.typical_p is None or 0 < self.typical_p <= 1, between(0, 1, above=True)),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "should be more than 0 (1 is none)"),
            "presence_penalty": (finite[0], "should be finite (0 is none)"),
            "frequency_penalty": (finite[1], "should be finite (0 is none)"),
            "logit_bias": (not bad_bias, "should map token ids to numbers that are finite, or -inf"),
            "seed": (0 <= self.seed < 1 << 63, "should be at least 0 and less than 2^63"),
        }
        problems = [
            f"{name}: given {short(getattr(self, name))}, {rule}" for name, (fine, rule) in rules.items() if not fine
        ]
        if problems:
            raise SettingsError(problems)

    def generator(self, index: int = 0) -> Generator:
        """The draws of request number `index`: a function of (seed, index), whatever else is computed beside it."""
        state = np.random.SeedSequence((self.seed, index)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]) >> 1)

    def scores(self, logits_V: Tensor, history: History = _NONE, allowed_V: Tensor | None = None) -> Tensor:
        """The logits after steps 1 to 4: float [V], as they came where nothing is asked for.

        Args:
            logits_V: float [V].
            history: the ids before, for the penalties.
            allowed_V: boolean [V], what a constraint allows.
        """
        if self.logit_bias:
            ids = torch.tensor(list(self.logit_bias), device=logits_V.device)
            bias = torch.tensor(list(self.logit_bias.values()), device=logits_V.device, dtype=logits_V.dtype)
            if int(ids.max()) >= len(logits_V):
                raise SettingsError(f"logit_bias: token {int(ids.max())} is not in the vocabulary of {len(logits_V)}")
            logits_V = logits_V.index_add(0, ids, bias)
        if self.repetition_penalty != 1 and (seen := {*history.prompt, *history.new}):
            ids = torch.tensor(sorted(seen), device=logits_V.device)
            held, penalty = logits_V[ids], self.repetition_penalty
            logits_V = logits_V.index_copy(0, ids, torch.where(held < 0, held * penalty, held / penalty))
        if (self.frequency_penalty or self.presence_penalty) and history.new:
            ids, times = torch.tensor(history.new, device=logits_V.device).unique(return_counts=True)
            malus = self.frequency_penalty * times.to(logits_V.dtype) + self.presence_penalty
            logits_V = logits_V.index_add(0, ids, -malus)
        if allowed_V is not None:
            logits_V = logits_V.masked_fill(~allowed_V.to(logits_V.device), -torch.inf)
        return logits_V

    def probabilities(self, logits_V: Tensor, history: History = _NONE, allowed_V: Tensor | None = None) -> Tensor:
        """float64 [V] on the CPU: what the next token is drawn from; for temperature 0, one at the (first) maximum.

        Raises:
            HeadwiseError: the logits are NaN, or every token is banned.
        """
        x_V = self.scores(logits_V.detach().to("cpu", torch.float64), history, allowed_V)
        _check(x_V)
        if self.temperature == 0:
            return torch.zeros_like(x_V).index_fill_(0, x_V.argmax(), 1.0)
        # The largest becomes 0 first, so that a tiny temperature cannot overflow.
        x = (x_V - x_V.max()) / self.temperature
        ids = torch.arange(len(x))  # those that are left; each step has only them to go through
        for keep in self._filters():
            kept = keep(x)
            ids, x = ids[kept], x[kept]
        return torch.zeros_like(x_V).index_copy_(0, ids, x.softmax(0))

    def _filters(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Steps 6 to 9, as far as they are wanted: logits [n] to what is kept of them, a mask or places."""
        if (k := self.top_k) is not None:
            yield lambda x: x >= x.topk(min(k, len(x))).values[-1]
        if self.top_p is not None and self.top_p < 1:
            yield partial(_nucleus, p=self.top_p)
        if (min_p := self.min_p) is not None:
            yield lambda x: x.softmax(0) >= min_p * x.softmax(0).max()
        if self.typical_p is not None and self.typical_p < 1:
            yield partial(_typical, mass=self.typical_p)

    def pick(
        self,
        logits_V: Tensor,
        generator: Generator,
        history: History = _NONE,
        allowed_V: Tensor | None = None,
    ) -> int:
        """The next token's id; drawn on the CPU, so that a seed gives the same text on every device.

        Raises as `probabilities`.
        """
        if self.temperature > 0:
            return draw(self.probabilities(logits_V, history, allowed_V), generator)
        scores_V = self.scores(logits_V, history, allowed_V)
        best = int(scores_V.argmax())  # of NaNs argmax takes the first: looking at that one is enough
        if not float(scores_V[best]) > -math.inf:
            _check(scores_V)
        return best


def draw(probs_V: Tensor, generator: Generator) -> int:
    """An index drawn from float64 [V] that add up to about 1: one uniform number, looked up in the running sum."""
    sums_V = probs_V.cumsum(0)
    point = torch.rand((), dtype=torch.float64, generator=generator) * sums_V[-1]
    # The first whose sum is more than the point; rounding must not lead past the last that can be drawn at all.
    index = int(torch.searchsorted(sums_V, point, right=True))
    return index if index < len(probs_V) else int(probs_V.nonzero()[-1])


def _check(scores: Tensor) -> None:
    if not bool(scores.max() > -torch.inf):  # false for NaN too
        if bool(scores.isnan().any()):
            raise HeadwiseError("the model's logits are not numbers (NaN); are its weights those of a finished run?")
        raise HeadwiseError("no token is left to choose: logit_bias and the constraint together ban all of them")


def _nucleus(x: Tensor, p: float) -> Tensor:
    """The places of the fewest of the likeliest that add up to p."""
    probs = x.softmax(0)
    places = _first(-probs, probs, p)
    # One stays while those before it have not yet reached p: the first always does.
    return places[probs[places].cumsum(0) - probs[places] < p]


def _typical(x: Tensor, mass: float) -> Tensor:
    """A mask of those whose −log p lies nearest to the entropy, up to `mass`, and of what lies as near as the last."""
    logs = x.log_softmax(0)
    probs = logs.exp()
    distance = (-logs + (probs * logs).nansum()).abs()  # a banned token has 0·∞
    places = _first(distance, probs, mass)
    last = int((probs[places].cumsum(0) < mass).sum())
    return distance <= distance[places[min(last, len(places) - 1)]]


def _first(key: Tensor, probs: Tensor, mass: float) -> Tensor:
    """Places by rising key, as many as are sure to reach `mass`. Nearly always a few do, and to sort a whole vocabulary
    costs ten times as much."""
    places = key.topk(min(1024, len(key)), largest=False).indices
    return places if float(probs[places].sum()) > mass else key.sort().indices
