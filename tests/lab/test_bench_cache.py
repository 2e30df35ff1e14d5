"""`headwise bench cache`: what requests of many lengths make each kind of cache reserve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headwise.cache import LayerCache
from headwise.cli import main
from headwise.errors import HeadwiseError, SettingsError
from headwise.lab.bench.cache_table import cells
from headwise.lab.bench.caches import CacheResult, bench_cache, token_bytes
from headwise.lab.bench.traffic import CacheSettings, Growing, requests, steps

LINE = "llama(d_model=32, n_layers=2, n_heads=4, attention=gqa(kv_heads=2), vocab_size=29, max_seq_len=64)"
SMALL = {"line": LINE, "requests": 20, "batch_size": 5, "prompt_tokens": 20, "new_tokens": 12, "max_len": 96}


@pytest.fixture(scope="module")
def result() -> CacheResult:
    return bench_cache(**SMALL, shared_prefix=33, shared=0.7, block_size=4)


def test_blocks_waste_less_than_buffers_and_these_less_than_reserves(result: CacheResult) -> None:
    static, growing, paged, shared = (
        result.row(label) for label in ("static", "contiguous", "paged(4)", "paged(4), shared")
    )
    assert 0.05 > paged.waste > 0
    assert static.waste > growing.waste > paged.waste
    assert static.bytes_per_token > growing.bytes_per_token > paged.bytes_per_token > shared.bytes_per_token
    assert shared.sharing > 0.1 > paged.sharing == static.sharing == 0
    assert static.peak_bytes == 5 * 96 * static.token_bytes == 5 * 96 * 2 * 2 * 2 * 8 * 2


def test_nothing_is_shared_where_no_prompts_begin_alike() -> None:
    found = bench_cache(**SMALL, shared=0.0, block_size=4)
    assert found.row("paged(4), shared").sharing == 0
    assert found.row("paged(4), shared").peak_bytes == found.row("paged(4)").peak_bytes


def test_every_request_is_served_once_from_prompt_to_end() -> None:
    settings = CacheSettings(**SMALL)
    expected, seen = requests(settings), {}
    for lengths in steps(settings):
        assert 0 < len(lengths) <= settings.batch_size
        for number, length in lengths.items():
            assert length == seen.get(number, len(expected[number].prompt) - 1) + 1
            seen[number] = length
    assert seen == {number: request.final for number, request in enumerate(expected)}
    assert max(seen.values()) <= settings.max_len


def test_buffers_grow_as_those_of_the_cache_do() -> None:
    import torch

    way, cache = Growing(), LayerCache()
    for length in [21, *range(22, 100)]:
        cache.append(torch.zeros(1, 1, length - cache.length, 1))
        assert way.room({0: length})[0] * 4 == cache.n_bytes


def test_bytes_are_those_of_the_caches_and_rounded_ones_cost_less() -> None:
    sizes = token_bytes(LINE)
    assert sizes["contiguous"] == 2 * 2 * 2 * 8 * 2  # layers, keys and values, heads, width, bytes
    assert sizes["int4"] < sizes["int8"]
    with pytest.raises(SettingsError, match="keeps one state"):
        token_bytes("llama(attention=linear)")


def test_the_command_prints_and_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert main(["bench", "cache", *flags, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("static", "paged(16)", "int4", "Waste", "20 requests"))
    written = CacheResult.model_validate_json((tmp_path / "out" / "result.json").read_text())
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(cell in page for row in written.rows for cell in cells(written, row))
    assert "http" not in page.replace("http-equiv", "")
    assert main(["bench", "cache", *flags, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["rows"] == json.loads(written.model_dump_json())["rows"]


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, said in (
        (["cache", "--max-len", "1"], "max_len: given '1'"),
        (["cahce"], "did you mean 'cache'"),
        (["cache", "--blocksize", "4"], "did you mean '--block-size'"),
        (["cache", "--line", "lama"], "did you mean 'llama'"),
    ):
        assert main(["bench", *argv]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(HeadwiseError, match="shared"):
        bench_cache(shared=2)
