"""Speed and memory of architectures, measured next to one another so that a noisy machine is noisy for all.

Speed: all models live in one process. In each round every one of them, in an order that rotates from round to round,
does a few training steps and decodes a few tokens with its key/value cache; so the ratios of one round were taken
within a second or two. Every variant does the same number of steps: as many as take the first one `SLICE_SECONDS`.

Memory: a fresh process a model (see `headwise.lab.worker`), and in it the peak of two training steps over what the
process held before the model was built: parameters, gradients, optimiser state and activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from headwise.errors import HeadwiseError
from headwise.lab.timing import resident_peak
from headwise.spec import parse
from headwise.train.job import Job, prepare, torch_state
from headwise.train.settings import TrainSettings
from headwise.train.trainer import Trainer
from headwise.train.vein import fitting

if TYPE_CHECKING:
    from headwise.data import Dataset

SLICE_SECONDS = 0.2
MOST_STEPS = 50
DECODED_TOKENS = 33


def speed(
    lines: Sequence[str], settings: TrainSettings, dataset: Dataset, rounds: int, *, decode: bool = True
) -> list[dict[str, list[float]]]:
    """`train_tokens_per_s` and `decode_tokens_per_s` of each line, one entry a round.

    `decode_tokens_per_s` stays empty where `decode` is False, and for encoders, which generate nothing. A line whose
    training fails within the few steps has empty lists.
    """
    models = [_Timed(line, settings, dataset) for line in lines]
    steps = 1
    for model in models:
        model.train_seconds(1)
        if decode:
            model.decode_seconds()
    one_step = models[0].train_seconds(1)
    if one_step is not None:
        steps = max(1, min(MOST_STEPS, round(SLICE_SECONDS / one_step)))
    for number in range(rounds):
        first = number % len(models)
        for model in models[first:] + models[:first]:
            model.measure(steps, decode=decode)
    return [{"train_tokens_per_s": model.train, "decode_tokens_per_s": model.decode} for model in models]


class _Timed:
    """One model, and what was measured of it."""

    def __init__(self, line: str, settings: TrainSettings, dataset: Dataset) -> None:
        self.trainer: Trainer | None = None
        self.train: list[float] = []
        self.decode: list[float] = []
        self._settings = settings
        self._job = _job(line, settings, dataset)
        with torch_state(settings, self._job.device):
            self.trainer = Trainer(self._job)
        self._prompt = [int(i) for i in dataset.train.array[: max(1, settings.seq_len // 2)]]

    def measure(self, steps: int, *, decode: bool) -> None:
        """One round's share."""
        seconds = self.train_seconds(steps)
        if seconds is not None and self.trainer is not None:
            self.train.append(steps * self.trainer.tokens_per_step / seconds)
        timed = self.decode_seconds() if decode else None
        if timed is not None:
            self.decode.append(timed[0] / timed[1])

    def train_seconds(self, steps: int) -> float | None:
        """How long `steps` updates take; None once one has failed."""
        if self.trainer is None:
            return None
        try:
            return self._timed(lambda: [self.trainer.update() for _ in range(steps)])  # type: ignore[union-attr]
        except HeadwiseError:
            self.trainer, self.train = None, []
            return None

    def decode_seconds(self) -> tuple[int, float] | None:
        """How many tokens were decoded after the first one (the prompt's pass), and how long that took."""
        from headwise.generate import stream_ids

        room = self._job.spec.dims.max_seq_len - len(self._prompt)
        if self.trainer is None or self._job.spec.architecture == "encoder" or room < 2:
            return None
        wanted = min(DECODED_TOKENS, room)
        stream = stream_ids(self.trainer.model, self._prompt, max_new_tokens=wanted, temperature=0)
        next(stream)
        return wanted - 1, self._timed(lambda: list(stream))

    def _timed(self, work: Callable[[], object]) -> float:
        device = self._job.device
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(line: str, settings: TrainSettings, dataset: Dataset) -> float:
    """Bytes that building the model and two training steps take at their peak; in a process that did nothing else.

    On a GPU torch's allocated memory, on a CPU the resident memory beyond what the process held before.
    """
    job = _job(line, settings, dataset)
    with torch_state(settings, job.device):
        if job.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(job.device)
            before = float(torch.cuda.memory_allocated(job.device))
            _two_steps(Trainer(job))
            return torch.cuda.max_memory_allocated(job.device) - before
        # The libraries' own buffers and code pages, which the first step of any model brings in, are no model's cost.
        _two_steps(Trainer(_job("gpt2(d_model=32, n_layers=1, n_heads=2)", settings, dataset)))
        before = resident_peak(reset=True)
        _two_steps(Trainer(job))
        return resident_peak() - before


def _job(line: str, settings: TrainSettings, dataset: Dataset) -> Job:
    spec = parse(line)
    return prepare(spec, fitting(settings, spec), dataset)


def _two_steps(trainer: Trainer) -> None:
    # Two: gradients and the optimiser's state exist at the same time as activations only from the second step on.
    trainer.update()
    trainer.update()
