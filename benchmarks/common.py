"""What the benchmarks share: medians of interleaved timings, the machine's name, and where results are kept."""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
from datetime import date
from pathlib import Path
from typing import Any

import torch

from headwise.lab.timing import interleaved as interleaved

RESULTS = Path(__file__).parent / "results"


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        cpu = match[1].strip()
    return {"cpu": cpu, "cores": torch.get_num_threads(), "torch": torch.__version__, "date": str(date.today())}


def report(theme: str, figures: dict[str, Any], *, reached: dict[str, bool], save: bool | None = None) -> None:
    """Print the figures and keep them under results/: `save` says whether, or `--save` where that is the one option.
    Exits 1 where a target was missed."""
    if save is None:
        parser = argparse.ArgumentParser(description=f"Benchmark: {theme}")
        parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
        save = parser.parse_args().save
    result = {"theme": theme, "machine": machine(), "figures": figures, "reached": reached}
    print(json.dumps(result, indent=2))
    if save:
        RESULTS.mkdir(exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", result["machine"]["cpu"].lower()).strip("-")
        path = RESULTS / f"{theme}-{slug}-{result['machine']['date']}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    raise SystemExit(0 if all(reached.values()) else 1)
