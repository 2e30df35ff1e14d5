"""Every test packs into a cache of its own, and waits for no disk: only tests/io is about what survives a crash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HEADWISE_CACHE", str(folder))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return folder
