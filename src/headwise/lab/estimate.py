"""What training would take, without any of it: for `--dry-run`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from headwise.lab.plan import Plan, make_plan
from headwise.lab.render import duration, quantity
from headwise.lab.settings import CompareSettings
from headwise.spec import ModelSpec, count
from headwise.train.job import prepare
from headwise.train.settings import TrainSettings

# Of the rate of large matrix products, what training of small models reaches, everything included.
EFFICIENCY = 0.4
PROBE_SECONDS = 0.1


@dataclass(frozen=True)
class LineEstimate:
    """One line: what it resolves to, its parameters, and what was done to match the baseline."""

    line: str
    resolved: str
    params: int
    steps: int
    match_note: str = ""


@dataclass(frozen=True)
class Estimate:
    """What would run, and roughly for how long. `str` of it is for people."""

    data: str
    lines: list[LineEstimate]
    runs: int
    tokens_per_run: int
    workers: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        text = []
        for line in self.lines:
            text.append(f"{line.line}\n  {line.resolved}\n  {line.params:,} parameters, {line.steps} steps")
            if line.match_note:
                text.append(f"  {line.match_note}")
        runs = "1 run" if self.runs == 1 else f"{self.runs} runs, {self.workers} at once,"
        text.append(
            f"{runs} of {quantity(self.tokens_per_run)} tokens of {self.data}: roughly {duration(self.seconds)}"
        )
        text.append("nothing was trained and nothing written (--dry-run)")
        return "\n".join(text)


def estimate_training(line: str | ModelSpec, settings: TrainSettings) -> Estimate:
    """What `train` would do. Raises what it would raise before its first step."""
    job = prepare(line, settings)
    counts = count(job.spec, settings.seq_len)
    tokens = settings.steps * settings.batch_size * settings.accumulate * settings.seq_len
    flops = _run_flops(counts.train_flops_per_token, settings, tokens, len(job.dataset.val))
    about = LineEstimate(str(line), str(job.spec), counts.params, settings.steps)
    seconds = flops / (EFFICIENCY * _flops_per_second(job.device, settings.threads))
    return Estimate(job.dataset.name, [about], 1, tokens, 1, seconds)


def estimate_comparison(lines: Sequence[str | ModelSpec], settings: CompareSettings) -> Estimate:
    """What `compare` would do. Raises what it would raise before its first run."""
    plan = make_plan(lines, settings)
    trials = len(plan.grid) * settings.tune_seeds if plan.grid else 0
    runs_a_line = len(settings.seed_list) + trials
    tokens = settings.steps * settings.batch_size * settings.accumulate * settings.seq_len
    flops = sum(
        runs_a_line * _run_flops(variant.train_flops_per_token or 0.0, settings, tokens, len(plan.dataset.val))
        for variant in plan.variants
    )
    abouts = [
        LineEstimate(variant.line, variant.resolved, variant.params, settings.steps, _note(plan, variant.match_note))
        for variant in plan.variants
    ]
    runs = runs_a_line * len(plan.variants)
    workers = min(runs, plan.workers)
    seconds = flops / (EFFICIENCY * _flops_per_second(plan.device, plan.threads)) / workers
    return Estimate(plan.dataset.name, abouts, runs, tokens, workers, seconds)


def _note(plan: Plan, note: str) -> str:
    return "its steps will be measured to take the baseline's time" if plan.settings.match == "time" else note


def _run_flops(per_token: float, settings: TrainSettings, tokens: int, val_tokens: int) -> float:
    """Training, and the evaluations between and after, which cost a third of it a token."""
    evaluations = 1 + (settings.steps // settings.eval_every if settings.eval_every else 0)
    return per_token * (tokens + evaluations * val_tokens / 3)


def _flops_per_second(device: torch.device, threads: int | None) -> float:
    """The rate of matrix products on this machine now."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        width = 512 if device.type == "cpu" else 4096
        a = torch.ones(width, width, device=device)
        float((a @ a)[0, 0])
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < PROBE_SECONDS:
            float((a @ a)[0, 0])  # reading a number waits for the device
            count += 1
        return 2 * width**3 * count / (time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
