"""Benchmarks of mechanisms: time and memory against length, next to torch's own attention in the same run."""

from headwise.lab.bench.run import bench as bench
