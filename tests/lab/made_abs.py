"""Made-up records of A/B runs: losses with effects and noise, cosines beside their control, curves that fall."""

from __future__ import annotations

import numpy as np

from headwise.lab.ab.arms import parse_arms
from headwise.lab.ab.result import SHUFFLED, ABResult, DistillRecord, Likeness
from headwise.lab.ab.summary import summarise_ab
from headwise.lab.result import DatasetInfo, Environment, Series, Setup, VariantInfo

FIELDS = ("share_dim_proj", "init_uniform", "lambda_kv", "logit_kd", "kv_loss", "projection")
ARMS = "flat,none,structured,structured:share=no,structured:init=random"
# Relative to flat: what the validation loss gains, and the cosine with the own and with shuffled teachers.
EFFECTS = {"none": 0.05, "flat": 0.0, "structured": -0.05}
EFFECTS |= {"structured:share=no": -0.07, "structured:init=random": -0.02}
COSINES = {"flat": (0.8, 0.3), "structured": (0.9, 0.3), "structured:share=no": (0.92, 0.3)}
COSINES |= {"structured:init=random": (0.97, 0.965)}
LAYERS, STEPS = 3, 300
MEASURES = ("cosine_k", "cosine_v", "cka_k", "cka_v")


def make_inputs(
    arms: str = ARMS, n_seeds: int = 6, noise: float = 0.004, seed: int = 0
) -> tuple[list[DistillRecord], Setup]:
    """Records of all runs, and the setup; one run fails where there are several arms."""
    rng = np.random.default_rng(seed)
    parsed = parse_arms(arms, FIELDS)
    runs = []
    for s in range(n_seeds):
        shared = 0.05 * rng.standard_normal()
        for v, arm in enumerate(parsed):
            final = 2.0 * (1 + EFFECTS.get(arm.name, 0.0)) + shared + noise * rng.standard_normal()
            runs.append(_record(v, s, final, COSINES.get(arm.name), rng))
    setup = Setup(
        seeds=list(range(n_seeds)),
        dataset=DatasetInfo(name="shakespeare", fingerprint="sha256:00", tokenizer="teacher", vocab_size=65),
        environment=Environment(headwise="0.1.0", cpu="An Ordinary Processor", cores=2),
        settings={"steps": STEPS, "lambda_kv": 0.5},
        command=f"headwise distill ab --arms '{arms}' --seeds {n_seeds}",
        finished_at="2025-01-31T12:00:00Z",
        wall_seconds=640.0,
    )
    return runs, setup


def make_ab(arms: str = ARMS, n_seeds: int = 6, noise: float = 0.004, seed: int = 0) -> ABResult:
    runs, setup = make_inputs(arms, n_seeds, noise, seed)
    return judged(runs, setup, arms)


def judged(runs: list[DistillRecord], setup: Setup, arms: str = ARMS) -> ABResult:
    parsed = parse_arms(arms, FIELDS)
    return summarise_ab(
        parsed,
        [
            VariantInfo(line=arm.name, resolved="llama(d_model=64)", params=140_000, flops_per_token=3e5, steps=STEPS)
            for arm in parsed
        ],
        runs,
        setup,
        teacher=["runs/teacher"],
        student="llama(d_model=64)",
        commands=[f"headwise distill run --projection {arm.projection} --out runs/{arm.name}" for arm in parsed],
    )


def _record(
    v: int, s: int, final: float, cosines: tuple[float, float] | None, rng: np.random.Generator
) -> DistillRecord:
    step = np.arange(10, STEPS + 1, 10)
    curve = final + (4.2 - final) * np.exp(-6 * step / STEPS)
    curve[-1] = final
    likeness = {}
    for name in MEASURES if cosines else ():
        for which, end in zip(("", SHUFFLED), cosines or ()):
            layers = (end + 0.01 * np.arange(LAYERS) - 0.01 + 0.002 * rng.standard_normal(LAYERS)).tolist()
            course = Series(step=[100, 200, 300], loss=[0.2, 0.6 * end + 0.1, float(np.mean(layers))])
            likeness[name + which] = Likeness(layers=layers, course=course)
    return DistillRecord(
        variant=v,
        seed=s,
        val_loss=final,
        train_curve=Series(step=step.tolist(), loss=(curve - 0.1).tolist()),
        val_curve=Series(step=step.tolist(), loss=curve.tolist()),
        seconds=40.0 + v,
        val_loss_by_part={"prompt": final + 0.1, "answer": final - 0.2},
        likeness=likeness,
        aligner_params=1000 * v,
        tokens_per_s=9000.0,
    )
