"""Each kind of cache by itself: what it keeps and costs, what it refuses, and how it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.cache import (
    LayerCache,
    ModelCache,
    OutOfBlocks,
    PagedModelCache,
    PagedPool,
    QuantisedCache,
    RecurrentCache,
    RollingCache,
    StaticCache,
)
from headwise.errors import HeadwiseError, SettingsError
from headwise.model import build
from headwise.model.base import LanguageModel

WIDTHS = "d_model=16, n_layers=2, n_heads=4, vocab_size=13, max_seq_len=64"


def model_of(attention: str = "softmax(kv_heads=2)", **more: str) -> LanguageModel:
    fields = "".join(f", {name}={value}" for name, value in more.items())
    return build(f"llama({WIDTHS}, attention={attention}{fields})", seed=3).eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 13, shape, generator=torch.Generator().manual_seed(seed))


def keys(T: int, seed: int = 0, B: int = 1) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, B, 2, T, 4, generator=torch.Generator().manual_seed(seed)).unbind()
    return k, v


# ---- how a cache is asked for ----


def test_auto_gives_each_layer_its_own_kind() -> None:
    lines = {
        "softmax": "contiguous",
        "window(5)": "rolling",
        "longformer(5, 2)": "rolling",
        "mla": "latent",
        "tva(2)": "latent",
        "bigbird(5, 1, 1, block_size=4)": "contiguous",
        "deltanet": "recurrent",
        "pattern(window(5), linear)": "rolling and recurrent",
    }
    for attention, kinds in lines.items():
        assert model_of(attention).new_cache().report().kind == kinds, attention


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("pagd", {}, r"unknown cache kind 'pagd' \(did you mean 'paged'\?\); allowed: auto, contiguous"),
        ("paged", {"blocksize": 4}, r"option of a paged cache 'blocksize' \(did you mean 'block_size'\?\)"),
        ("contiguous", {"max_len": 4}, "a contiguous cache has no option 'max_len'"),
        ("static", {"max_len": 0}, "max_len: given 0, should be an integer of at least 1"),
        ("paged", {"block_size": 2.5}, "block_size: given 2.5, should be an integer"),
        ("int4", {"group_size": 5}, "group_size: given 5, should be even"),
        ("rolling", {}, "rolling cache: softmax looks at every token"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        model_of().new_cache(kind, **options)


def test_a_state_is_neither_paged_nor_rolled() -> None:
    for kind in ("paged", "rolling"):
        with pytest.raises(SettingsError, match=f"{kind} cache: .* keeps one state"):
            model_of("pattern(window(4), linear)").new_cache(kind)
    with pytest.raises(SettingsError, match="ask the model for it"):
        model_of().stack.blocks[0].attention.new_cache("paged")  # type: ignore[union-attr, operator, index]


# ---- contiguous ----


def test_a_growing_cache_reports_its_spare_room() -> None:
    cache = LayerCache()
    cache.append(*keys(40))
    assert cache.n_bytes == cache.used_bytes == 2 * 2 * 40 * 4 * 4
    cache.append(*keys(1))
    assert (cache.used_bytes, cache.n_bytes) == (2 * 2 * 41 * 4 * 4, 2 * 2 * 80 * 4 * 4)
    assert cache.report().waste == pytest.approx(39 / 80)


def test_a_static_cache_never_moves_and_says_when_it_is_full() -> None:
    cache = StaticCache(max_len=6)
    first, _ = cache.append(*keys(3))
    later, _ = cache.append(*keys(3, seed=1))
    assert first.data_ptr() == later.data_ptr()
    assert cache.n_bytes == 2 * 2 * 6 * 4 * 4
    with pytest.raises(HeadwiseError, match="room for max_len=6 tokens cannot hold 7"):
        cache.append(*keys(1))
    assert cache.length == 6
    cache.crop(2)
    cache.append(*keys(4))


# ---- rolling ----


@pytest.mark.parametrize("first", [0, 3])
def test_a_rolling_cache_keeps_the_window_and_the_sinks(first: int) -> None:
    """However the tokens came; and each pass is handed at least what its tokens can see, in order, with its places."""
    cache, (k, v), window, at = RollingCache(window=5, first=first), keys(200), 5, 0
    for n in [1, 1, 30, *[1] * 100, 7, 1, 60]:
        held, _ = cache.append(k[:, :, at : at + n], v[:, :, at : at + n])
        places = torch.arange(at + n) if cache.places is None else cache.places
        assert torch.equal(held, k[:, :, places])
        for query in range(at, at + n):
            seen = {j for j in range(query + 1) if query - j < window or j < first}
            assert seen <= set(places.tolist())
        at += n
        assert cache.used_bytes <= (window + first + 16 + 5) * 2 * 2 * 4 * 4
        assert cache.length == at
    cache.append(*keys(60))
    assert cache.used_bytes == (window + first) * 2 * 2 * 4 * 4


def test_a_rolling_cache_can_be_cropped_as_far_as_its_slack() -> None:
    model, ids = model_of("window(4, sink_tokens=1)"), tokens(1, 50)
    with torch.no_grad():
        full = model(ids)
        cache = model.new_cache(slack=6)
        model(ids[:, :40], cache=cache)
        with pytest.raises(HeadwiseError, match=r"cannot be cropped to 33: .* crop to 34 at least or to 0"):
            cache.crop(33)
        assert cache.length == 40
        cache.crop(34)
        torch.testing.assert_close(model(ids[:, 34:], cache=cache), full[:, 34:])
        cache.crop(0)
        torch.testing.assert_close(model(ids, cache=cache), full)


def test_sinks_are_those_of_the_document_at_hand() -> None:
    """Two documents in a row: once the second has begun, the first one's sinks can go and its own must stay."""
    model = model_of("window(4, sink_tokens=2)")
    a, b = tokens(1, 15), tokens(1, 70 - 15, seed=1)
    segments = torch.cat([torch.zeros(1, 15), torch.ones(1, 55)], 1).long()
    with torch.no_grad():
        alone, cache, pieces = model(b), model.new_cache(), []
        for at in range(70):
            pieces.append(model(torch.cat([a, b], 1)[:, at : at + 1], segments=segments[:, at : at + 1], cache=cache))
    torch.testing.assert_close(torch.cat(pieces[15:], 1), alone, atol=1e-5, rtol=1e-5)


