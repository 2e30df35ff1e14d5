"""The loss over a split of examples, and over each of its parts: prompt, reasoning, answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from headwise.errors import DataError, SettingsError
from headwise.train.evaluation import EvalResult, autocast, rows_at_once, together_over
from headwise.train.objective import IGNORED

if TYPE_CHECKING:
    from headwise.data.examples import ExampleSet
    from headwise.data.windows import LossOn
    from headwise.model.base import LanguageModel


@dataclass(frozen=True)
class PartsResult(EvalResult):
    """`by_part`: nats a token of each part that has counted targets; `tokens_by_part`: how many those are."""

    by_part: dict[str, float]
    tokens_by_part: dict[str, int]


def parts_together(results: Sequence[PartsResult], n_bytes: Sequence[int]) -> PartsResult:
    """The result over several splits, as `together_over`."""
    whole = together_over(results, n_bytes)
    names = dict.fromkeys(name for result in results for name in result.by_part)
    counts = {name: sum(result.tokens_by_part.get(name, 0) for result in results) for name in names}
    sums = {name: sum(r.by_part[name] * r.tokens_by_part[name] for r in results if name in r.by_part) for name in names}
    by_part = {name: sums[name] / counts[name] for name in names}
    return PartsResult(whole.nats, whole.bits_per_byte, whole.n_tokens, by_part, counts)


def evaluate_examples(
    model: LanguageModel,
    split: ExampleSet,
    *,
    seq_len: int | None = None,
    batch_size: int | None = None,
    dtype: str = "float32",
    loss_on: LossOn = "all",
) -> PartsResult:
    """Mean cross-entropy over all targets of the split, once over all and once over each part.

    A token's loss belongs to the part that the token is of. Windows of like lengths are read together, so that little
    is padded; the padding stands behind the text, where a causal decoder does not see it. Draws no random numbers;
    leaves the mode as it was. `bits_per_byte` is None where loss_on leaves targets out.

    Args:
        seq_len: inputs of a window; default: the model's longest.
        loss_on: "completion" leaves the prompt out.

    Raises:
        SettingsError: the model is no decoder.
        DataError: ids beyond the model's vocabulary, or nothing to predict.
    """
    from headwise.data.windows import Windows

    spec, device = model.spec, next(model.parameters()).device
    if spec.architecture != "decoder":
        raise SettingsError(f"losses by part are those of a decoder, and this is an {spec.architecture}")
    windows = Windows(split, seq_len or spec.dims.max_seq_len, loss_on)
    order = np.argsort(-windows.lengths, kind="stable")
    sums_P = torch.zeros(len(split.part_names), dtype=torch.float64)
    counts_P = torch.zeros(len(split.part_names), dtype=torch.int64)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(device, dtype):
            while len(order):
                longest = int(windows.lengths[order[0]])
                rows = batch_size or rows_at_once(spec.dims.vocab_size, longest, device)
                batch, order = windows.batch(order[:rows]), order[rows:]
                if int(batch.ids.max()) >= spec.dims.vocab_size:
                    raise DataError(
                        f"{split.name} has ids beyond the model's vocabulary ({spec.dims.vocab_size}); use the model's "
                        "tokenizer"
                    )
                targets_N = batch.targets[:, :longest].flatten()
                assert batch.target_parts is not None
                parts_N = batch.target_parts[:, :longest].flatten()[targets_N != IGNORED]
                logits_BTV = model(batch.ids[:, :longest].to(device))
                losses_N = F.cross_entropy(
                    logits_BTV.flatten(0, 1), targets_N.to(device), ignore_index=IGNORED, reduction="none"
                )[targets_N.to(device) != IGNORED]
                sums_P += torch.bincount(parts_N, losses_N.double().cpu(), minlength=len(sums_P))
                counts_P += torch.bincount(parts_N, minlength=len(counts_P))
    finally:
        model.train(was_training)
    count = int(counts_P.sum())
    if not count:
        raise DataError(f"{split.name} holds nothing to predict with loss_on {loss_on}; give more text")
    nats = float(sums_P.sum()) / count
    named = {name: (float(s), int(n)) for name, s, n in zip(split.part_names, sums_P, counts_P) if n}
    return PartsResult(
        nats=nats,
        bits_per_byte=split.bits_per_byte(nats * count) if loss_on == "all" else None,
        n_tokens=count,
        by_part={name: total / n for name, (total, n) in named.items()},
        tokens_by_part={name: n for name, (_, n) in named.items()},
    )
