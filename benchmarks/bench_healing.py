"""A trained model with another attention put in: its loss before, after, and while it heals from the model it was.

    python benchmarks/bench_healing.py [--steps N] [--size gpu] [--save]

The teacher of `bench_distill_shakespeare.py` gets gqa, tva, linear and window(64) in all layers (`headwise swap`), and
each is healed by `headwise distill run --recipe heal` with the model as it was for a teacher. One plot has them all.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from distilling import SIZES, Size, keep, options, teacher_of
from headwise.distill.run import distill_or_resume
from headwise.lab.swap import SwapResult, SwapSettings, swap_saved

SWAPS = {"gqa": "gqa(kv_heads=2)", "tva": "tva(rank=16)", "linear": "linear", "window": "window(64)"}
EVALUATIONS = 8


def swapped(teacher: Path, attention: str, folder: Path) -> dict[str, Any]:
    """The model with another attention, and its loss before and after."""
    about = folder / "swap-result.json"
    if not about.exists():
        result: SwapResult = swap_saved(teacher, SwapSettings(attention=attention, out=folder, data="shakespeare"))
        about.write_text(json.dumps(result.as_json()))
    return dict(json.loads(about.read_text()))


def healed(teacher: Path, student: Path, size: Size, steps: int, out: Path) -> list[tuple[int, float]]:
    """Validation loss against the step."""
    result = distill_or_resume(
        recipe="heal",
        teacher=str(teacher),
        student=str(student),
        data="shakespeare",
        seq_len=size.seq_len,
        batch_size=size.batch_size,
        steps=steps,
        eval_every=max(1, steps // EVALUATIONS),
        out=out,
    )
    return [(record["step"], record["val_loss"]) for record in result.history if "val_loss" in record]


def plot(before: float, curves: dict[str, list[tuple[int, float]]]) -> str:
    """All curves in one picture, as SVG."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(before, color="black", lw=1.2, label="before the swap")
    for name, points in curves.items():
        axes.plot(*zip(*points), marker="o", ms=4, lw=1.6, label=name)
    axes.set_xlabel("healing step (0: just swapped)")
    axes.set_ylabel("validation loss, nats a token")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


if __name__ == "__main__":
    given = options(__doc__)
    size = SIZES[given.size]
    steps = given.steps or size.steps // 3
    teacher = teacher_of(size, given.size, given.out)
    rows: dict[str, dict[str, Any]] = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    before = 0.0
    for name, attention in SWAPS.items():
        folder = given.out / f"healing-{given.size}" / name
        swap = swapped(teacher, attention, folder / "swapped")
        before = swap["val_loss_before"]
        points = healed(teacher, folder / "swapped", size, steps, folder / f"healed-{steps}")
        curves[attention] = [(0, swap["val_loss_after"]), *points]
        after, end = swap["val_loss_after"], points[-1][1]
        regained = (after - end) / (after - before) if after > before else None
        rows[attention] = {"before": before, "after the swap": after, "healed": end, "share regained": regained}
    reached = {
        f"{name} is better healed than swapped": row["healed"] < row["after the swap"] for name, row in rows.items()
    }
    figures = {"steps": steps, "rows": rows, "curves": curves}
    keep(f"distill-healing-{given.size}", figures, reached, given.save, svg=plot(before, curves))