# ---- a state ----


def test_a_state_goes_back_to_where_a_pass_ended() -> None:
    model, ids = model_of("linear"), tokens(1, 30)
    with torch.no_grad():
        full, cache = model(ids), model.new_cache(checkpoints=2)
        one = model.new_cache()
        model(ids[:, :5], cache=one)
        for start, stop in ((0, 4), (4, 10), (10, 14), (14, 20)):
            model(ids[:, start:stop], cache=cache)
        assert cache.n_bytes == 3 * one.n_bytes
        with pytest.raises(HeadwiseError, match="crop to 10, 14 or to 0"):
            cache.crop(12)
        cache.crop(14)
        torch.testing.assert_close(model(ids[:, 14:], cache=cache), full[:, 14:])
        cache.crop(10)
        torch.testing.assert_close(model(ids[:, 10:], cache=cache), full[:, 10:])
    layer = one.layers[0]
    assert isinstance(layer, RecurrentCache)
    with pytest.raises(HeadwiseError, match="crop to 0 and feed"):
        one.crop(3)


# ---- int8, int4 ----


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_come_back_within_half_a_step(bits: int, symmetric: bool) -> None:
    """|x − x̂| ≤ s/2, s the group's step; half precision of scale and zero adds a thousandth of the largest number."""
    x = torch.randn(2, 3, 50, 12) * torch.logspace(-2, 2, 50)[:, None] + 3
    cache = QuantisedCache(bits, group_size=4, symmetric=symmetric)
    (held,) = cache.append(x)
    groups = x.unflatten(-1, (-1, 4))
    if symmetric:
        step = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    else:
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / (2**bits - 1)
    allowed = step / 2 + 2e-3 * groups.abs().amax(-1, keepdim=True)
    assert ((held.unflatten(-1, (-1, 4)) - groups).abs() <= allowed).all()
    assert cache.n_bytes == 2 * 3 * 50 * (12 * bits // 8 + 3 * (2 if symmetric else 4))


def test_a_width_the_groups_do_not_divide_and_tiny_or_huge_numbers() -> None:
    for size in (0.0, 1e-8, 1e4):
        x = size * torch.randn(1, 2, 5, 7)
        for bits in (8, 4):
            (held,) = QuantisedCache(bits, group_size=4).append(x)
            assert held.shape == x.shape
            assert held.isfinite().all()
            assert (held - x).abs().max() <= 0.1 * size + 1e-4


def test_rounded_caches_cost_what_the_formula_says() -> None:
    model, ids = build("llama(d_model=256, n_layers=1, n_heads=4, vocab_size=13, max_seq_len=64)"), tokens(1, 64)
    costs = {}
    with torch.no_grad():
        for kind in ("contiguous", "int8", "int4"):
            cache = model.new_cache(kind)
            model(ids, cache=cache)
            costs[kind] = cache.n_bytes / (64 * 2 * 4)  # a token, of keys or values, and a head
    assert costs == {"contiguous": 256, "int8": 68, "int4": 40}


# ---- paged ----


def test_rows_of_unequal_length_step_together() -> None:
    """Prompts one by one, then a token a row for all: each as if it were alone, on every code that stands alone."""
    lines = [("softmax(kv_heads=2)", "rope"), ("w2", "none"), ("window(3)", "alibi"), ("mla", "rope")]
    for attention, position in [*lines, ("softmax(sink=true)", "alibi"), ("strided(3)", "learned")]:
        model = model_of(attention, position=position)
        texts = [tokens(1, n, seed=n) for n in (3, 17, 8)]
        pool = PagedPool(n_layers=2, num_blocks=40, block_size=4)
        with torch.no_grad():
            rows = []
            for text in texts:
                rows.append(pool.manager.allocate())
                model(text[:, :-2], cache=pool.cache([rows[-1]]))
            cache = pool.cache(rows)
            steps = [model(torch.stack([text[0, at] for text in texts])[:, None], cache=cache) for at in (-2, -1)]
            for row, text in enumerate(texts):
                torch.testing.assert_close(torch.cat(steps, 1)[row], model(text)[0, -2:], atol=1e-5, rtol=1e-5)
        assert cache.lengths == [3, 17, 8]


def test_a_scheduler_may_keep_the_tables_itself() -> None:
    model, ids, pool = model_of(), tokens(1, 11), PagedPool(2, num_blocks=8, block_size=4)
    sequence = pool.manager.allocate()
    with torch.no_grad():
        for start, stop in ((0, 5), (5, 11)):
            pool.copy(pool.manager.append(sequence, ids[0, start:stop].tolist()))
            tables = torch.tensor([sequence.block_table], dtype=torch.int32)
            cache = PagedModelCache(pool, tables, torch.tensor([start], dtype=torch.int32))
            y = model(ids[:, start:stop], cache=cache)
            assert cache.context_lens.tolist() == [stop]
        torch.testing.assert_close(y, model(ids)[:, 5:])
        with pytest.raises(HeadwiseError, match="13 tokens do not fit 3 blocks of 4"):
            model(ids[:, :2], cache=cache)
    for change in (cache.fork, lambda: cache.reorder(torch.tensor([0]))):
        with pytest.raises(HeadwiseError, match="fork its sequences"):
            change()


def test_prompts_that_begin_alike_share_blocks_and_are_not_computed_again() -> None:
    model, pool = model_of(), PagedPool(2, num_blocks=16, block_size=4)
    prompt = tokens(1, 14)
    with torch.no_grad():
        first = pool.cache([pool.manager.allocate()])
        model(prompt, cache=first)
        pool.manager.commit(first.sequences[0])
        other = torch.cat([prompt[:, :10], tokens(1, 6, seed=1)], 1)
        sequence = pool.manager.allocate(other[0].tolist())
        assert sequence.num_cached_tokens == 8
        y = model(other[:, 8:], cache=pool.cache([sequence]))
        torch.testing.assert_close(y, model(other)[:, 8:])
    assert sequence.block_table[:2] == first.sequences[0].block_table[:2]


def test_tokens_with_segments_are_not_shared_by_their_ids() -> None:
    """Their keys depend on the segments too."""
    model, pool, ids = model_of(), PagedPool(2, num_blocks=16, block_size=4), tokens(1, 13)
    cache = pool.cache()
    segments = (torch.arange(13) >= 3).long()[None]
    with torch.no_grad():
        model(ids, segments=segments, cache=cache)
    pool.manager.commit(cache.sequences[0])
    assert pool.manager.allocate(ids[0].tolist()).num_cached_tokens == 0


def test_a_pool_of_its_own_grows_and_one_of_fixed_size_says_when_it_is_full() -> None:
    model, ids = model_of(), tokens(2, 40)
    with torch.no_grad():
        cache = model.new_cache("paged", block_size=4, num_blocks=7)
        model(ids[:, :9], cache=cache)
        with pytest.raises(OutOfBlocks, match="2 blocks are needed and 1 are free"):
            model(ids[:, 9:13], cache=cache)
        assert cache.length == 9
        torch.testing.assert_close(model(ids[:, 9:12], cache=cache), model(ids[:, :12])[:, 9:])
        grown = model.new_cache("paged", block_size=4)
        pieces = [model(ids[:, i : i + 10], cache=grown) for i in range(0, 40, 10)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids), atol=1e-5, rtol=1e-5)


