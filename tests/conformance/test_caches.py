"""Promise 3 for every kind of cache: decoding in any chunking is the full pass, or one clear line says why not."""

from __future__ import annotations

import random

import pytest
import torch
from conformance_lines import CAUSAL, WIDTHS, model_of, tokens
from torch import Tensor

from headwise.cache import ModelCache
from headwise.errors import HeadwiseError
from headwise.model.base import LanguageModel

T = 41
EXACT = {
    "auto": {"slack": 2, "checkpoints": 1},
    "contiguous": {},
    "static": {"max_len": T},
    "rolling": {},
    "paged": {"block_size": 4},
}
ROUNDED = {"int8": {"group_size": 8}, "int4": {"group_size": 8}}
# Feed-forwards and norms see tokens one by one and leave no trace in a cache.
LINES = [line for line in CAUSAL if ", ffn=" not in line and ", norm=" not in line]


def short_line(line: str) -> str:
    return line.partition("max_seq_len=1100, ")[2] or line.partition("(")[0]


def made(model: LanguageModel, kind: str, options: dict[str, int]) -> ModelCache | None:
    """A cache of a kind, or None where the kind says in one line that it cannot serve the model's layers."""
    try:
        return model.new_cache(kind, **options)
    except HeadwiseError as error:
        refusal = str(error)
    assert "use kind='auto'" in refusal
    assert "\n" not in refusal
    return None


def decoded(model: LanguageModel, ids: Tensor, cache: ModelCache, seed: int) -> Tensor:
    """The logits of chunks of random sizes, side by side."""
    rng, pieces, start = random.Random(seed), [], 0
    while start < ids.shape[1]:
        stop = min(ids.shape[1], start + rng.choice([1, 1, 2, 7, 19]))
        pieces.append(model(ids[:, start:stop], cache=cache))
        start = stop
        assert cache.length == start
    return torch.cat(pieces, 1)


@torch.no_grad()
@pytest.mark.parametrize("cached_line", LINES, ids=short_line)
def test_each_kind_decodes_as_the_full_pass(cached_line: str) -> None:
    model, ids = model_of(cached_line), tokens(2, T)
    full = model(ids)
    served = []
    for seed, (kind, options) in enumerate(EXACT.items()):
        cache = made(model, kind, options)
        if cache is None:
            continue
        torch.testing.assert_close(decoded(model, ids, cache, seed), full, atol=1e-5, rtol=1e-5)
        report = cache.report()
        assert 0 < report.used_bytes <= report.n_bytes == sum(layer.n_bytes for layer in cache.layers)
        served.append(kind)
    assert {"auto", "contiguous", "static"} <= set(served)


@torch.no_grad()
@pytest.mark.parametrize("cached_line", LINES, ids=short_line)
def test_rounded_keys_and_values_do_not_depend_on_the_chunking(cached_line: str) -> None:
    """Logits come near those of exact keys and values, nearer in 8 bits; and the same however the text is cut up: in
    float64, where it is not chance on which side of a step a number falls."""
    model, ids = model_of(cached_line, std=0.1).double(), tokens(2, 30)
    full, errors = model(ids), []
    for kind, options in ROUNDED.items():
        logits = decoded(model, ids, model.new_cache(kind, **options), 0)
        again = decoded(model, ids, model.new_cache(kind, **options), 1)
        torch.testing.assert_close(again, logits, atol=1e-6, rtol=1e-6)
        errors.append((logits - full).norm() / full.norm())
    assert errors[0] < 0.02
    assert errors[0] < errors[1] + 1e-6 < 0.2


@torch.no_grad()
@pytest.mark.parametrize("cached_line", LINES, ids=short_line)
def test_left_padding_reorder_and_fork_in_each_kind(cached_line: str) -> None:
    """A batch of unequal lengths, padded on the left, whose rows are exchanged and which goes on in two ways."""
    model = model_of(cached_line)
    long, brief = tokens(1, 30), tokens(1, 21, seed=1)
    ids = torch.cat([long, torch.cat([tokens(1, 9, seed=2), brief], 1)])
    segments = torch.zeros(2, 30, dtype=torch.long)
    segments[1, :9] = -1
    more = tokens(2, 8, seed=3)
    wanted = [model(torch.cat([text, more[row : row + 1]], 1))[:, -8:] for row, text in enumerate((brief, long))]
    for kind in ("auto", "rolling", "paged"):
        cache = made(model, kind, EXACT[kind])
        if cache is None:
            continue
        model(ids[:, :25], segments=segments[:, :25], cache=cache)
        model(ids[:, 25:], cache=cache)
        cache.reorder(torch.tensor([1, 0]))
        other = cache.fork()
        model(tokens(2, 3, seed=4), cache=other)
        for each in (cache.fork(), cache):
            pieces = [model(more[:, i : i + 2], cache=each) for i in range(0, 8, 2)]
            torch.testing.assert_close(torch.cat(pieces, 1), torch.cat(wanted), atol=1e-5, rtol=1e-5)
        assert other.length == 33


def check_last(model: LanguageModel, **more: Tensor) -> None:
    """A prompt, then three tokens and one: the last token's logits asked for alone are those among all."""
    ids, cache, stop = tokens(2, 21), model.new_cache(), 0
    full = model(ids, **more)
    for n in (17, 3, 1):
        stop += n
        last = model(ids[:, stop - n : stop], cache=cache, last=True, **more)
        torch.testing.assert_close(last, full[:, stop - 1 : stop], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_last_token_alone(causal_line: str) -> None:
    check_last(model_of(causal_line))


@torch.no_grad()
@pytest.mark.parametrize("order", ["pre", "post", "sandwich", "reordered"])
def test_the_last_token_alone_looks_at_its_own_part_of_what_was_read(order: str) -> None:
    """Cross-attention goes by segments, which the last token alone has to bring along."""
    model = model_of(f"transformer({WIDTHS}, order={order})")
    check_last(model, encoder_ids=tokens(2, 23, seed=5))
    parts = torch.arange(21).ge(12).long().expand(2, -1)
    read = {"encoder_ids": tokens(2, 9, seed=5), "encoder_segments": torch.arange(9).ge(4).long().expand(2, -1)}
    full = model(tokens(2, 21), segments=parts, **read)
    last = model(tokens(2, 21), segments=parts, cache=model.new_cache(), last=True, **read)
    torch.testing.assert_close(last, full[:, -1:], atol=1e-5, rtol=1e-5)
    other = model(tokens(2, 21), segments=parts, **read | {"encoder_segments": torch.zeros(2, 9, dtype=torch.long)})
    assert not torch.allclose(last, other[:, -1:], atol=1e-3)
