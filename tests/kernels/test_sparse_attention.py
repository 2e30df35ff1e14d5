"""Patterns of keys and what is done to scores: definitions by brute force, fast against naive, identities, and cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headwise import kernels
from headwise.attention import Attention, AttentionSpec, Context
from headwise.cache import LayerCache
from headwise.errors import SpecError
from headwise.kernels.attention import naive, sdpa
from headwise.kernels.sparse_attention.naive import draws
from headwise.position.alibi import ALiBiEncoding, slopes
from headwise.registry import ATTENTION, get_attention


def sees(fields: dict[str, Any], i: int, j: int) -> bool:
    """Whether the query at i may see the key at j, of positions in one document, causality apart."""
    kind, distance = fields["kind"], abs(i - j)
    if kind == "strided":
        return distance < fields["stride"] or distance % fields["stride"] == 0
    if kind == "window":
        step = fields.get("dilation", 1)
        reachable = [n * step for n in range(fields["window"])]
        return distance in reachable or j < fields.get("sink_tokens", 0)
    if distance < fields["window"] or min(i, j) < fields["global_tokens"]:
        return True
    if kind == "longformer":
        return False
    size, later, earlier = fields["block_size"], max(i, j), min(i, j)
    return earlier // size in draws(later // size, fields["random_blocks"], fields["seed"])


@st.composite
def patterns(draw: st.DrawFn) -> dict[str, Any]:
    window, first = draw(st.integers(1, 40)), draw(st.integers(0, 30))
    return draw(
        st.sampled_from(
            [
                {"kind": "strided", "stride": draw(st.integers(1, 40))},
                {"kind": "window", "window": window, "dilation": draw(st.integers(2, 7))},
                {"kind": "window", "window": window, "sink_tokens": first},
                {"kind": "longformer", "window": window, "global_tokens": first},
                {
                    "kind": "bigbird", "window": window, "global_tokens": first, "seed": draw(st.integers(0, 3)),
                    "random_blocks": draw(st.integers(0, 4)), "block_size": draw(st.integers(1, 20)),
                },
            ]
        )
    )  # fmt: skip


def made(fields: dict[str, Any], **more: Any) -> Attention:
    torch.manual_seed(0)
    return get_attention(d_model=16, n_heads=4, **{"kv_heads": 2, **fields, **more}).double()


def inputs(T: int, B: int = 1) -> Tensor:
    return torch.randn(B, T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(T)) * 3


def documents(lengths: list[int]) -> Tensor:
    """Segment numbers [1,S] of documents side by side."""
    return torch.cat([torch.full((1, n), number) for number, n in enumerate(lengths)], 1)


# ---- the patterns ----


@given(patterns(), st.lists(st.integers(1, 60), min_size=1, max_size=3), st.booleans())
def test_a_query_sees_exactly_the_keys_of_its_pattern(fields: dict[str, Any], lengths: list[int], causal: bool) -> None:
    segments = documents(lengths)
    pair = (segments, segments) if len(lengths) > 1 else None
    _, weights = made(fields)(
        inputs(sum(lengths)), context=Context(causal=causal, segments=pair), return_attention_weights=True
    )
    places = [(number, position) for number, n in enumerate(lengths) for position in range(n)]
    expected = [[a == b and (j <= i or not causal) and sees(fields, i, j) for b, j in places] for a, i in places]
    assert torch.equal(weights[0] > 0, torch.tensor(expected).expand(4, -1, -1))


@given(st.integers(0, 200), st.integers(0, 8), st.integers(0, 5))
def test_draws_are_different_earlier_blocks(block: int, count: int, seed: int) -> None:
    drawn = draws(block, count, seed)
    assert len(set(drawn)) == len(drawn) == min(block, count)
    assert all(0 <= m < block for m in drawn)


def test_each_earlier_block_is_drawn_about_as_often_as_another() -> None:
    """Of 40 blocks, 3 at a time, in 4000 draws each should come 300 times, give or take 17 (one standard deviation)."""
    times = torch.zeros(40)
    for seed in range(4000):
        times[draws(40, 3, seed)] += 1
    assert times.min() > 300 - 5 * 17
    assert times.max() < 300 + 5 * 17


# ---- fast against naive ----


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    fields = draw(st.one_of(patterns(), st.just({"kind": "softmax"}), st.just({"kind": "window", "window": 70})))
    if fields["kind"] in ("softmax", "window"):
        fields = fields | {"softcap": draw(st.sampled_from([None, 2.0])), "sink": draw(st.booleans())}
    causal = draw(st.booleans())
    return {
        "fields": fields,
        "causal": causal,
        "T": draw(st.sampled_from([1, 2, 17, 64, 150, 600])),
        "past": draw(st.sampled_from([0, 1, 33, 100])) if causal else 0,
        "B": draw(st.integers(1, 2)),
        "segments": draw(st.booleans()),
        "mask": draw(st.sampled_from([None, None, "bool", "float"])),
        "alibi": draw(st.booleans()),
    }


@given(situations())
def test_fast_form_equals_the_naive_one_in_every_situation(case: dict[str, Any]) -> None:
    T, B, S = case["T"], case["B"], case["T"] + case["past"]
    layer = made(case["fields"])
    if layer.sink is not None:
        layer.sink.data = torch.tensor([-1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    segments = documents([S // 3, S - S // 3]).expand(B, S) if case["segments"] and S > 2 else None
    mask = {
        None: None,
        "bool": (torch.rand(B, 1, T, S, generator=generator) > 0.3) | torch.eye(S, dtype=torch.bool)[S - T :],
        "float": torch.randn(1, 4, T, S, generator=generator, dtype=torch.float64),
    }[case["mask"]]
    encoding = {"encoding": ALiBiEncoding(torch.tensor(slopes(4), dtype=torch.float64), T, S)} if case["alibi"] else {}
    x = inputs(S, B)

    def run() -> tuple[Tensor, ...]:
        cache = None
        if case["past"]:
            cache = LayerCache()
            with torch.no_grad():
                _, k, v = layer._heads(x[:, : S - T], Context())
                cache.append(k, v)
        pair = None if segments is None else (segments[:, S - T :], segments)
        new = x[:, S - T :].clone().requires_grad_()
        y, _ = layer(new, mask, context=Context(causal=case["causal"], segments=pair, cache=cache, **encoding))
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        wanted = [new, layer.wq.weight, layer.wv.weight, *([layer.sink] if layer.sink is not None else [])]
        return y, *torch.autograd.grad((y * weight).sum(), wanted)

    fast = run()
    with kernels.naive():
        expected = run()
    torch.testing.assert_close(fast, expected, atol=1e-9, rtol=1e-9)


@given(patterns(), st.integers(1, 130), st.booleans())
def test_tokens_decoded_one_by_one_are_those_of_the_full_pass(fields: dict[str, Any], T: int, alibi: bool) -> None:
    layer, x, cache, pieces = made(fields), inputs(T), LayerCache(), []
    m = torch.tensor(slopes(4), dtype=torch.float64)
    starts = [0, *range(T // 2 + 1, T)]
    with torch.no_grad():
        for start, stop in zip(starts, [*starts[1:], T]):
            encoding = {"encoding": ALiBiEncoding(m, stop - start, stop)} if alibi else {}
            pieces.append(layer(x[:, start:stop], context=Context(causal=True, cache=cache, **encoding))[0])
        encoding = {"encoding": ALiBiEncoding(m, T, T)} if alibi else {}
        full = layer(x, context=Context(causal=True, **encoding))[0]
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-9, rtol=1e-9)


def test_a_causal_longformer_is_a_window_with_sink_tokens() -> None:
    x, context = inputs(300), Context(causal=True)
    one = made({"kind": "longformer", "window": 20, "global_tokens": 5})(x, context=context)
    other = made({"kind": "window", "window": 20, "sink_tokens": 5})(x, context=context)
    torch.testing.assert_close(one, other)


# ---- what is done to the scores ----


@given(st.sampled_from([1, 5, 300]), st.booleans(), st.sampled_from([None, 3.0]), st.sampled_from([None, 40]))
def test_a_sink_takes_weight_that_no_value_gets(
    T: int, causal: bool, softcap: float | None, window: int | None
) -> None:
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(1, 2, T, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    how: dict[str, Any] = {"scale": 2.0, "causal": causal, "softcap": softcap, "window": window}
    sink = torch.tensor([0.5, -2.0], dtype=torch.float64)
    y, weights = naive.attention(q, k, v, sink_H=sink, **how)
    plain, all_weights = naive.attention(q, k, v, **how)
    assert (weights.sum(-1) < 1).all()
    # The others keep their proportions.
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), all_weights)
    torch.testing.assert_close(sdpa.attention(q, k, v, sink_H=sink, **how), y)
    torch.testing.assert_close(sdpa.attention(q, k, v, sink_H=sink - 100, **how), plain)
    torch.testing.assert_close(sdpa.attention(q, k, v, sink_H=sink + 100, **how), torch.zeros_like(plain))


def test_a_sink_is_one_more_key_with_its_own_score_and_no_value() -> None:
    q, k, v = (torch.randn(1, 1, n, 3, dtype=torch.float64) for n in (1, 4, 4))
    scores = torch.cat([torch.tensor([0.7], dtype=torch.float64), (0.5 * q @ k.mT).flatten()])
    expected = scores.softmax(0)[1:] @ v[0, 0]
    y = sdpa.attention(q, k, v, scale=0.5, sink_H=torch.tensor([0.7], dtype=torch.float64))
    torch.testing.assert_close(y.flatten(), expected)


@given(st.sampled_from([1, 5, 300]), st.booleans(), st.sampled_from([None, 40]))
def test_a_high_cap_is_none_and_a_low_one_makes_scores_equal(T: int, causal: bool, window: int | None) -> None:
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(1, 2, T, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    how: dict[str, Any] = {"scale": 2.0, "causal": causal, "window": window}
    plain = sdpa.attention(q, k, v, **how)
    torch.testing.assert_close(sdpa.attention(q, k, v, softcap=1e6, **how), plain, atol=1e-8, rtol=1e-8)
    mean = sdpa.attention(q * 0, k, v, **how)
    torch.testing.assert_close(sdpa.attention(q, k, v, softcap=1e-9, **how), mean, atol=1e-8, rtol=1e-8)


def test_a_capped_score_is_never_above_the_cap() -> None:
    """Weights of one query differ by no more than exp(2·cap)."""
    layer, x = made({"kind": "softmax", "softcap": 1.5}), 100 * inputs(50)
    _, weights = layer(x, return_attention_weights=True)
    assert (weights.amax(-1) / weights.amin(-1)).max() <= math.exp(3.0) * (1 + 1e-9)


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_a_gate_opens_and_closes_outputs(gate: str) -> None:
    """All gates open wide leave softmax attention; a head's gate closed leaves what the other heads give."""
    layer, x = made({"kind": "gated", "gate": gate}, bias=True), inputs(9)
    plain = made({"kind": "softmax"}, bias=True)
    plain.load_state_dict({name: t for name, t in layer.state_dict().items() if not name.startswith("wg")})
    torch.nn.init.zeros_(layer.wg.weight)
    layer.wg.bias.data.fill_(50.0)
    torch.testing.assert_close(layer(x)[0], plain(x)[0])
    width = layer.wg.out_features // 4
    layer.wg.bias.data[:width] = -50.0
    plain.wo.weight.data[:, :4] = 0.0
    torch.testing.assert_close(layer(x)[0], plain(x)[0])


