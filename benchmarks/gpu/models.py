"""The promises of the conformance suite on this device, for every line that the suite runs.

Needs the whole package; the kernels do not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.situation import Situation, attempt, rms
from tables import Table, table

# What float32 sums in another order may differ by, relative to the size of what is compared.
TOLERANCE = 1e-4
T = 257


class Line:
    """One line of the suite on the device, with its promises as methods; each returns what it measured, or raises."""

    def __init__(self, suite: Any, line: str, here: Situation) -> None:
        self.suite, self.line, self.here = suite, line, here
        self.causal = line in suite.CAUSAL

    def model(self, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
        from headwise.model import build
        from headwise.spec import parse

        model = build(parse(self.line).replace(init_std=0.2, **fields), seed=1).eval()
        return model.to(self.here.device, dtype)

    def tokens(self, *shape: int, seed: int = 0) -> Tensor:
        return self.suite.tokens(*shape, seed=seed).to(self.here.device)

    def logits(self, model: Any, ids: Tensor, **given: Any) -> Tensor:
        extra = {name: x.to(self.here.device) for name, x in self.suite.extra_inputs(model, ids.shape[0]).items()}
        return model(ids, **extra, **given)

    def outcome(self, dtype: torch.dtype, naive: bool) -> list[Tensor]:
        """Logits and all gradients."""
        from headwise import kernels

        model = self.model(dtype)
        weight = torch.randn(1, T, 61, generator=torch.Generator().manual_seed(2)).to(self.here.device, dtype)
        if naive:
            with kernels.naive():
                logits = self.logits(model, self.tokens(1, T))
                (logits * weight).sum().backward()
        else:
            logits = self.logits(model, self.tokens(1, T))
            (logits * weight).sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return [logits.detach().double(), grads.double()]

    def fast_equals_naive(self, dtype: torch.dtype) -> float:
        """Errors against float64 as multiples of those allowed: twice the naive form's forward, thrice backward."""
        exact = self.outcome(torch.float64, True)
        rough, fast = self.outcome(dtype, True), self.outcome(dtype, False)
        shares = []
        for e, n, f, factor in zip(exact, rough, fast, (2, 3)):
            shares.append(rms(f - e) / (factor * rms(n - e) + torch.finfo(dtype).eps * rms(e)))
        assert max(shares) <= 1, f"error {max(shares):.2f} times what is allowed"
        return max(shares)

    @torch.no_grad()
    def later_tokens_change_nothing(self) -> float:
        model, ids = self.model(), self.tokens(2, 300)
        before, changed = self.logits(model, ids), ids.clone()
        changed[:, 150] = (changed[:, 150] + 1) % 61
        return self._same(self.logits(model, changed)[:, :150], before[:, :150])

    @torch.no_grad()
    def cache_equals_full_pass(self) -> float:
        model, ids = self.model(), self.tokens(2, 41)
        cache, pieces, start = model.new_cache(), [], 0
        for n in (7, 1, 20, 1, 12):
            pieces.append(model(ids[:, start : start + n], cache=cache))
            start += n
        return self._same(torch.cat(pieces, 1), model(ids))

    @torch.no_grad()
    def packed_as_if_alone(self) -> float:
        model, lengths = self.model(), [5, 300, 1, 60]
        documents = [self.tokens(1, n, seed=i) for i, n in enumerate(lengths)]
        segments = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], 1).to(self.here.device)
        packed = self.logits(model, torch.cat(documents, 1), segments=segments)
        return self._same(packed, torch.cat([self.logits(model, each) for each in documents], 1))

    @torch.no_grad()
    def bf16_near_float32(self) -> float:
        length = 300 if self.here.tiny else 4096
        ids = self.tokens(1, length)
        exact = self.logits(self.model(max_seq_len=4096), ids)
        half = self.logits(self.model(torch.bfloat16, max_seq_len=4096), ids).float()
        error = rms(half - exact) / rms(exact)
        assert half.isfinite().all(), "not finite"
        assert error < 0.05, f"relative error {error:.3f}"
        return error

    def checkpointed_and_autocast(self) -> float:
        model = self.model().train()
        loss, grads = self._loss(model)
        model.activation_checkpointing = True
        again, same = self._loss(model)
        with torch.autocast(self.here.device.type, torch.bfloat16):
            half, _ = self._loss(model)
        assert abs(half - loss) <= 0.03 * (1 + abs(loss)), f"autocast: loss {half:.4f}, {loss:.4f} without"
        assert abs(again - loss) <= 1e-6 * (1 + abs(loss)), f"checkpointed: loss {again:.7f}, {loss:.7f} without"
        return self._same(same, grads)

    def compiled(self) -> float:
        """Whole, without a break; traced and differentiated, not yet made into kernels."""
        model = self.model().train()
        loss, grads = self._loss(model)
        torch._dynamo.reset()
        again, same = self._loss(model, torch.compile(model, backend="aot_eager", fullgraph=True))
        assert abs(again - loss) <= 1e-5 * (1 + abs(loss)), f"loss {again:.6f}, {loss:.6f} without"
        return self._same(same, grads)

    def _loss(self, model: Any, form: Any = None) -> tuple[float, Tensor]:
        model.zero_grad()
        ids, targets = self.tokens(2, 41), self.tokens(2, 41, seed=4)
        extra = {name: x.to(self.here.device) for name, x in self.suite.extra_inputs(model, 2).items()}
        logits = (model if form is None else form)(ids, **extra)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def _same(self, a: Tensor, b: Tensor) -> float:
        difference = ((a - b).abs().max() / rms(b)).item()
        assert difference <= TOLERANCE, f"differs by {difference:.1e}"
        return difference

    def promises(self) -> dict[str, Callable[[], float]]:
        made: dict[str, Callable[[], float]] = {
            "fast = naive, float32": partial(self.fast_equals_naive, torch.float32),
            "fast = naive, bfloat16": partial(self.fast_equals_naive, torch.bfloat16),
            "packed": self.packed_as_if_alone,
            "bfloat16 at 4096": self.bf16_near_float32,
            "checkpoint, autocast": self.checkpointed_and_autocast,
        }
        if self.causal:
            made["causal"] = self.later_tokens_change_nothing
            made["cache"] = self.cache_equals_full_pass
        return made


