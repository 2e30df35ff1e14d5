"""Training speed: one run and two workers against a plain eager loop, and a compiled step against matrix products.

The setting is nanoGPT's for a CPU (`nanogpt.py`), the same model on both sides. Our side is `headwise.train` as it is,
data, guards, schedule and metrics included; the peer is the plain loop. Rounds are interleaved, every figure is a ratio.

Targets: one run at least 1.1× the plain loop, two workers together at least 1.8×, and the compiled training step of a
10 M model at least 60 % of the rate at which this machine multiplies matrices.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import torch

import headwise as hw
from common import interleaved, report
from headwise.data import load_dataset
from headwise.train import TrainSettings
from headwise.train.job import prepare
from headwise.train.trainer import Trainer
from nanogpt import LINE, SETTINGS, PlainLoop

STEPS = 100
TOKENS = STEPS * 12 * 64


def trainer(line: str, **settings: object) -> Trainer:
    return Trainer(prepare(hw.parse(line), TrainSettings(**settings), load_dataset()))  # type: ignore[arg-type]


def run(one: Trainer, steps: int = STEPS) -> None:
    for _ in range(steps):
        one.update()


def plain_loop() -> PlainLoop:
    return PlainLoop(torch.from_numpy(load_dataset().train.array.astype("int64")))


def worker(kind: str, rounds: int) -> None:
    """A process that runs rounds when it is told to on stdin, in one thread, and answers with their seconds."""
    torch.set_num_threads(1)
    plain, ours = plain_loop(), trainer(LINE, **SETTINGS)

    def task(steps: int) -> None:
        plain.run(steps) if kind == "plain" else run(ours, steps)

    task(STEPS)
    print("ready", flush=True)
    for _ in range(rounds):
        sys.stdin.readline()
        start = time.perf_counter()
        task(STEPS)
        print(time.perf_counter() - start, flush=True)


class Worker:
    def __init__(self, kind: str, rounds: int) -> None:
        command = [sys.executable, __file__, "--worker", kind, "--rounds", str(rounds)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def start(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)

    def seconds(self) -> float:
        assert self.process.stdout is not None
        return float(self.process.stdout.readline())


def against_the_plain_loop(rounds: int) -> dict[str, float]:
    """Tokens a second, as ratios to the plain loop with all threads and with one."""
    threads = torch.get_num_threads()
    plain, ours = plain_loop(), trainer(LINE, **SETTINGS)
    pair = [Worker("ours", 2 * rounds + 1) for _ in range(2)]
    single = Worker("plain", rounds + 1)

    def one_alone(w: Worker) -> None:
        w.start()
        w.seconds()

    def both() -> None:
        for w in pair:
            w.start()
        for w in pair:
            w.seconds()

    seconds = interleaved(
        {
            "plain": lambda: plain.run(STEPS),
            "ours": lambda: run(ours),
            "plain, 1 thread": lambda: one_alone(single),
            "two workers": both,
        },
        rounds,
    )
    rate = {
        name: [TOKENS * (2 if name == "two workers" else 1) / s for s in values] for name, values in seconds.items()
    }

    def ratio(a: str, b: str) -> float:
        return round(statistics.median(x / y for x, y in zip(rate[a], rate[b])), 3)

    return {
        "threads": threads,
        "plain loop, tokens/s": round(statistics.median(rate["plain"])),
        "one run / plain loop": ratio("ours", "plain"),
        "two workers / plain loop": ratio("two workers", "plain"),
        "two workers / plain loop in one thread": ratio("two workers", "plain, 1 thread"),
    }


def compiled_step(rounds: int) -> dict[str, float]:
    """The compiled training step of a 10 M model against the rate of one large matrix product, both in all threads."""
    line = "gpt2(d_model=512, n_layers=3, n_heads=8, bias=false, ffn=mlp(gelu))"
    ours = trainer(line, seq_len=256, batch_size=8, compile=True, steps=10_000)
    flops = hw.count(ours.job.spec, context=256).train_flops_per_token * 8 * 256
    a = torch.randn(2048, 2048)
    seconds = interleaved({"step": ours.update, "product": lambda: a @ a}, rounds)
    rate = {"step": [flops / s for s in seconds["step"]], "product": [2 * 2048**3 / s for s in seconds["product"]]}
    best = max(rate["product"])
    return {
        "line": line,  # type: ignore[dict-item]
        "params": hw.count(ours.job.spec).params,
        "matrix product, GFLOP/s (median)": round(statistics.median(rate["product"]) / 1e9, 1),
        "step, GFLOP/s (median)": round(statistics.median(rate["step"]) / 1e9, 1),
        "step / product": round(statistics.median(s / p for s, p in zip(rate["step"], rate["product"])), 3),
        "step (median) / product (best)": round(statistics.median(rate["step"]) / best, 3),
    }


if __name__ == "__main__":
    if "--worker" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--worker")
        parser.add_argument("--rounds", type=int)
        arguments = parser.parse_args()
        worker(arguments.worker, arguments.rounds)
        raise SystemExit
    loop, step = against_the_plain_loop(9), compiled_step(15)
    report(
        "training-speed",
        {"nanogpt setting": loop, "compiled 10 M step": step},
        reached={
            "one run at least 1.1x": loop["one run / plain loop"] >= 1.1,
            "two workers at least 1.8x": loop["two workers / plain loop"] >= 1.8,
            "compiled step at least 60 % of the product": step["step / product"] >= 0.6,
        },
    )