def test_dilation_and_sink_tokens_together_are_refused() -> None:
    with pytest.raises(SpecError, match="dilation: 2 given with sink_tokens=3; only one"):
        made({"kind": "window", "window": 4, "dilation": 2, "sink_tokens": 3})


# ---- cost ----


class Scores(TorchDispatchMode):
    """Counts the scores that are formed: products of [·,T,E] with [·,E,S] and calls of the fused kernel."""

    def __init__(self, n_heads: int, width: int) -> None:
        super().__init__()
        self.n_heads, self.width, self.pairs = n_heads, width, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func)
        if "scaled_dot_product" in name:
            (n, heads, rows, _), keys = args[0].shape, args[1].shape[2]
            self.pairs += n * heads * rows * keys / self.n_heads
        elif "bmm" in name:
            (n, rows, inner), columns = args[0].shape, args[1].shape[2]
            self.pairs += n * rows * inner * columns / (2 * self.width * self.n_heads)  # scores, and what they weigh
        return func(*args, **(kwargs or {}))


COSTS = [
    ("window", {"window": 64}),
    ("window", {"window": 64, "sink_tokens": 8}),
    ("window", {"window": 32, "dilation": 4}),
    ("window", {"window": 200, "softcap": 9.0, "sink": True}),
    ("strided", {"stride": 32}),
    ("longformer", {"window": 64, "global_tokens": 16}),
    ("bigbird", {"window": 64, "global_tokens": 16, "random_blocks": 3, "block_size": 32}),
]


