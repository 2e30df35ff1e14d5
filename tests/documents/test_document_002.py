"""One runnable example a module of document 002's course, each against its definition written out here.

Where the document is wrong, the docstring says so.
"""

from __future__ import annotations

import math
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import headwise as hw
from headwise.attention import Attention, Context
from headwise.blocks import KVCache, PagedAttention
from headwise.cache import LayerCache, RecurrentCache
from headwise.dims import Dims
from headwise.errors import HeadwiseError
from headwise.generate import stream_ids
from headwise.kernels.flash import online
from headwise.registry import ATTENTION

B, T, H, D = 2, 21, 4, 8
CAUSAL = Context(causal=True)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, T, H * D, dtype=torch.float64)


def layer_of(kind: str, **fields: Any) -> Attention:
    return hw.get_attention(kind, d_model=H * D, n_heads=H, **fields).double()


def heads(layer: Attention, x: Tensor) -> list[Tensor]:
    """Queries, keys and values [B,H,T,D] by the layer's own maps, as the course's modules split them."""
    maps = ((layer.wq, H), (layer.wk, layer.kv_heads), (layer.wv, layer.kv_heads))
    return [w(x).view(B, -1, n, D).transpose(1, 2) for w, n in maps]


def merged(layer: Attention, y: Tensor) -> Tensor:
    return layer.wo(y.transpose(1, 2).reshape(B, -1, H * D))


# ---- naive attention, and the whole model ----


def test_naive_attention(x: Tensor) -> None:
    """softmax(QKᵀ/√d)V under the triangular mask, and the weights on request."""
    layer = layer_of("softmax")
    q, k, v = heads(layer, x)
    scores = (q @ k.transpose(-2, -1) / math.sqrt(D)).masked_fill(torch.ones(T, T).triu(1) == 1, -math.inf)
    expected = merged(layer, scores.softmax(-1) @ v)
    ours, weights = layer(x, context=CAUSAL, return_attention_weights=True)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(weights, scores.softmax(-1))
    fused, none = layer(x, context=CAUSAL)
    torch.testing.assert_close(fused, expected)
    assert none is None


