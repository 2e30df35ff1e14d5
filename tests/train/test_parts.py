"""The loss of each part is the mean over that part's tokens, however the windows are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from headwise.data import Examples, Windows, load_examples
from headwise.errors import DataError, SettingsError
from headwise.model import build
from headwise.model.base import LanguageModel
from headwise.spec import parse
from headwise.train.evaluation import evaluate
from headwise.train.parts import evaluate_examples


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    rows = [
        f"<|prompt|>{'ab' * n} is?<|reasoning|>{'well ' * (n % 3)}so<|answer|>{n * 7}<|prompt|>!" for n in range(1, 24)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return load_examples(file, val_fraction=0.4)


def model_for(examples: Examples, line: str = "llama") -> LanguageModel:
    spec = parse(line).resolve(size="10k", vocab_size=examples.tokenizer.vocab_size, max_seq_len=64)
    return build(spec, seed=0)


@torch.no_grad()
def naive(model: LanguageModel, examples: Examples, seq_len: int) -> dict[str, float]:
    """By definition: one window at a time, one token at a time."""
    split, found = examples.val, {name: [] for name in examples.parts}
    windows = Windows(split, seq_len)
    for start, length in zip(windows.starts, windows.lengths):
        tokens = torch.from_numpy(split.array[start : start + length + 1].astype("int64"))
        logits_TV = model(tokens[None, :-1])[0]
        for t in range(length):
            loss = F.cross_entropy(logits_TV[t], tokens[t + 1])
            found[examples.parts[split.parts[start + t + 1]]].append(float(loss))
    return {name: sum(losses) / len(losses) for name, losses in found.items()}


@pytest.mark.parametrize("line", ["llama", "llama(attention=linear)"])
@pytest.mark.parametrize(("seq_len", "batch_size"), [(64, None), (64, 3), (9, 4)])
def test_each_part_has_the_mean_loss_of_its_tokens(
    examples: Examples, line: str, seq_len: int, batch_size: int | None
) -> None:
    model = model_for(examples, line).train()
    result = evaluate_examples(model, examples.val, seq_len=seq_len, batch_size=batch_size)
    wanted = naive(model.eval(), examples, seq_len)
    assert result.by_part == pytest.approx(wanted, rel=1e-5)
    assert list(result.by_part) == ["prompt", "reasoning", "answer"]
    assert result.n_tokens == examples.val.n_targets == sum(result.tokens_by_part.values())
    total = sum(result.by_part[name] * n for name, n in result.tokens_by_part.items())
    assert result.nats == pytest.approx(total / result.n_tokens)


def test_nothing_is_dropped_and_the_mode_is_left_as_it_was(examples: Examples) -> None:
    model = model_for(examples, "llama(dropout=0.5)").train()
    found = evaluate_examples(model, examples.val)
    assert model.training
    assert found == evaluate_examples(model.eval(), examples.val)
    assert not model.training


def test_a_loss_on_the_completion_leaves_the_prompts_out(examples: Examples) -> None:
    model = model_for(examples)
    everything = evaluate_examples(model, examples.val)
    completion = evaluate_examples(model, examples.val, loss_on="completion")
    assert completion.by_part == {name: everything.by_part[name] for name in ("reasoning", "answer")}
    assert completion.bits_per_byte is None


def test_plain_text_has_the_loss_that_evaluate_gives_it() -> None:
    """For a text of whole windows: the last one reads further back in `evaluate`."""
    from headwise.data import Tokens, load_dataset
    from headwise.data.examples import text_examples

    dataset = load_dataset()
    tokens = Tokens(dataset.val.array[: 64 * 20 + 1], 64 * 20 + 1)
    examples = load_examples()
    model = model_for(examples)
    result = evaluate_examples(model, text_examples(tokens), seq_len=64)
    wanted = evaluate(model, tokens, seq_len=64)
    assert result.nats == pytest.approx(wanted.nats, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(wanted.bits_per_byte, rel=1e-5)
    assert result.by_part == {"text": pytest.approx(wanted.nats, rel=1e-5)}


def test_ids_beyond_the_vocabulary_and_other_models_than_decoders_are_refused(examples: Examples) -> None:
    small = build(parse("llama").resolve(size="10k", vocab_size=4, max_seq_len=64), seed=0)
    with pytest.raises(DataError, match=r"beyond the model's vocabulary \(4\)"):
        evaluate_examples(small, examples.val)
    encoder = parse("transformer(architecture=encoder)").resolve(size="10k", vocab_size=99, max_seq_len=64)
    with pytest.raises(SettingsError, match="of a decoder, and this is an encoder"):
        evaluate_examples(build(encoder, seed=0), examples.val)
