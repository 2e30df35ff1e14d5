"""What the kinds of cache cost on a mix of requests: waste, sharing, and bytes a token (document 002's claims).

Lengths come from `traffic`, blocks from the manager that a paged cache uses, and bytes from the caches themselves, made
for the model on torch's device without memory. Nothing is timed.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from headwise.lab.bench.run import about
from headwise.lab.bench.traffic import CacheSettings, Growing, Held, Paged, Preallocated, steps
from headwise.lab.result import Environment
from headwise.model import build

SAMPLE = 64  # tokens from which a kind's bytes are counted


class CacheRow(BaseModel):
    """One way of keeping tokens. Bytes are of all layers, in the precision that the settings name.

    Attributes:
        label: the kind.
        token_bytes: of one token's place.
        bytes_per_token: reserved for each token that the requests have, over time.
        peak_bytes: the most that was reserved at once.
        waste: share of what is reserved that holds nothing, over time.
        sharing: share of the requests' tokens that another request holds for them, over time.
    """

    model_config = ConfigDict(extra="forbid")
    label: str
    token_bytes: float
    bytes_per_token: float
    peak_bytes: float
    waste: float
    sharing: float


class CacheResult(BaseModel):
    """What `headwise bench cache` found; the first row is preallocation, which the others are held against."""

    model_config = ConfigDict(extra="forbid")
    subject: str = "cache"
    settings: dict[str, Any]
    environment: Environment
    steps: int
    rows: list[CacheRow]
    finished_at: str
    wall_seconds: float

    def row(self, label: str) -> CacheRow:
        """The row of a label. KeyError: there is none."""
        return {row.label: row for row in self.rows}[label]

    def save(self, folder: Path) -> None:
        """`result.json` and `report.html` in a folder."""
        from headwise.io.atomic import write_json, write_text
        from headwise.lab.report.caches import report_html

        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "result.json", self.model_dump(mode="json"))
        write_text(folder / "report.html", report_html(self))


def bench_cache(settings: CacheSettings | None = None, **changes: Any) -> CacheResult:
    """Send requests through every kind of cache, and report what each reserves and wastes.

    Args:
        settings: `CacheSettings`; its fields may as well be given by keyword.

    Raises:
        SpecError: the line is no architecture.
        SettingsError: a setting out of range, or layers that keep a state and no tokens.
    """
    given = {} if settings is None else settings.model_dump(exclude_unset=True)
    chosen, began = CacheSettings(**{**given, **changes}), time.monotonic()
    sizes = token_bytes(chosen.line)
    block = chosen.block_size
    ways: dict[str, tuple[str, Preallocated | Growing | Paged]] = {
        "static": ("contiguous", Preallocated(chosen.max_len)),
        "contiguous": ("contiguous", Growing()),
        f"paged({block})": ("contiguous", Paged(chosen, sharing=False)),
        f"paged({block}), shared": ("contiguous", Paged(chosen, sharing=True)),
        "int8": ("int8", Growing()),
        "int4": ("int4", Growing()),
    }
    held, n_steps = {label: Held() for label in ways}, 0
    for lengths in steps(chosen):
        n_steps += 1
        for label, (_, way) in ways.items():
            held[label].add(*way.room(lengths), sum(lengths.values()))
    rows = [
        CacheRow(
            label=label, token_bytes=sizes[kind], bytes_per_token=sizes[kind] * found.reserved / found.wanted,
            peak_bytes=sizes[kind] * found.peak, waste=found.waste, sharing=found.sharing,
        )
        for (label, (kind, _)), found in zip(ways.items(), held.values())
    ]  # fmt: skip
    result = CacheResult(
        settings=chosen.model_dump(mode="json"), environment=about(torch.device("cpu")), steps=n_steps, rows=rows,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        wall_seconds=time.monotonic() - began,
    )  # fmt: skip
    if chosen.out is not None:
        result.save(chosen.out)
    return result


@torch.inference_mode()
def token_bytes(line: str) -> dict[str, float]:
    """Bytes of a token in all layers of a bfloat16 model, by kind, of caches that have been filled."""
    model = build(line, device="meta", dtype=torch.bfloat16).eval()
    model.new_cache("paged")  # says which layers keep no tokens
    sizes = {}
    for kind in ("contiguous", "int8", "int4"):
        cache = model.new_cache(kind)
        model(torch.zeros(1, SAMPLE, dtype=torch.long, device="meta"), cache=cache)
        sizes[kind] = cache.n_bytes / SAMPLE
    return sizes
