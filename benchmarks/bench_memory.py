"""Peak memory of a training step against length, for plain, GQA, RoPE, ALiBi and window attention.

One layer, 512 to 8192 tokens. Each figure is the growth of a fresh process's peak resident memory over forward and
backward. Target: linear growth, that is, doubling the length about doubles the memory (2.3× allowed); one float32 score
matrix at 8192 tokens would be 1 GiB.
"""

from __future__ import annotations

import resource
import subprocess
import sys

from common import report

WIDTHS = "d_model=128, n_layers=1, n_heads=4, vocab_size=65, max_seq_len=8192"
LINES = {
    "softmax": f"llama({WIDTHS}, position=none)",
    "gqa": f"llama({WIDTHS}, position=none, attention=gqa(kv_heads=2))",
    "rope": f"llama({WIDTHS})",
    "alibi": f"llama({WIDTHS}, position=alibi)",
    "window": f"llama({WIDTHS}, attention=window(256))",
}
LENGTHS = [512, 1024, 2048, 4096, 8192]


def peak(line: str, length: int) -> int:
    """Bytes that one training step adds to this process's peak memory."""
    import torch

    import headwise as hw

    torch.set_num_threads(1)
    model = hw.build(line)
    model(torch.zeros(1, 64, dtype=torch.long)).sum().backward()  # what torch sets up once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model(torch.zeros(1, length, dtype=torch.long)).sum().backward()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in LINES:
        print(peak(LINES[sys.argv[1]], int(sys.argv[2])))
        raise SystemExit
    figures: dict[str, dict[int, float]] = {}
    for name in LINES:
        sizes = [
            int(subprocess.run([sys.executable, __file__, name, str(n)], check=True, capture_output=True).stdout)
            for n in LENGTHS
        ]
        figures[name] = {n: round(size / 2**20, 1) for n, size in zip(LENGTHS, sizes)}
    reached = {f"{name} linear from 2048 to 8192": mib[8192] <= 2.3**2 * mib[2048] for name, mib in figures.items()}
    report("memory-against-length", {"peak_mib": figures}, reached=reached)
