"""A comparison of lines with a vein and lines without: what is asked of the vein holds where there is one."""

from __future__ import annotations

import pytest

from headwise.errors import SettingsError
from headwise.lab.plan import make_plan
from headwise.lab.settings import CompareSettings
from headwise.spec import parse
from headwise.train.settings import TrainSettings
from headwise.train.vein import fitting

PLAIN = "llama(d_model=32, n_layers=1, n_heads=2)"
VEIN = "llama(d_model=32, n_layers=1, n_heads=2, ffn=vft(rank=4))"
COMPENSATED = "llama(d_model=32, n_layers=1, n_heads=2, ffn=vft(rank=4, s_normals=1))"
ASKED = {"vein_lr": 0.2, "vein_freeze": 3, "tau_schedule": (0.25, 0.1), "steps": 10}


@pytest.mark.parametrize(
    ("line", "kept"),
    [(PLAIN, set()), (VEIN, {"vein_lr", "vein_freeze"}), (COMPENSATED, {"vein_lr", "vein_freeze", "tau_schedule"})],
)
def test_settings_of_a_vein_hold_where_there_is_one(line: str, kept: set[str]) -> None:
    settings = fitting(TrainSettings(**ASKED), parse(line))
    assert {name for name in ("vein_lr", "vein_freeze", "tau_schedule") if getattr(settings, name)} == kept
    assert settings.steps == 10


def test_each_run_of_a_comparison_gets_the_settings_that_fit_it(tmp_path: object) -> None:
    plan = make_plan([PLAIN, COMPENSATED], CompareSettings(**ASKED, match="none"))
    given = [plan.train_task(index, 0, 1e-3, tmp_path).payload["settings"] for index in (0, 1)]  # type: ignore[arg-type]
    assert [each["vein_lr"] for each in given] == [None, 0.2]
    assert [each["tau_schedule"] for each in given] == [[], [0.25, 0.1]]


def test_settings_that_no_line_has_a_use_for_are_refused_together() -> None:
    with pytest.raises(SettingsError) as caught:
        make_plan([PLAIN, PLAIN], CompareSettings(**ASKED))
    assert len(caught.value.problems) == 3
