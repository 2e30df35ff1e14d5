"""What a job's teachers are asked for in training, and where it is kept: `--cache-teacher`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from headwise.data.windows import WindowBatches
from headwise.distill.matching import Matching
from headwise.distill.store import StoreKey, TeacherStore
from headwise.train.job import torch_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from headwise.distill.job import DistillJob
    from headwise.distill.settings import DistillSettings
    from headwise.distill.teacher import Teacher
    from headwise.spec import ModelSpec


def needed_of(job: DistillJob, teacher: Teacher) -> frozenset[str]:
    """The signals of a teacher that training asks for."""
    return sketch(teacher, job.spec, job.settings).of_teacher


def sketch(teacher: Teacher, student: ModelSpec, settings: DistillSettings) -> Matching:
    """What a run would match the two by, to be looked at; no random number is drawn from the caller's."""
    with torch.random.fork_rng(devices=[]):
        return Matching(teacher.spec, student, settings)


def store_of(job: DistillJob, teacher: Teacher) -> TeacherStore | None:
    """Where what the teacher makes of the training windows is kept; None where it is asked for nothing.

    Raises DataError where the folder holds a cache of another teacher, data set, length or dtype.
    """
    settings, fields = job.settings, needed_of(job, teacher)
    if not fields:
        return None
    own = teacher.windows.get("train")
    lengths = batches_of(job).windows.lengths if own is None else own.lengths
    data, seq_len = job.dataset.fingerprint, settings.seq_len
    if own is not None:
        data, seq_len = own.fingerprint, own.seq_len
    key = StoreKey(teacher.fingerprint, data, seq_len, settings.cache_dtype)
    folder = settings.cache_dir or key.folder().with_name("-".join([key.folder().name, *sorted(fields)]))
    return TeacherStore(folder, key, lengths, fields)


def cache_size(job: DistillJob) -> int:
    """Bytes that the teachers' caches take, or would, for this run, beyond what is there already."""
    total = 0
    for teacher in job.teachers:
        if (store := teacher.store or store_of(job, teacher)) is not None:
            rows = store.missing(batches_of(job).rows_of(job.settings.steps))
            total += store.size_of(rows, teacher.shapes(needed_of(job, teacher)))
    return total


def fill_stores(job: DistillJob, say: Callable[[str], None], progress: bool | None) -> None:
    """Compute what is to be kept and is not there yet. Raises as `TeacherStore.fill`."""
    batches = batches_of(job)
    for teacher in job.teachers:
        if teacher.store is None:
            continue
        fields = needed_of(job, teacher)

        def read(row: int, teacher: Teacher = teacher, fields: frozenset[str] = fields) -> dict[str, Tensor]:
            own = teacher.windows.get("train")
            ids_1T = (batches.windows if own is None else own).batch(np.array([row])).ids
            n = int((batches.windows if own is None else own).lengths[row])
            return {name: tensor[0] for name, tensor in teacher.read(ids_1T[:, :n].to(teacher.device), fields).items()}

        with torch_state(job.settings, job.device):  # the threads of a live teacher: their number decides last bits
            teacher.store.fill(batches.rows_of(job.settings.steps), read, say=say, progress=progress)


def batches_of(job: DistillJob) -> WindowBatches:
    """The training batches, a pure function of the step."""
    settings = job.settings
    rows = settings.batch_size * settings.accumulate
    return WindowBatches(job.dataset.train, rows, settings.seq_len, settings.seed, settings.loss_on)
