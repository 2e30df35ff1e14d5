"""Settings of a distillation: how they are read, what recipes set, and what contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.distill import DistillSettings
from headwise.distill.settings import PRESETS
from headwise.distill.teacher import is_saved
from headwise.errors import SettingsError
from headwise.lab.ab.settings import ABSettings

BOTH: dict[str, Any] = {"teacher": "runs/t", "student": "llama"}


NAMES = ["runs/a", "m.gguf", "llama", "llama(d_model=8, attention=gqa(kv_heads=2), n_layers=1)"]


@given(st.lists(st.sampled_from(NAMES), min_size=1))
def test_teachers_in_one_text_are_parted_between_brackets(names: list[str]) -> None:
    assert DistillSettings(student="llama", teacher=", ".join(names)).teacher == tuple(names)
    assert DistillSettings(student="llama", teacher=tuple(names)).teacher == tuple(names)


def test_texts_as_the_command_line_gives_them() -> None:
    made = DistillSettings(**BOTH, logit_kd="2,0.5", stages="", teacher_weights="1")
    assert (made.logit_kd, made.stages, made.teacher_weights) == ((2.0, 0.5), (), (1.0,))
    assert DistillSettings(teacher=Path("runs/t"), student="llama").teacher == ("runs/t",)
    two = DistillSettings(teacher="a,b", student="llama", teacher_weights="router")
    assert two.teacher_weights == "router"


@pytest.mark.parametrize("recipe", PRESETS)
def test_a_recipe_sets_what_nobody_else_did(recipe: str) -> None:
    made = DistillSettings(**BOTH, recipe=recipe, lr=0.123).with_recipe()
    assert made.lr == 0.123
    assert DistillSettings(**BOTH, recipe=recipe, projection="flat").with_recipe().projection == "flat"
    for name, value in PRESETS[recipe].items():
        assert getattr(made, name) == value
    assert made.with_recipe() == made


def test_what_changes_no_number_is_no_difference() -> None:
    one = DistillSettings(**BOTH)
    assert one.differences(DistillSettings(**BOTH, run_name="x", cache_teacher=True, cache_dir=Path("y"))) == [
        "cache_teacher=True (was False)"
    ]
    assert one.differences(DistillSettings(**BOTH, side="student")) == ["side='student' (was 'teacher')"]


def test_models_on_disk_and_lines(tmp_path: Path) -> None:
    assert all(is_saved(name) for name in (str(tmp_path), "model.gguf", "runs/a"))
    assert not any(is_saved(name) for name in ("llama", "llama(d_model=8)", "gpt2(position=rope)"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": ()}, "teacher: none given"),
        ({"student": None}, "student: none given"),
        ({"teacher": "a,b", "cache_teacher": True, "cache_dir": "x"}, "cache_dir: one folder holds one teacher"),
        ({"teacher": "a,b", "teacher_weights": (0, 0)}, "teacher_weights: given"),
        ({"teacher_weights": "some"}, "should be numbers such as 1,0.5, one a teacher, or router"),
        ({"stages": (1.0, 2.0)}, "stages: 2 shares given, kv has 1"),
        ({"recipe": "mohawk", "vein_freeze": 3}, "vein_freeze: mohawk says"),
        ({"compile": True}, "compile: what is compared lies inside"),
        ({"use_elastic": 3}, "use_elastic"),
        ({"lambda_hidden": 1.0}, "unknown setting 'lambda_hidden'"),
    ],
)
def test_contradictions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        DistillSettings(**{**BOTH, **changes})
    assert message in str(caught.value)


def test_an_ab_has_every_setting_of_a_run() -> None:
    assert set(DistillSettings.model_fields) <= set(ABSettings.model_fields)
