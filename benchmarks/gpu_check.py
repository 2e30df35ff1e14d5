"""`make gpu-check`: the Triton kernels and all lines on one CUDA GPU, in a few minutes.

The kernels' results against float64, their speed against torch's SDPA, compiled FlexAttention and the naive form, as
TFLOP/s, bytes/s and shares of what this chip reaches in a matrix product and in a copy; then the promises of the
conformance suite for every registered line. Results go to benchmarks/results as JSON and Markdown. The kernels' part
needs torch and Triton only; the models' part needs the package's other dependencies and says where they are missing.

Targets: results err at most 2 times (forward) and 3 times (backward) what the naive form does; the forward pass takes
at most 1.15 times SDPA's time at widths 64 and 128, 4,096 to 16,384 tokens, causal; windows and key biases take less
time than compiled FlexAttention. Exit code 0: all that ran is reached; 1: not so, or no GPU.

`--interpret` rehearses all of it without a GPU, in Triton's interpreter at sizes at which times mean nothing and count
for nothing. `--tune` tries other tiles too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
THEME = "gpu-check"
PARTS = ("kernels", "speed", "models", "more-speed")


def main() -> int:
    parser = argparse.ArgumentParser(description="The Triton kernels and all lines on one CUDA GPU.")
    parser.add_argument("--interpret", action="store_true", help="rehearse without a GPU, at tiny sizes")
    parser.add_argument("--tune", action="store_true", help="try other tiles for the kernels as well")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part only; may be given again")
    parser.add_argument("--minutes", type=float, default=7.0, help="begin nothing after this long (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go (benchmarks/results)")
    asked = parser.parse_args()
    if asked.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # asked for by Triton when it is first imported
    try:
        import torch
        import triton
    except ImportError as error:
        print(f"gpu-check: {error.name} is not installed; it needs torch and Triton", file=sys.stderr)
        return 1
    if not asked.interpret and not torch.cuda.is_available():
        print("gpu-check: no CUDA device here; --interpret rehearses the check without one", file=sys.stderr)
        return 1

    from gpu.situation import Situation

    here = Situation(
        torch.device("cpu" if asked.interpret else "cuda"), asked.interpret, time.monotonic() + 60 * asked.minutes
    )
    here.found["machine"] = machine(asked.interpret, triton.__version__)
    tables: dict[str, list[dict[str, Any]]] = {}
    steps = parts(here, tables, asked.tune)
    for part in asked.only or PARTS:
        before = time.monotonic()
        steps[part]()
        here.found.setdefault("seconds", {})[part] = round(time.monotonic() - before, 1)
        write(here, tables, asked.out)  # what has been found outlives what comes next
    paths = write(here, tables, asked.out)
    print_verdict(here, tables)
    print("kept in " + " and ".join(str(path) for path in paths))
    counted = [reached for name, reached in here.targets.items() if not (here.tiny and name.startswith("speed"))]
    return 0 if all(counted) else 1


def parts(here: Any, tables: dict[str, list[dict[str, Any]]], tune: bool) -> dict[str, Callable[[], None]]:
    """Name → what to do, the most wanted first. Each puts its tables under its name."""
    from gpu import kernels, speed

    def peaks() -> dict[str, float]:
        if "peaks" not in here.found:
            here.found["peaks"] = speed.peaks(here)
            here.say("peaks: {:.0f} TFLOP/s in a bfloat16 product, {:.0f} GB/s in a copy".format(
                here.found["peaks"]["matmul_flops"] / 1e12, here.found["peaks"]["copy_bytes"] / 1e9
            ))  # fmt: skip
        return here.found["peaks"]

    def results() -> None:
        tables["kernels"] = [kernels.check(here)]
        here.say("checked the kernels' results")

    def timings(part: str, variants: list[str]) -> None:
        rows = speed.measure(here, variants, peaks())
        here.found.setdefault("speed", []).extend(rows)
        tables[part] = speed.as_tables(rows)

    def models() -> None:
        try:
            from gpu import models

            tables["models"] = [models.check(here)]
        except ImportError as error:
            here.not_run.append(f"models: {error.name} is not installed")

    def more() -> None:
        timings("more-speed", ["soft cap"])
        if tune:
            tables["more-speed"].append(speed.tune(here))

    return {
        "kernels": results,
        "speed": lambda: timings("speed", ["causal", "window", "key bias"]),
        "models": models,
        "more-speed": more,
    }


def machine(interpreted: bool, triton: str) -> dict[str, str]:
    """What this ran on."""
    import torch

    name = "the interpreter" if interpreted else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": triton, "python": platform.python_version()}
    return {"gpu": name, **versions, "date": str(date.today())}


def write(here: Any, tables: dict[str, list[dict[str, Any]]], folder: Path) -> list[Path]:
    """JSON with everything, Markdown to read."""
    from tables import markdown

    about = here.found["machine"]
    slug = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{THEME}-{slug}-{about['date']}.{ending}" for ending in ("json", "md")]
    kept = {"theme": THEME, **here.found, "reached": here.targets, "not_run": here.not_run, "tables": tables}
    paths[0].write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [f"# GPU check: {about['gpu']}", "", ", ".join(f"{k} {v}" for k, v in about.items() if k != "gpu") + "."]
    if "peaks" in here.found:
        found = here.found["peaks"]
        lines += ["", f"A bfloat16 matrix product reaches {found['matmul_flops'] / 1e12:.0f} TFLOP/s here, a copy "
                  f"{found['copy_bytes'] / 1e9:.0f} GB/s."]  # fmt: skip
    lines += ["", *verdict(here)]
    for part, made in tables.items():
        lines += ["", f"## {part.replace('-', ' ').capitalize()}", "", *(markdown(each) for each in made)]
    paths[1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def verdict(here: Any) -> list[str]:
    """What was reached, missed and not run."""
    missed = [name for name, reached in here.targets.items() if not reached]
    lines = [f"{len(here.targets) - len(missed)} of {len(here.targets)} targets reached."]
    lines += ["", *(f"- missed: {name}" for name in missed)] if missed else []
    return [*lines, "", *(f"- not run: {what}" for what in here.not_run)] if here.not_run else lines


def print_verdict(here: Any, tables: dict[str, list[dict[str, Any]]]) -> None:
    from tables import markdown

    for part in ("kernels", "speed", "more-speed"):
        for each in tables.get(part, []):
            print(markdown(each))
    for name, reached in here.targets.items():
        if name.startswith("speed"):
            print(f"{'reached' if reached else 'MISSED '}  {name}")
    print("\n".join(verdict(here)))


if __name__ == "__main__":
    sys.exit(main())