@pytest.mark.parametrize(("kind", "fields"), COSTS)
@pytest.mark.parametrize("causal", [True, False])
def test_scores_formed_are_those_of_the_pattern_but_for_the_blocks_edges(
    kind: str, fields: dict[str, Any], causal: bool
) -> None:
    layer = get_attention(kind, d_model=16, n_heads=2, **fields)

    def formed(T: int) -> float:
        with torch.no_grad(), Scores(2, 8) as counted:
            layer(torch.randn(1, T, 16), context=Context(causal=causal))
        return counted.pairs

    assert isinstance(layer.spec, AttentionSpec)
    for T in (1024, 4096):
        # Blocks of rows bring keys along that only some rows see: for the narrowest, as many again and half.
        assert formed(T) <= 4 * T * layer.spec.keys_seen(T, causal=causal)
    growth = 4**1.5 if kind == "strided" else 4.0
    assert formed(4096) <= 1.25 * growth * formed(1024)
    with kernels.naive(), torch.no_grad(), Scores(2, 8) as dense:
        layer(torch.randn(1, 1024, 16), context=Context(causal=causal))
    assert dense.pairs >= 1024**2, "the measure must see a score matrix where there is one"


@pytest.mark.parametrize(("kind", "fields"), [COSTS[1], COSTS[5], COSTS[6]])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_cost_what_each_costs_alone(kind: str, fields: dict[str, Any], causal: bool) -> None:
    """Tokens whose documents were looked up pair by pair once cost the square of the row's length."""
    layer = get_attention(kind, d_model=16, n_heads=2, **fields)

    def formed(B: int, T: int, segments: tuple[Tensor, Tensor] | None = None) -> float:
        with torch.no_grad(), Scores(2, 8) as counted:
            layer(torch.randn(B, T, 16), context=Context(causal=causal, segments=segments))
        return counted.pairs

    rows = torch.cat([documents([700, 1348]), documents([2048])])
    assert formed(2, 2048, (rows, rows)) == sum(formed(1, T) for T in (700, 1348, 2048)) < 2048**2
    short = documents([4] * 512)
    assert formed(1, 2048, (short, short)) > 2048**2 / 2, "hundreds of calls would cost more than they save"


