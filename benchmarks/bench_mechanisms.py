"""Speed of the mechanisms against torch's own causal attention: forward and backward, 8 heads of width 64, two threads.

Each figure is the median of the rounds' ratios to `scaled_dot_product_attention` on ready q, k and v in the same round,
with its interval; a mechanism's core is what lies between its layer's projections (see docs/benchmarks.md). TVA is
measured as a whole layer, forward alone, against the standard layer. All are single sequences in float32.

Targets: as TARGETS below says, and for `w2` memory linear in the length. `python benchmarks/bench_mechanisms.py` prints
the table and, with `--save`, keeps it.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import torch

from common import interleaved, report
from headwise.allocator import kept_memory
from headwise.dims import Dims
from headwise.errors import HeadwiseError
from headwise.lab.bench.cases import BASELINE, Bed, Case, attention_spec, mechanism, stock
from headwise.lab.bench.settings import BenchSettings
from headwise.lab.stats import ratio_summary
from headwise.lab.timing import kept_bytes
from headwise.registry import POSITION

ROUNDS = 9
SLICE_SECONDS = 0.2
NAIVE_W2 = "w2, written out"
# (kind, position code, length) → torch's own time, times this at most.
TARGETS = {
    ("w2", "none", 2048): 1.25,
    ("w2", "none", 4096): 1.25,
    ("softmax", "alibi", 2048): 1.25,
    ("softmax", "alibi", 4096): 1.25,
    ("window(256)", "none", 4096): 1 / 3,
    ("window(256)", "none", 8192): 1 / 5,
    ("linear", "none", 2048): 1 / 2.5,
    ("linear", "none", 4096): 1 / 6,
    ("linear", "none", 8192): 1 / 9,
    ("gla", "none", 4096): 1.0,
    ("deltanet", "none", 4096): 1.0,
}
TVA, TVA_TOKENS, TVA_FASTER, TVA_SMALLER = "tva(rank=8, folded=true)", 128, 4.0, 8
LINEAR_GROWTH = 1.1  # of the memory a token, from 512 to 8192 tokens


def name_of(call: str, position: str) -> str:
    return call if position == "none" else f"{call}, {position}"


def ratios(bed: Bed, cases: list[Case], length: int) -> dict[str, dict[str, float]]:
    """Each case's time as a ratio to the first one's, and the milliseconds of both."""
    steps = {case.label: case.step(case.make(length), bed) for case in cases}
    once = interleaved(steps, 1)

    def repeated(label: str) -> None:
        for _ in range(times[label]):
            steps[label]()

    times = {label: max(1, round(SLICE_SECONDS / seconds[0])) for label, seconds in once.items()}
    rounds = interleaved({label: partial(repeated, label) for label in steps}, ROUNDS)
    seconds = {label: [s / times[label] for s in found] for label, found in rounds.items()}
    first, made = cases[0].label, {}
    for label in list(steps)[1:]:
        found = ratio_summary(seconds[label], seconds[first])
        assert found is not None
        made[label] = {
            "ratio": round(found.ratio, 3), "lowest": round(found.lo or 0, 3), "highest": round(found.hi or 0, 3),
            "ms": round(1e3 * median(seconds[label]), 2), "torch_ms": round(1e3 * median(seconds[first]), 2),
        }  # fmt: skip
    return made


def case_of(bed: Bed, call: str, position: str = "none", *, naive: bool = False, label: str = "") -> Case:
    """A mechanism's case. HeadwiseError: there is no such kind, or it cannot be built at these widths."""
    make = partial(mechanism, bed, attention_spec(call, bed), POSITION.spec(position), naive=naive)
    make(16)
    return Case(label or name_of(call, position), "headwise", make, naive)


