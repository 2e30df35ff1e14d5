"""Time of a decoded token against the context, 128 to 8192 tokens, with a contiguous and with a paged cache.

The layers are of SmolLM2's widths (9 query heads, 3 of keys and values, 64 wide), in float32 on one thread; contexts
and kinds take turns, and seconds are the thread's own, so that what else the machine does counts little. Rows: a
growing cache; a paged one whose blocks lie side by side; one of which no two do; int8 and int4. Targets: linear in
the context, that is, no time farther than 15 % from the straight line through all, and paged within 10 % of
contiguous at every length.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
import torch

import headwise as hw
from common import median_ratio, report
from headwise.cache import ModelCache, PagedPool
from headwise.model.base import LanguageModel

LENGTHS = [128, 256, 512, 1024, 2048, 4096, 8192]
LINE = "llama(d_model=576, n_layers=6, n_heads=9, attention=gqa(kv_heads=3), vocab_size=64, max_seq_len=16384)"
ROUNDS = 15
BLOCK = 64


def caches(model: LanguageModel, ids_1S: torch.Tensor) -> dict[str, ModelCache]:
    """Every kind, holding the context."""
    made: dict[str, ModelCache] = {
        "contiguous": model.new_cache("contiguous"),
        "paged": model.new_cache("paged", block_size=BLOCK),
        "int8": model.new_cache("int8"),
        "int4": model.new_cache("int4"),
    }
    for cache in made.values():
        model(ids_1S, cache=cache)
    pool = PagedPool(6, 2 * (ids_1S.shape[1] // BLOCK + 2), BLOCK)
    others = [pool.manager.allocate() for _ in range(pool.manager.num_blocks)]
    pool.append(others, [[-1]] * len(others))
    for other in others:
        if other.block_table[0] % 2:
            pool.manager.free(other)
    made["paged, strewn"] = pool.cache([pool.manager.allocate()])
    model(ids_1S, cache=made["paged, strewn"])
    return made


@torch.inference_mode()
def measure(model: LanguageModel) -> dict[tuple[int, str], list[float]]:
    """The thread's seconds of a token and layer, by context and kind, a number a round; all take turns in a round."""
    made, times = {}, {}
    for length in LENGTHS:
        ids = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(0))
        for kind, cache in caches(model, ids).items():
            model(ids[:, :1], cache=cache)  # what the first token grows is not counted
            cache.crop(length)
            made[length, kind] = cache
    names = list(made)
    for round_ in range(ROUNDS):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            began = time.process_time()
            model(ids[:, :1], cache=made[name])
            times.setdefault(name, []).append((time.process_time() - began) / len(model.stack.blocks))  # type: ignore[arg-type, union-attr]
            made[name].crop(name[0])
    return times


def off_line(times: list[float]) -> float:
    """How far the farthest of the times at LENGTHS is from the straight line that fits them best, as a share of it."""
    line = np.polyval(np.polyfit(LENGTHS, times, 1), LENGTHS)
    return float(np.abs(np.array(times) / line - 1).max())


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = hw.build(LINE).eval()
    found = measure(model)
    kinds = list(dict.fromkeys(kind for _, kind in found))
    micro = {n: {kind: round(1e6 * median(found[n, kind])) for kind in kinds} for n in LENGTHS}
    times = {
        n: {kind: round(median_ratio(found[n, kind], found[n, "contiguous"]), 3) for kind in kinds[1:]} for n in LENGTHS
    }
    off = {kind: round(off_line([micro[n][kind] for n in LENGTHS]), 3) for kind in kinds}
    reached = {f"paged within 10 % at {n}": times[n]["paged"] <= 1.10 for n in LENGTHS}
    reached |= {f"{kind} linear": off[kind] <= 0.15 for kind in ("contiguous", "paged")}
    figures: dict[str, dict[Any, Any]] = {
        "microseconds a token and layer": micro,
        "times contiguous": times,
        "farthest from a straight line, as a share": off,
    }
    report("cache-decoding", figures, reached=reached)