def test_a_document_that_goes_on_after_another_is_one_document() -> None:
    layer = get_attention("longformer", d_model=16, n_heads=2, window=8, global_tokens=2)
    x, segments = torch.randn(1, 256, 16), torch.tensor([[0, 1, 0, 2]]).repeat_interleave(64, 1)
    context = Context(causal=True, segments=(segments, segments))
    with kernels.naive():
        wanted, _ = layer(x, context=context)
    torch.testing.assert_close(layer(x, context=context)[0], wanted)


@pytest.mark.parametrize(("kind", "fields"), COSTS)
def test_a_decoded_token_meets_only_the_keys_of_its_pattern(kind: str, fields: dict[str, Any]) -> None:
    layer, S = get_attention(kind, d_model=16, n_heads=2, **fields), 2047
    cache = LayerCache()
    cache.append(torch.randn(1, 2, S, 8), torch.randn(1, 2, S, 8))
    seen = sum(sees({"kind": kind, "seed": 0, **fields}, S, j) for j in range(S + 1))
    with torch.no_grad(), Scores(2, 8) as counted:
        layer(torch.randn(1, 1, 16), context=Context(causal=True, cache=cache))
    blocks = 2 * fields.get("block_size", 0)  # a window's first block and the global tokens' last are met whole
    assert counted.pairs <= seen + blocks + 1


@pytest.mark.parametrize(
    "kind", ["window(7)", "window(3, dilation=4)", "window(4, sink_tokens=5)", "window(4, sink_tokens=9)",
             "window(50, dilation=3)", "strided(1)", "strided(4)", "strided(6)", "strided(99)",
             "longformer(3, 2)", "longformer(5, 0)", "longformer(2, 40)", "longformer(99, 3)",
             "bigbird(3, 2, 2, block_size=4)", "bigbird(1, 0, 1, block_size=3)", "bigbird(6, 7, 9, block_size=2)"],
)  # fmt: skip
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [1, 6, 23])
def test_keys_seen_are_those_the_pattern_lets_through(kind: str, causal: bool, T: int) -> None:
    """In a decoder less half a window's width: the triangle of softmax counts as half the square, a window likewise."""
    from headwise.spec.grammar import read_value

    spec = ATTENTION.spec(read_value(kind))
    assert isinstance(spec, AttentionSpec)
    fields = spec.model_dump()
    pairs = sum(sees(fields, i, j) and (j <= i or not causal) for i in range(T) for j in range(T))
    if causal:
        step = fields.get("dilation", 1)
        width = fields.get("window", fields.get("stride", 0))
        pairs -= sum(min(width, len(range(rest, T, step))) for rest in range(step)) / 2
    assert T * spec.keys_seen(T, causal=causal) == pytest.approx(pairs)
