"""Made-up comparisons for the tests of results and reports: every verdict, failed runs, awkward text."""

from __future__ import annotations

import math

import numpy as np

from headwise.lab.result import (
    CompareResult,
    DatasetInfo,
    Environment,
    LrTrial,
    Measurements,
    RunRecord,
    Series,
    Setup,
    VariantInfo,
)
from headwise.lab.summary import summarise

SCRIPT = "llama(name='<script>document.title=\"executed\"</script>$x_$')"
LINES = [
    "gpt2",
    "llama",
    "llama(attention=gqa(kv_heads=2))",
    "gpt2(position=rope, norm=rmsnorm, attention=pattern(window(256), window(256), softmax), ffn=swiglu)",
    "gpt2",
    SCRIPT,
]
EFFECTS = [0.0, -0.06, -0.045, 0.05, 0.0, 0.004]  # nats at the end of training
NOISE = [0.006, 0.006, 0.008, 0.008, 0.0, 0.03]


def make_inputs(
    lines: list[str] = LINES, n_seeds: int = 6, steps: int = 300, failures: bool = True, seed: int = 0
) -> tuple[list[VariantInfo], list[RunRecord], Setup, list[Measurements]]:
    """The four arguments of `summarise`; the curves fall like those of real runs and share the noise of a seed."""
    rng = np.random.default_rng(seed)
    variants = [_variant(i, line) for i, line in enumerate(lines)]
    runs = []
    for s in range(n_seeds):
        shared = 0.05 * rng.standard_normal()
        wiggle = rng.standard_normal(steps)
        for v in range(len(lines)):
            private = 0.0 if v == 0 else NOISE[v % len(NOISE)] * rng.standard_normal()
            final = 1.90 + shared + EFFECTS[v % len(EFFECTS)] + private
            step = np.arange(1, steps + 1)
            smooth = final + (4.2 - final) * np.exp(-6 * step / steps)
            train = Series(step=step.tolist(), loss=(smooth - 0.1 + 0.04 * wiggle).tolist())
            val = Series(step=step[24::25].tolist(), loss=smooth[24::25].tolist())
            loss = float(smooth[-1])
            runs.append(
                RunRecord(
                    variant=v,
                    seed=s,
                    val_loss=loss,
                    bits_per_byte=loss / math.log(2),
                    train_curve=train,
                    val_curve=val,
                    seconds=41.0 + 3 * v + s,
                )
            )
    if failures and len(lines) > 2:
        runs[2].val_loss = math.nan
        runs[-2].error = "TrainingError: step 120: the gradient of blocks.2.ffn.up.weight is not finite"
    rounds = [_rounds(v, rng) for v in range(len(lines))]
    return variants, runs, _setup(lines, n_seeds, steps), rounds


def make_result(*args: object, **options: object) -> CompareResult:
    return summarise(*make_inputs(*args, **options))  # type: ignore[arg-type]


def _variant(i: int, line: str) -> VariantInfo:
    parts = {
        "embedding": 65 * 128,
        "position": 64 * 128 if i == 0 else 0,
        "attention": 262_144 - 20_000 * (i % 3),
        "ffn": 524_288 + 20_000 * (i % 3) + 300 * i,
        "norm": 1_152,
        "head": 0,
    }
    head = f"{line[:-1]}, " if line.endswith(")") else f"{line}("
    return VariantInfo(
        line=line,
        resolved=f"{head}d_model=128, n_layers=4, n_heads=4, d_ff={512 - 9 * i})",
        params=sum(parts.values()),
        flops_per_token=1.62e6 + 3e4 * i,
        params_by_part=parts,
        train_flops_per_token=4.9e6,
        kv_bytes_per_token=4096 / (1 + i % 3),
        match_note="" if i == 0 else f"ffn.d_ff 512 → {512 - 9 * i}",
        match_off=None if i == 0 else 0.0005 * i + (0.02 if i == 3 else 0),
        match_reached=i != 3,
        steps=300,
        lr=1e-3 if i % 2 == 0 else 3e-3,
        lr_grid=[
            LrTrial(lr=lr, val_loss=None if lr > 2e-3 and i == 2 else 1.9 + abs(math.log(lr / 1e-3)) / 20, seeds=[1000])
            for lr in (3e-4, 1e-3, 3e-3)
        ],
    )


def _rounds(v: int, rng: np.random.Generator) -> Measurements:
    slow = np.linspace(1, 0.8, 7) * (1 + 0.03 * rng.standard_normal(7))
    return Measurements(
        train_tokens_per_s=(21_000 / (1 + 0.12 * v) * slow).tolist(),
        decode_tokens_per_s=(830 * (1 + 0.2 * (v % 3)) * slow).tolist(),
        peak_memory_bytes=[6.1e8 - 2e7 * v],
    )


def _setup(lines: list[str], n_seeds: int, steps: int) -> Setup:
    return Setup(
        seeds=list(range(n_seeds)),
        dataset=DatasetInfo(
            name="shakespeare",
            fingerprint="sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            tokenizer="char",
            vocab_size=65,
            n_train_tokens=1_003_854,
            n_val_tokens=111_540,
        ),
        environment=Environment(
            headwise="0.1.0",
            python="3.11.7",
            torch="2.9.0",
            cpu="An Ordinary Processor @ 2.50GHz",
            cores=2,
            os="Linux 6.1 x86_64",
            device="cpu",
        ),
        settings={
            "steps": steps,
            "batch_size": 12,
            "seq_len": 64,
            "lr": 1e-3,
            "schedule": "cosine",
            "betas": [0.9, 0.99],
        },
        command="headwise compare " + " ".join(f"'{line}'" for line in lines) + f" --seeds {n_seeds} --steps {steps}",
        finished_at="2025-01-31T12:00:00Z",
        wall_seconds=1834.2,
    )
