"""Distilling from a cached teacher against a live one, and what the aligner costs: the 135 M model, 256 tokens.

    python benchmarks/bench_distill_speed.py [--rounds N] [--save]

Both trainers take the same steps in turn, in one process; figures are medians of ratios within a round. The cache holds
what the teacher makes of the windows of these steps, computed before the clock starts.

Targets: at least 1.5x the steps/s of a live teacher, and less than 10 % of a step for the aligner.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from bench_distill_real import model_file
from common import interleaved, median_ratio, report
from headwise.distill.caching import fill_stores
from headwise.distill.job import prepare, settled
from headwise.distill.profile import profile
from headwise.distill.settings import DistillSettings
from headwise.distill.trainer import DistillTrainer

STUDENT = "llama(d_model=192, n_layers=4, n_heads=4, attention=gqa(kv_heads=2))"


def steps_per_second(settings: DistillSettings, rounds: int) -> dict[str, list[float]]:
    """Seconds of an update with a live teacher and with a cached one, in turn."""
    trainers = {}
    for name, changes in {"live": {}, "cached": {"cache_teacher": True}}.items():
        job = prepare(settled(settings.model_copy(update=changes)))
        fill_stores(job, print, None)
        trainers[name] = DistillTrainer(job)
    return interleaved({name: trainer.update for name, trainer in trainers.items()}, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    given = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for projection in ("structured", "flat"):
            settings = DistillSettings(
                teacher=(str(model_file()),),
                student=STUDENT,
                data="shakespeare",
                projection=projection,
                seq_len=256,
                batch_size=2,
                steps=given.rounds + 1,
            )
            seconds = steps_per_second(settings.model_copy(update={"cache_dir": Path(folder) / "cache"}), given.rounds)
            parts = profile(settings, rounds=given.rounds)
            aligner, student = parts.seconds["aligner"], parts.seconds["student"]
            figures[projection] = {
                "steps/s, live": round(1 / statistics.median(seconds["live"]), 4),
                "steps/s, cached": round(1 / statistics.median(seconds["cached"]), 4),
                "cached / live": round(median_ratio(seconds["live"], seconds["cached"]), 3),
                "aligner / step with a live teacher": round(parts.aligner_share, 4),
                "aligner / step with a cached teacher": round(aligner / (aligner + student), 4),
                "aligner parameters": parts.params["aligner"],
            }
    report(
        "distill-speed",
        {"student": STUDENT, "tokens": 256, "sequences": 2, **figures},
        reached={
            "cached at least 1.5x a live teacher": all(each["cached / live"] >= 1.5 for each in figures.values()),
            "structured aligner below 10 % of a step": figures["structured"]["aligner / step with a cached teacher"]
            < 0.1,
            "flat aligner below 10 % of a step": figures["flat"]["aligner / step with a cached teacher"] < 0.1,
        },
        save=given.save,
    )
