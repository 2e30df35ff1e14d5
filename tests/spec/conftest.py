"""Property tests draw the same examples in every run, and are not hurried."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "spec",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
settings.load_profile("spec")