def test_a_paged_cache_reports_the_pool_and_its_rows_and_gives_blocks_back() -> None:
    model = model_of()
    cache = model.new_cache("paged", block_size=4, num_blocks=16)
    with torch.no_grad():
        model(tokens(2, 9), cache=cache)
    pool, block = cache.pool, 2 * 2 * 2 * 4 * 4 * 4  # layers, keys and values, heads, tokens, width, bytes
    assert pool.n_bytes == 16 * block
    assert cache.report().used_bytes == 6 * block
    fork = cache.fork()
    assert pool.manager.num_free_blocks == 10
    assert fork.report().used_bytes == 6 * block
    with torch.no_grad():
        model(tokens(2, 1), cache=fork)
    assert pool.manager.num_free_blocks == 8  # each row's last block has been copied
    fork.free()
    assert fork.length == 0
    del cache
    assert pool.manager.num_free_blocks == 16


def test_positions_that_depend_on_the_whole_length_are_not_shared_by_unequal_rows() -> None:
    model = model_of(position="rope(scaling=dynamic(2, original_max_position_embeddings=8))")
    pool = PagedPool(2, num_blocks=16, block_size=4)
    rows = [pool.manager.allocate(), pool.manager.allocate()]
    with torch.no_grad():
        model(tokens(1, 3), cache=pool.cache(rows[:1]))
        model(tokens(2, 5), cache=pool.cache(rows))
        with pytest.raises(HeadwiseError, match=r"at 9 tokens .* one by one"):
            model(tokens(2, 1), cache=pool.cache(rows))


