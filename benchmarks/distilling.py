"""What the benchmarks of distillation share: the teacher trained on Shakespeare, the figures of an A/B, their files."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, machine, report
from headwise.lab.ab import ABResult
from headwise.lab.claims import findings
from headwise.lab.result import Loss
from headwise.train import train_or_resume

WORK = Path("runs")


@dataclass(frozen=True)
class Size:
    """How large the Shakespeare experiments are: for two cores, or for a GPU at ten times the size."""

    teacher: str
    student: str
    teacher_steps: int
    steps: int
    batch_size: int = 16
    seq_len: int = 128
    lr: float = 1e-3


SIZES = {
    "cpu": Size(
        teacher="llama(d_model=192, n_layers=4, n_heads=6)",
        student="llama(d_model=96, n_layers=2, n_heads=4, attention=gqa(kv_heads=2))",
        teacher_steps=1500,
        steps=600,
    ),
    "gpu": Size(
        teacher="llama(d_model=512, n_layers=6, n_heads=8)",
        student="llama(d_model=256, n_layers=3, n_heads=8, attention=gqa(kv_heads=4))",
        teacher_steps=3000,
        steps=1500,
        batch_size=32,
        seq_len=256,
    ),
}


def options(doc: str | None) -> argparse.Namespace:
    """The flags that these benchmarks have in common."""
    parser = argparse.ArgumentParser(description=(doc or "").strip().splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="cpu", help="gpu: ten times the size")
    parser.add_argument("--out", type=Path, default=WORK, help="where models and runs are kept, and found again")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, help="of a student; default what fits the size")
    parser.add_argument("--workers", type=int, help="runs at once; default one a core, on a GPU one")
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    return parser.parse_args()


def teacher_of(size: Size, name: str, out: Path) -> Path:
    """The trained teacher's folder; trained where it is not there yet."""
    folder = out / f"shakespeare-teacher-{name}"
    print(f"teacher: {folder}", file=sys.stderr)
    train_or_resume(
        size.teacher,
        data="shakespeare",
        seq_len=size.seq_len,
        batch_size=size.batch_size,
        steps=size.teacher_steps,
        lr=size.lr,
        eval_every=size.teacher_steps // 5,
        out=folder,
    )
    return folder


def figures_of(result: ABResult) -> dict[str, Any]:
    """The figures of an A/B, arms and contrasts with their intervals, and the claims."""
    arms = {}
    for variant, arm in zip(result.variants, result.arms, strict=True):
        arms[arm.arm] = {
            "val_loss": shown(variant.val_loss),
            "difference": None if variant.diff is None else variant.diff.model_dump(),
            "train_loss": shown(arm.train_loss),
            "steps_to_baseline": arm.steps_to_baseline.model_dump(),
            "val_loss_by_part": {part: shown(loss) for part, loss in arm.val_loss_by_part.items()},
            "likeness": {
                name: {"own": each.mean, "shuffled": each.shuffled, "layers": each.layers}
                for name, each in arm.alignment.items()
            },
            "collapse": arm.collapse,
            "aligner_params": arm.aligner_params,
            "tokens_per_s": arm.tokens_per_s,
        }
    return {
        "student": {"line": result.variants[0].resolved, "params": result.variants[0].params},
        "data": result.dataset.model_dump(),
        "seeds": result.seeds,
        "steps": result.variants[0].steps,
        "arms": arms,
        "contrasts": [each.model_dump() for each in result.contrasts],
        "claims": [finding.as_json() for finding in findings(result)],
        "failed": [run.model_dump() for run in result.failed_runs],
        "wall_seconds": result.wall_seconds,
        "command": result.command,
    }


def shown(loss: Loss) -> dict[str, Any]:
    return {"mean": loss.mean, "ci95": loss.ci95, "per_seed": loss.per_seed}


def keep(theme: str, figures: dict[str, Any], reached: dict[str, bool], save: bool, **files: str) -> None:
    """`common.report`, with files of text beside the figures: Markdown, a plot."""
    if save:
        about = machine()
        slug = re.sub(r"[^a-z0-9]+", "-", about["cpu"].lower()).strip("-")
        RESULTS.mkdir(exist_ok=True)
        for ending, text in files.items():
            (RESULTS / f"{theme}-{slug}-{about['date']}.{ending}").write_text(text, encoding="utf-8")
    report(theme, figures, reached=reached, save=save)
