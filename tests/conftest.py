"""Every test: seeded, single-threaded, and uninitialised memory poisoned with NaN, so that reading it shows."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _torch_settings() -> None:
    torch.set_num_threads(1)
    # Only filled where determinism is asked for: turning it on globally would also change which kernels run.
    torch.utils.deterministic.fill_uninitialized_memory = True
