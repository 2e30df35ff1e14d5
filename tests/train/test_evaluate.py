"""Evaluation: every target of the split once, whatever the batch; nothing disturbed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from headwise.data import Dataset
from headwise.errors import DataError
from headwise.model import build
from headwise.model.base import LanguageModel
from headwise.spec import parse
from headwise.train import evaluate


def model_for(dataset: Dataset, line: str, seq_len: int = 16, extra: int = 0) -> LanguageModel:
    return build(parse(line).resolve(vocab_size=dataset.tokenizer.vocab_size + extra, max_seq_len=seq_len))


def test_it_is_the_mean_over_all_targets_of_the_split(dataset: Dataset) -> None:
    """Written out the plain way: window after window, token after token; the last window reaches back to be full."""
    model = model_for(dataset, "gpt2(d_model=16, n_layers=1, n_heads=2)").eval()
    ids = torch.from_numpy(dataset.val.array.astype("int64"))
    losses = []
    with torch.no_grad():
        for wanted in range(0, len(ids) - 1, 16):
            start = min(wanted, len(ids) - 17)
            window = ids[start : start + 17]
            all_16 = F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none").tolist()
            losses += all_16[wanted - start :]
    result = evaluate(model, dataset.val)
    assert result.n_tokens == len(losses) == len(ids) - 1
    assert result.nats == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    # One character of this corpus is one byte; the first of them cannot be predicted and costs nothing.
    assert result.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / len(ids))


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder_decoder"])
def test_the_batch_size_does_not_matter(dataset: Dataset, architecture: str) -> None:
    line = "transformer" if architecture == "encoder_decoder" else f"gpt2(architecture={architecture})"
    spec = parse(line).replace(d_model=16, n_layers=1, n_heads=2)
    model = model_for(dataset, str(spec), extra=architecture == "encoder")
    results = [evaluate(model, dataset.val, batch_size=size) for size in (1, 7)]
    if architecture == "encoder":  # its masks are drawn by batch
        assert results[0].nats == pytest.approx(results[1].nats, rel=0.2)
        assert results[0].bits_per_byte is None
        return
    assert results[0].n_tokens == results[1].n_tokens
    assert results[0].nats == pytest.approx(results[1].nats, rel=1e-5)


def test_it_leaves_mode_gradients_and_random_state_alone(dataset: Dataset) -> None:
    model = model_for(dataset, "gpt2(d_model=16, n_layers=1, n_heads=2, dropout=0.5)").train()
    before = torch.get_rng_state()
    first, second = evaluate(model, dataset.val), evaluate(model, dataset.val)
    assert first == second  # no dropout
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ids_beyond_the_vocabulary_are_an_error_in_words(dataset: Dataset) -> None:
    model = build(parse("gpt2(d_model=16, n_layers=1, n_heads=2, vocab_size=9, max_seq_len=16)"))
    with pytest.raises(DataError, match=r"beyond the model's vocabulary .9.; use the model's tokenizer"):
        evaluate(model, dataset.val)
