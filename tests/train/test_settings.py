"""Settings: every mistake at once, in words; nothing accepted that training could not use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.errors import SettingsError
from headwise.train import TrainSettings


def test_every_field_says_what_it_is() -> None:
    for name, field in TrainSettings.model_fields.items():
        assert field.description, name
        assert name.replace("_", "").isalnum(), name


def test_all_problems_come_at_once_with_the_nearest_spelling() -> None:
    with pytest.raises(SettingsError) as caught:
        TrainSettings(lr=-1, warm_up=5, betas=(0.9, 1.0), schedule="cosin", warmup=500, steps=300)  # type: ignore[call-arg, arg-type]
    message = str(caught.value)
    assert message.startswith("5 problems")
    for part in ("lr: given -1", "did you mean 'warmup'?", "betas: given (0.9, 1.0)", "'cosine'", "steps=300"):
        assert part in message


def test_a_rule_is_silent_about_a_field_that_is_wrong_by_itself() -> None:
    with pytest.raises(SettingsError) as caught:
        TrainSettings(steps="many", warmup=500)  # type: ignore[arg-type]
    assert "steps: given 'many'" in str(caught.value)
    assert "warmup" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"min_lr": 1.0, "lr": 0.1},
        {"betas": (-0.1, 0.9)},
        {"betas": (0.9, 0.99, 0.999)},
        {"warmup": -1},
        {"warmup": 301},
        {"steps": 0},
        {"batch_size": 0},
        {"accumulate": 0},
        {"seq_len": 1},
        {"weight_decay": -0.1},
        {"clip": -1},
        {"dtype": "float64"},
        {"dtype": "float16", "device": "cpu"},
        {"lr_multipliers": {"*": -1}},
        {"lr_multipliers": {"*": float("inf")}},
        {"tensorboard": True},
        {"seed": -1},
        {"threads": 0},
        {"decay_fraction": 0},
        {"val_fraction": 1.0},
        {"batch-size": 3},
    ],
)
def test_each_wrong_value_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError) as caught:
        TrainSettings(**wrong)  # type: ignore[arg-type]
    assert next(iter(wrong)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainSettings().lr = 1.0  # type: ignore[misc]


@given(
    lr=st.floats(1e-6, 1, exclude_min=True),
    steps=st.integers(1, 10**6),
    warmup=st.none() | st.integers(0, 100),
    out=st.none() | st.just("a/b"),
    multipliers=st.dictionaries(st.text(min_size=1), st.floats(0, 10), max_size=3),
)
def test_json_brings_settings_back_exactly(
    lr: float, steps: int, warmup: int | None, out: str | None, multipliers: dict[str, float]
) -> None:
    """run.json pins settings as JSON: what is read must be what was chosen, to the last bit."""
    if warmup is not None:
        steps += warmup
    settings = TrainSettings(lr=lr, steps=steps, warmup=warmup, out=out, lr_multipliers=multipliers)  # type: ignore[arg-type]
    again = TrainSettings.model_validate_json(settings.model_dump_json())
    assert again == settings
    assert settings.differences(again) == []


def test_differences_name_the_field_and_both_values() -> None:
    assert TrainSettings(lr=1e-3).differences(TrainSettings(lr=2e-3, out="x")) == ["lr=0.002 (was 0.001)"]  # type: ignore[arg-type]