def check(here: Situation) -> Table:
    """All promises but compiling of all lines, then compiling, as far as time allows.

    Raises:
        ImportError: where a library that models need is not installed.
    """
    suite = _suite()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    lines = [Line(suite, line, here) for line in (*suite.CAUSAL, *suite.BIDIRECTIONAL, *suite.ENCODER_DECODER)]
    lines = lines[:: max(1, len(lines) // 3)] if here.tiny else lines
    rows: dict[str, dict[str, Any]] = {}
    for compiling in (False, True):
        for each in lines[:1] if compiling and here.tiny else lines:
            name = re.sub(r"d_model=[^()]*max_seq_len=\d+(, )?", "", each.line)
            row = rows.setdefault(name, {"name": f"`{name}`"})
            promises = {"compiled": each.compiled} if compiling else each.promises()
            if not here.time_left(f"models: {name}{', compiled' if compiling else ''}"):
                continue
            for promise, keep in promises.items():
                measured, failed = attempt(keep)
                row[promise] = "FAILED" if failed else f"{measured:.1e}"
                here.targets[f"models: {name}: {promise}"] = failed is None
                if failed:
                    row["note"] = "; ".join([*filter(None, [row.get("note")]), f"{promise}: {failed}"])
        here.say(f"{'compiled' if compiling else 'ran'} the models")
    columns = {key: None for row in rows.values() for key in row if key not in ("name", "note")}
    return table(
        f"For each promise what was measured: the error's share of what is allowed (fast = naive), a relative error "
        f"(bfloat16), else the largest difference relative to the numbers' size (allowed {TOLERANCE:g}).",
        ("name", "line", "text"), *((key, key, "text right") for key in columns), ("note", "note", "text"),
        rows=list(rows.values()),
    )  # fmt: skip


def _suite() -> Any:
    """The conformance suite's lines, from the source tree."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "conformance"))
    import conformance_lines

    return conformance_lines
