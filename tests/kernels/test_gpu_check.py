"""`make gpu-check` without a GPU: that it says so, and that every line of it has run before a GPU is at hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def gpu_check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), *arguments],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def results(folder: Path) -> dict[str, object]:
    (kept,) = folder.glob("gpu-check-the-interpreter-*.json")
    assert kept.with_suffix(".md").read_text(encoding="utf-8").startswith("# GPU check: the interpreter")
    return json.loads(kept.read_text(encoding="utf-8"))


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = gpu_check("--out", str(tmp_path))
    assert done.returncode == 1
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def torch_alone(tmp_path: Path) -> str:
    """A folder that hides what the package needs besides torch and numpy: a GPU machine need not have it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[<>=!~;\[ ]", need, maxsplit=1)[0].replace("-", "_") for need in project["dependencies"]}
    folder = tmp_path / "hidden"
    folder.mkdir()
    for name in names - {"torch", "numpy"}:
        module = {"pyyaml": "yaml"}.get(name, name)
        (folder / f"{module}.py").write_text(f"raise ImportError('hidden', name={module!r})")
    return str(folder)


def test_the_kernels_part_needs_torch_and_triton_only(torch_alone: str, tmp_path: Path) -> None:
    done = gpu_check("--interpret", "--tune", "--out", str(tmp_path / "out"), PYTHONPATH=torch_alone)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"not run: models: \w+ is not installed", done.stdout)
    kept = results(tmp_path / "out")
    assert set(kept["tables"]) == {"kernels", "speed", "more-speed"}
    assert all(kept["reached"][name] for name in kept["reached"] if name.startswith("kernels"))
    ours = [row for row in kept["speed"] if row["name"] == "headwise flash"]
    assert {row["variant"] for row in ours} == {"causal", "window", "key bias", "soft cap"}
    assert all(row["ms"] > 0 for row in ours)
    # The one thing that a processor cannot do: FlexAttention backward; and stock attention on NVIDIA's cuDNN.
    failed = {(row["name"], row["direction"]) for row in kept["speed"] if row["note"]}
    assert {name for name, _ in failed} <= {"FlexAttention, compiled", "SDPA, cuDNN"}
    assert ("FlexAttention, compiled", "forward") not in failed


def test_the_models_part_runs_the_lines_of_the_suite(tmp_path: Path) -> None:
    done = gpu_check("--interpret", "--only", "models", "--out", str(tmp_path))
    kept = results(tmp_path)
    assert all(kept["reached"].values()), done.stdout[-2000:]
    promises = {name.rpartition(": ")[2] for name in kept["reached"]}
    assert {"fast = naive, float32", "packed", "cache", "causal", "bfloat16 at 4096", "compiled"} <= promises
    assert done.returncode == 0


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    done = gpu_check("--interpret", "--only", "kernels", "--minutes", "0", "--out", str(tmp_path))
    assert done.returncode == 0
    assert "not run: kernels: causal, bfloat16: out of time" in done.stdout