def cores(bed: Bed) -> dict[str, Any]:
    """The table: `{kind: {length: …}}`. All that stand at one length are measured together."""
    found: dict[str, Any] = {}
    for length in sorted({length for *_, length in TARGETS}):
        cases = [Case(BASELINE, "torch", partial(stock, bed))]
        cases += [case_of(bed, call, position) for call, position, n in TARGETS if n == length]
        for label, each in ratios(bed, cases, length).items():
            found.setdefault(label, {})[str(length)] = each
        bed.forget()
    # For contrast, and by itself, since its T×T scores would push all else out of the processor's caches.
    contrast = [Case(BASELINE, "torch", partial(stock, bed)), case_of(bed, "w2", naive=True, label=NAIVE_W2)]
    found[NAIVE_W2] = {"2048": ratios(bed, contrast, 2048)[NAIVE_W2]}
    return found


def kept(bed: Bed, call: str, lengths: tuple[int, int], *, naive: bool = False) -> dict[str, float]:
    """Bytes kept for the backward pass at two lengths, and how the bytes a token grow between them."""
    case = case_of(bed, call, naive=naive)
    sizes = []
    for length in lengths:
        work = case.make(length)
        sizes.append(kept_bytes(partial(case.forward, work), work.own))
    growth = (sizes[1] / lengths[1]) / (sizes[0] / lengths[0])
    return {str(lengths[0]): sizes[0], str(lengths[1]): sizes[1], "growth_a_token": round(growth, 3)}


def tva_layer() -> dict[str, Any]:
    """A folded TVA layer against the standard layer: forward time and cache."""
    settings = {"n_heads": 12, "head_dim": 64, "lengths": TVA_TOKENS, "level": "layer", "backward": False}
    bed = Bed(BenchSettings(**settings, device="cpu"))
    dims = Dims(768, 12)
    cases = [case_of(bed, "softmax"), case_of(bed, TVA)]
    (time,) = ratios(bed, cases, TVA_TOKENS).values()
    caches = {call: attention_spec(call, bed).kv_numbers_per_token(dims) for call in ("softmax", TVA)}  # type: ignore[attr-defined]
    return {
        "forward_ms": time["ms"], "standard_forward_ms": time["torch_ms"],
        "faster": round(1 / time["ratio"], 2), "slowest": round(1 / time["highest"], 2),
        "cache_numbers_a_token": caches[TVA], "standard_cache_numbers_a_token": caches["softmax"],
        "cache_smaller": caches["softmax"] / caches[TVA],
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    bed = Bed(BenchSettings(n_heads=8, head_dim=64, lengths=(2048, 4096, 8192), device="cpu"))
    try:
        for call, position in dict.fromkeys((call, position) for call, position, _ in TARGETS):
            case_of(bed, call, position)
    except HeadwiseError as error:
        raise SystemExit(f"error: nothing was measured: {' '.join(str(error).split())}") from None
    with kept_memory():  # as training has it
        figures: dict[str, Any] = {
            "times_torchs_own": cores(bed),
            "kept_for_backward": {
                "w2": kept(bed, "w2", (512, 8192)),
                NAIVE_W2: kept(bed, "w2", (256, 1024), naive=True),
            },
            "tva_layer": tva_layer(),
        }
    reached = {
        f"{name_of(call, position)} at {length}: at most {limit:.3g}x": (
            figures["times_torchs_own"][name_of(call, position)][str(length)]["ratio"] <= limit
        )
        for (call, position, length), limit in TARGETS.items()
    }
    reached["w2: memory linear from 512 to 8192"] = (
        figures["kept_for_backward"]["w2"]["growth_a_token"] <= LINEAR_GROWTH
    )
    tva = figures["tva_layer"]
    reached[f"{TVA}: layer at least {TVA_FASTER:g}x faster"] = tva["faster"] >= TVA_FASTER
    reached[f"{TVA}: cache {TVA_SMALLER}x smaller"] = tva["cache_smaller"] >= TVA_SMALLER
    report("mechanisms", figures, reached=reached)


if __name__ == "__main__":
    main()