def test_the_original_transformer_trains_and_answers() -> None:
    """Encoder, decoder and cross-attention with sinusoidal positions: it learns to say its input backwards."""
    model = hw.build("transformer(d_model=48, n_layers=1, n_heads=4, vocab_size=16, max_seq_len=16, dropout=0)", seed=1)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def step(n: int) -> float:
        given = torch.randint(1, 16, (n, 3), generator=generator)
        said = torch.cat([torch.zeros(n, 1, dtype=torch.int64), given.flip(1)], 1)
        logits = model(said[:, :-1], encoder_ids=given)
        loss = F.cross_entropy(logits.flatten(0, 1), said[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.item()

    losses = [step(64) for _ in range(60)]
    assert losses[0] > math.log(15)  # no better than a guess among 15 symbols
    assert sum(losses[-10:]) / 10 < 0.5 * math.log(15)


# ---- flash attention ----


def test_flash_attention_in_tiles_is_attention() -> None:
    """The running maximum and sum of the course's kernel, in plain torch; T is no multiple of the tile."""
    q, k, v = torch.randn(3, B, H, T, D, dtype=torch.float64).unbind()
    scores = (q @ k.transpose(-2, -1) / math.sqrt(D)).masked_fill(torch.ones(T, T).triu(1) == 1, -math.inf)
    for tile in (4, 8, 32):
        y, sums = online.attention(q, k, v, scale=D**-0.5, rows=tile, columns=tile)
        torch.testing.assert_close(y, scores.softmax(-1) @ v)
        torch.testing.assert_close(sums, scores.logsumexp(-1))


# ---- KV cache ----


def test_kv_cache_answers_as_the_whole_pass_does(x: Tensor) -> None:
    """Token by token with the keys and values kept, or in pieces of any size. The document calls the saving
    exponential; it is from O(T²) to O(T) projections in all, against memory that grows with every token."""
    layer = layer_of("softmax")
    whole, _ = layer(x, context=CAUSAL)
    for pieces in ([1] * T, [5, 1, 10, 5]):
        cache = layer.new_cache()
        assert isinstance(cache, LayerCache)
        with torch.no_grad():
            parts = [layer(piece, context=Context(causal=True, cache=cache))[0] for piece in x.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        assert cache.length == T
    cache.crop(0)
    assert cache.length == 0


def test_kv_cache_grows_with_every_token() -> None:
    """2·H·D numbers a token and layer, where the scores of all tokens anew would be T² a head."""
    line = f"gpt2(d_model={H * D}, n_layers=3, n_heads={H}, vocab_size=11, max_seq_len=64)"
    held = [hw.count(line, context).kv_cache_bytes for context in (16, 32, 64)]
    assert held == [2 * 3 * 2 * H * D * context for context in (16, 32, 64)]  # two bytes a number


def test_kv_cache_of_the_course_row_by_row(x: Tensor) -> None:
    """`update`, `get` and `clear`: each row at its own position, as requests of unequal length come."""
    layer = layer_of("softmax")
    _, k, v = heads(layer, x)
    cache = KVCache(batch_size=B, max_seq_len=T, n_heads=H, head_dim=D, dtype=torch.float64)
    cache.update(0, 0, k[0, :, :9], v[0, :, :9])
    cache.update(1, 0, k[1], v[1])
    keys, values = cache.update(batch_idx=0, start_pos=9, k=k[0, :, 9:12], v=v[0, :, 9:12])
    assert torch.equal(keys, k[0, :, :12])
    assert torch.equal(values, v[0, :, :12])
    assert torch.equal(cache.get(1)[0], k[1])
    assert torch.equal(cache.get(1, end_pos=4)[1], v[1, :, :4])
    for batch_idx, start_pos in ((2, 0), (0, 13), (1, 1)):
        with pytest.raises(HeadwiseError, match=r"batch_idx|start_pos"):
            cache.update(batch_idx, start_pos, k[0], v[0])
    with pytest.raises(HeadwiseError, match=r"should both be \[4,T,8\]"):
        cache.update(0, 0, k[0, :2], v[0])
    cache.clear(1)
    assert [cache.get(row)[0].shape[1] for row in range(B)] == [12, 0]
    cache.clear()
    assert cache.get(0)[0].shape[1] == 0


# ---- paged attention ----


@pytest.mark.parametrize("new", [None, 1, 4])
def test_paged_attention_is_attention_wherever_the_blocks_lie(x: Tensor, new: int | None) -> None:
    """Rows of unequal length in blocks strewn over a pool; three dimensions ask for one token, four for several."""
    layer, block_size, lengths = layer_of("gqa", kv_heads=2), 4, [21, 10]
    q, k, v = (t.detach() for t in heads(layer, x))
    blocks = torch.randperm(12)
    tables = torch.zeros(B, 6, dtype=torch.int32)
    key_cache, value_cache = (torch.full((12, block_size, 2, D), math.nan, dtype=torch.float64) for _ in range(2))
    for row, length in enumerate(lengths):
        for at in range(length):
            block = tables[row, at // block_size] = blocks[6 * row + at // block_size]
            key_cache[block, at % block_size] = k[row, :, at]
            value_cache[block, at % block_size] = v[row, :, at]
    last = torch.stack([q[row, :, n - (new or 1) : n] for row, n in enumerate(lengths)])
    query = last[:, :, 0] if new is None else last
    context_lens = torch.tensor(lengths, dtype=torch.int32)
    y = PagedAttention()(query, key_cache, value_cache, tables, context_lens, block_size, max(lengths))
    assert y.shape == query.shape
    scores = (q @ k.repeat_interleave(H // 2, 1).transpose(-2, -1) / math.sqrt(D)).masked_fill(
        torch.ones(T, T).triu(1) == 1, -math.inf
    )
    whole = scores.softmax(-1) @ v.repeat_interleave(H // 2, 1)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(y[row].view(H, -1, D), whole[row, :, n - (new or 1) : n])
    with pytest.raises(HeadwiseError, match="block_size: given 8"):
        PagedAttention()(query, key_cache, value_cache, tables, context_lens, 8, max(lengths))


# ---- grouped queries ----


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_query_attention(x: Tensor, kv_heads: int) -> None:
    """Groups of queries share keys and values; one group a head is plain attention. (The document describes K = 1.)"""
    layer = layer_of("gqa", kv_heads=kv_heads)
    q, k, v = heads(layer, x)
    outputs = []
    for head in range(H):
        shared = head * kv_heads // H
        scores = q[:, head] @ k[:, shared].transpose(-2, -1) / math.sqrt(D)
        scores = scores.masked_fill(torch.ones(T, T).triu(1) == 1, -math.inf)
        outputs.append(scores.softmax(-1) @ v[:, shared])
    torch.testing.assert_close(layer(x, context=CAUSAL)[0], merged(layer, torch.stack(outputs, 1)))
    assert layer.wk.weight.numel() == layer.wv.weight.numel() == H * D * kv_heads * D


# ---- linear attention ----


def linear_by_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """S_t = S_{t−1} + φ(k_t) v_tᵀ, z_t = z_{t−1} + φ(k_t), y_t = φ(q_t) S_t / φ(q_t)·z_t with φ = ELU + 1."""
    phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
    state, sums, rows = q.new_zeros(B, H, D, D), q.new_zeros(B, H, D), []
    for t in range(q.shape[2]):
        state = state + phi_k[:, :, t, :, None] * v[:, :, t, None, :]
        sums = sums + phi_k[:, :, t]
        above = (phi_q[:, :, t, None, :] @ state).squeeze(2)
        rows.append(above / (phi_q[:, :, t] * sums).sum(-1, keepdim=True))
    return torch.stack(rows, 2)


def test_linear_attention_three_ways(x: Tensor) -> None:
    """Recurrent as written here, parallel with weights φ(q)·φ(k), chunked as trained: one result. The order of the
    products makes it O(T·D²); the document prints O(n²)."""
    layer = layer_of("linear")
    q, k, v = heads(layer, x)
    expected = merged(layer, linear_by_rows(q, k, v))
    torch.testing.assert_close(layer(x, context=CAUSAL)[0], expected)
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1)).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(merged(layer, weights @ v), expected)
    both_ways = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1)
    both_ways = both_ways / both_ways.sum(-1, keepdim=True)
    torch.testing.assert_close(layer(x)[0], merged(layer, both_ways @ v))


def test_linear_attention_decodes_from_a_state_that_does_not_grow(x: Tensor) -> None:
    layer = layer_of("linear")
    whole, _ = layer(x, context=CAUSAL)
    cache, sizes, parts = layer.new_cache(), [], []
    assert isinstance(cache, RecurrentCache)
    with torch.no_grad():
        for token in x.split(1, dim=1):
            parts.append(layer(token, context=Context(causal=True, cache=cache))[0])
            sizes.append(cache.n_bytes)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert len(set(sizes)) == 1


def test_linear_attention_costs_what_is_linear() -> None:
    linear, softmax = ATTENTION.spec("linear"), ATTENTION.spec("softmax")
    dims = Dims(H * D, H)
    costs = {
        spec.kind: [spec.flops_per_token(dims, n, causal=True) for n in (1024, 2048)] for spec in (linear, softmax)
    }
    assert costs["linear"][0] == costs["linear"][1]  # a token's cost, whatever came before
    assert costs["softmax"][1] > 1.8 * costs["softmax"][0]


# ---- sparse attention ----


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("w", [0, 3, 50])
def test_sparse_attention_to_a_local_window(x: Tensor, w: int, causal: bool) -> None:
    """The course's pattern keeps |i − j| ≤ w, which is a window of w + 1 here, its own token counted (as Mistral
    does). Its code makes all T² scores and hides most; ours makes those of the window."""
    layer = layer_of("window", window=w + 1)
    q, k, v = heads(layer, x)
    distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]
    hidden = (distance.abs() > w) | (causal & (distance < 0))
    scores = (q @ k.transpose(-2, -1) / math.sqrt(D)).masked_fill(hidden, -math.inf)
    torch.testing.assert_close(layer(x, context=Context(causal=causal))[0], merged(layer, scores.softmax(-1) @ v))


# ---- RoPE ----


def test_rope_scores_tell_only_how_far_apart_two_tokens_are() -> None:
    """f(q,m)·f(k,n) = f(q,0)·f(k,n−m), in both pairings, and the pairs turn as the complex numbers they are."""
    for pairing in ("half", "interleaved"):
        position = hw.get_position("rope", d_model=D, n_heads=1, pairing=pairing)
        encoding = position.encode(torch.arange(40), 40, D)
        q, k = torch.randn(2, D, dtype=torch.float64)
        at_q, at_k = (encoding.rotate(t.expand(1, 1, 40, D))[0, 0] for t in (q, k))
        for m, n in ((3, 3), (5, 30), (12, 37)):
            assert (at_q[m] @ at_k[n]).item() == pytest.approx((at_q[0] @ at_k[n - m]).item())
        pairs = q.view(2, -1).T if pairing == "half" else q.view(-1, 2)
        theta = 10000.0 ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)
        turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(
            torch.ones(D // 2, dtype=torch.float64), 7 * theta
        )
        expected = torch.stack([turned.real, turned.imag], 0 if pairing == "half" else -1).flatten()
        torch.testing.assert_close(at_q[7], expected)


# ---- all of it in one model ----


@pytest.mark.parametrize("attention", ["softmax", "gqa(kv_heads=2)", "window(6)", "linear"])
def test_a_model_generates_with_its_cache_what_it_would_without(attention: str) -> None:
    """Greedy: at every step the likeliest token of the whole pass over everything so far."""
    line = f"llama(d_model={H * D}, n_layers=2, n_heads={H}, vocab_size=23, max_seq_len=64, attention={attention})"
    model = hw.build(line, seed=4).eval()
    prompt = [3, 1, 4, 1, 5]
    ids = list(islice(stream_ids(model, prompt, max_new_tokens=20, temperature=0), 20))
    so_far = list(prompt)
    with torch.no_grad():
        for token in ids:
            assert token == model(torch.tensor([so_far]))[0, -1].argmax().item()
            so_far.append(token)
    assert len(ids) == 20


def test_every_module_of_the_course_keeps_less_or_costs_less_than_plain_attention() -> None:
    """What each is for, in numbers: cache a token and FLOPs a token at 4096 tokens, C = 512, 8 heads."""
    dims = Dims(512, 8)

    def spec(kind: str, **fields: Any) -> Any:
        return ATTENTION.spec({"kind": kind, **fields})

    plain, grouped, local, linear = spec("softmax"), spec("gqa", kv_heads=2), spec("window", window=256), spec("linear")
    assert plain.kv_numbers_per_token(dims) == 4 * grouped.kv_numbers_per_token(dims)
    assert local.tokens_cached(4096) == 256
    assert linear.kv_numbers_per_token(dims) == 0
    assert linear.state_numbers(dims) == 8 * 64 * 65
    costs = [each.flops_per_token(dims, 4096, causal=True) for each in (plain, grouped, local, linear)]
    assert all(a > b for a, b in pairwise(costs))
