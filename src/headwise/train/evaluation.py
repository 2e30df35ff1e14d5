"""The loss over a whole split, in nats a token and bits a byte."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headwise.allocator import kept_memory
from headwise.errors import DataError
from headwise.train.objective import Objective, loss_sum, make_objective

if TYPE_CHECKING:
    from headwise.data import Tokens
    from headwise.model.base import LanguageModel

# Tokens of one evaluation batch: a CPU is quickest when activations stay in its cache, a GPU when it is full.
_CPU_TOKENS, _GPU_TOKENS = 1024, 32768
_MOST_LOGITS = 2**26


@dataclass(frozen=True)
class EvalResult:
    """`nats` a counted token; `bits_per_byte` of UTF-8 text (None for a masked LM, which codes no text)."""

    nats: float
    bits_per_byte: float | None
    n_tokens: int


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """The context in which matrix products run in `dtype`; nothing for float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def evaluate(
    model: LanguageModel,
    tokens: Tokens,
    *,
    objective: Objective | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    dtype: str = "float32",
) -> EvalResult:
    """Mean cross-entropy over *every* target of the split, in windows of `seq_len` (default: the model's longest).

    Bits a byte (`Tokens.bits_per_byte`) compare between tokenizers. An encoder–decoder is asked for the second half of
    each window only, a masked LM for the positions that seed 0 masks, the same for every model. Draws no random
    numbers; leaves the mode as it was. Raises `DataError` for ids beyond the model's vocabulary and text too short.
    """
    from headwise.data import eval_batches

    seq_len = seq_len or model.spec.dims.max_seq_len
    objective = objective or make_objective(model.spec, seed=0)
    vocab_size, device = model.spec.dims.vocab_size, next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        with torch.inference_mode(), autocast(device, dtype), kept_memory():
            rows = batch_size or rows_at_once(vocab_size, seq_len, device)
            for index, batch in enumerate(eval_batches(tokens, rows, seq_len)):
                if int(batch.ids.max()) >= vocab_size:
                    raise DataError(
                        f"{tokens.name} has ids beyond the model's vocabulary ({vocab_size}); use the model's tokenizer"
                    )
                example = objective(batch, index)
                total += loss_sum(model, example.to(device)).item()
                count += example.count()
    finally:
        model.train(was_training)
    if not count:
        raise DataError(f"the split of {len(tokens)} tokens holds nothing to predict; give more text")
    nats = total / count
    codes_text = model.spec.architecture != "encoder"
    return EvalResult(nats, tokens.bits_per_byte(nats * tokens.n_targets) if codes_text else None, count)


def together_over(results: Sequence[EvalResult], n_bytes: Sequence[int]) -> EvalResult:
    """The result over several splits, from each split's own and its bytes of UTF-8 text."""
    n_tokens = sum(result.n_tokens for result in results)
    nats = sum(result.nats * result.n_tokens for result in results) / n_tokens
    bits = [result.bits_per_byte for result in results]
    known = [each for each in bits if each is not None]
    mean = sum(b * n for b, n in zip(known, n_bytes)) / sum(n_bytes) if len(known) == len(bits) else None
    return EvalResult(nats, mean, n_tokens)


def rows_at_once(vocab_size: int, seq_len: int, device: torch.device) -> int:
    """Sequences of one evaluation batch: what suits the device, as far as the logits stay within bounds."""
    wanted = _CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS
    return max(1, min(wanted, _MOST_LOGITS // vocab_size) // seq_len)
