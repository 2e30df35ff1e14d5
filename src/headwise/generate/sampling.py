"""Choosing the next token from its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headwise.errors import SettingsError

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy: the likeliest token, nothing random.

    `top_k` keeps the k likeliest tokens (Fan et al. 2018, arXiv:1805.04833), `top_p` the fewest whose probabilities,
    after temperature and top_k, add up to p (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature: given {self.temperature}, should be at least 0 (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k: given {self.top_k}, should be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p: given {self.top_p}, should be more than 0 and at most 1")
        if problems:
            raise SettingsError("; ".join(problems))

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """float64 [V] on the CPU: what the next token is drawn from; for temperature 0, one at the (first) maximum."""
        logits_V = logits_V.detach().to("cpu", torch.float64)
        if self.temperature == 0:
            return torch.zeros_like(logits_V).index_fill_(0, logits_V.argmax(), 1.0)
        # The largest logit becomes 0 first, so that a tiny temperature cannot overflow.
        logits_V = (logits_V - logits_V.max()) / self.temperature
        if self.top_k is not None and self.top_k < len(logits_V):
            kept = torch.full_like(logits_V, -torch.inf)
            best = logits_V.topk(self.top_k)
            logits_V = kept.scatter(0, best.indices, best.values)
        probs_V = logits_V.softmax(0)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = probs_V.sort(descending=True, stable=True)
            # A token stays while those before it have not yet reached p: the first always does.
            ordered[ordered.cumsum(0) - ordered >= self.top_p] = 0.0
            probs_V = torch.zeros_like(probs_V).scatter(0, order, ordered)
            probs_V /= probs_V.sum()
        return probs_V

    def pick(self, logits_V: Tensor, generator: Generator) -> int:
        """The next token's id; drawn on the CPU, so that a seed gives the same text on every device."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        return int(torch.multinomial(self.probabilities(logits_V), 1, generator=generator))