def test_segments_and_unequal_rows_exclude_each_other() -> None:
    model, pool = model_of(), PagedPool(2, num_blocks=16, block_size=4)
    rows = [pool.manager.allocate(), pool.manager.allocate()]
    with torch.no_grad():
        model(tokens(1, 3), cache=pool.cache(rows[:1]))
        with pytest.raises(HeadwiseError, match="exclude each other"):
            model(tokens(2, 1), segments=torch.zeros(2, 1, dtype=torch.long), cache=pool.cache(rows))
        with pytest.raises(HeadwiseError, match="3 rows of tokens for a paged cache of 2"):
            model(tokens(3, 1), cache=pool.cache(rows))


# ---- a model's cache ----


def test_all_layers_are_cropped_or_none() -> None:
    model = model_of("pattern(softmax, linear)")
    cache = model.new_cache()
    with torch.no_grad():
        model(tokens(1, 9), cache=cache)
        with pytest.raises(HeadwiseError, match="crop to 0"):
            cache.crop(3)
        assert [layer.length for layer in cache.layers] == [9, 9]


def test_segments_count_and_are_forked() -> None:
    model = model_of()
    cache = model.new_cache()
    with torch.no_grad():
        model(tokens(2, 6), segments=torch.zeros(2, 6, dtype=torch.long), cache=cache)
        other = cache.fork()
        model(tokens(2, 3), cache=other)
    assert isinstance(other, ModelCache)
    assert cache.n_bytes == cache.report().n_bytes + 2 * 6 * 8
    assert (cache.length, other.length) == (6, 9)
