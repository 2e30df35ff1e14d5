"""Time of a decoded token against the context, 128 to 8192 tokens, with a contiguous and with a paged cache.

The layers are of SmolLM2's widths (9 query heads, 3 of keys and values, 64 wide), in float32 on one thread; the kinds
take turns, and seconds are the thread's own, so that what else the machine does counts little. Rows: a growing cache; a
paged one whose blocks lie side by side; one of which no two do; int8 and int4. Targets: linear, that is, from 4096 to
8192 tokens a step grows by no more than twice what it does from 2048 to 4096 (2.7 for noise), and paged within 10 % of
contiguous at every length.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

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
def measure(model: LanguageModel, length: int) -> dict[str, list[float]]:
    """The thread's seconds of a token and layer, by kind, a number a round."""
    ids = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(0))
    made, token, times = caches(model, ids), ids[:, :1], {}
    names = list(made)
    for cache in made.values():  # what the first token grows is not counted
        model(token, cache=cache)
        cache.crop(length)
    for round_ in range(ROUNDS):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            began = time.process_time()
            model(token, cache=made[name])
            times.setdefault(name, []).append((time.process_time() - began) / len(model.stack.blocks))  # type: ignore[arg-type, union-attr]
            made[name].crop(length)
    return times


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = hw.build(LINE).eval()
    figures: dict[str, dict[int, Any]] = {"microseconds a token and layer": {}, "times contiguous": {}}
    for length in LENGTHS:
        found = measure(model, length)
        figures["microseconds a token and layer"][length] = {k: round(1e6 * median(t)) for k, t in found.items()}
        figures["times contiguous"][length] = {
            k: round(median_ratio(t, found["contiguous"]), 3) for k, t in found.items() if k != "contiguous"
        }
    micro, times = figures["microseconds a token and layer"], figures["times contiguous"]
    reached = {f"paged within 10 % at {n}": times[n]["paged"] <= 1.10 for n in LENGTHS}
    for kind in ("contiguous", "paged"):
        late, early = micro[8192][kind] - micro[4096][kind], micro[4096][kind] - micro[2048][kind]
        reached[f"{kind} linear"] = late <= 2.7 * max(early, 1)
    report("cache-decoding", figures, reached=reached)
