"""The grammar of arms: what each piece sets, and every mistake named at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.distill.settings import DistillSettings
from headwise.errors import SettingsError
from headwise.lab.ab.arms import PROJECTIONS, SHARED, parse_arms
from headwise.lab.ab.settings import ABSettings

FIELDS = DistillSettings.model_fields


def made(arms: str | list[str], **changes: object) -> ABSettings:
    return ABSettings(**{"teacher": "runs/teacher", "student": "llama", "arms": arms, **changes})  # type: ignore[arg-type]


def test_document_004s_matrix_is_four_arms_and_one_without() -> None:
    arms = parse_arms("none,flat,structured,structured:share=no,structured:init=random", FIELDS)
    assert [arm.changes for arm in arms] == [
        {"projection": "none"},
        {"projection": "flat"},
        {"projection": "structured"},
        {"projection": "structured", "share_dim_proj": False},
        {"projection": "structured", "init_uniform": False},
    ]
    assert arms[3].name == "structured:share=no"


def test_any_setting_of_distillation_and_commas_within_brackets() -> None:
    (first, second) = parse_arms(" flat : lambda-kv=1e-2:structural_loss=yes , structured:logit_kd=(2,0.5)", FIELDS)
    assert first.name == "flat:lambda-kv=1e-2:structural_loss=yes"
    assert first.changes == {"projection": "flat", "lambda_kv": "1e-2", "structural_loss": True}
    settings = made("flat,structured:logit_kd=(2,0.5)").for_run(second, 3, "out", 1, 40)  # type: ignore[arg-type]
    assert (settings.logit_kd, settings.seed, settings.projection) == ((2.0, 0.5), 3, "structured")
    assert (settings.steps, settings.eval_every) == (40, 4)


CHANGES = st.dictionaries(
    st.sampled_from(["lambda_kv", "mlp_ratio", "lr", "hidden"]), st.floats(0.01, 10).map(repr), max_size=3
)


@given(st.lists(st.tuples(st.sampled_from(PROJECTIONS), CHANGES), min_size=1, max_size=5))
def test_a_name_says_its_arm_whole(arms: list[tuple[str, dict[str, str]]]) -> None:
    """Read back, the printed name is the same arm; and no two arms of one A/B are the same."""
    texts = [":".join([kind, *(f"{key}={value}" for key, value in changes.items())]) for kind, changes in arms]
    expected = [{"projection": kind, **changes} for kind, changes in arms]
    if any(one == other for i, one in enumerate(expected) for other in expected[:i]):
        with pytest.raises(SettingsError, match="the same as"):
            parse_arms(",".join(texts), FIELDS)
        return
    parsed = parse_arms(",".join(texts), FIELDS)
    assert [arm.changes for arm in parsed] == expected
    assert parse_arms([arm.name for arm in parsed], FIELDS) == parsed


def test_all_mistakes_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        made("flatt,structured:shre=no,flat,flat,none:seed=3,structured:init=odd,flat:lambda_kv", seeds=0)
    text = str(caught.value)
    for words in (
        "unknown projection 'flatt' (did you mean 'flat'?)",
        "unknown setting 'shre' (did you mean 'share'?)",
        "seed is the same for all arms; give it as --seed",
        "unknown init 'odd'; allowed: random, uniform",
        "'lambda_kv' should be a setting and its value, as share=no",
        "'flat' is the same as 'flat'; give each once",
        "seeds: given 0, at least one is needed",
    ):
        assert words in text, words


def test_a_value_that_an_arm_cannot_have_is_named_with_its_arm() -> None:
    with pytest.raises(SettingsError, match=r"arms: in 'flat:lambda_kv=-1': lambda_kv: given '-1'"):
        made("flat:lambda_kv=-1,structured")
    with pytest.raises(SettingsError, match="structural_loss: compares projected caches"):
        made("none:structural_loss=yes,flat")


def test_the_baseline_stands_first() -> None:
    """Document 004 holds everything against flat; without it, the first arm."""
    assert [arm.name for arm in made("none,structured,flat").arm_list] == ["flat", "none", "structured"]
    assert [arm.name for arm in made(["none", "structured"]).arm_list] == ["none", "structured"]
    assert made("none,flat,structured", baseline="structured").arm_list[0].name == "structured"
    with pytest.raises(SettingsError, match="baseline: given 'nil', the arms are none, flat"):
        made("none,flat", baseline="nil")
    with pytest.raises(SettingsError, match="projection: is what arms differ in"):
        made("none,flat", projection="flat")


def test_only_what_adds_runs_or_judges_them_may_change_when_an_ab_goes_on() -> None:
    before = made("none,flat")
    after = made("structured,none", seeds=9, margin=0.01, alpha=0.01, workers=2, baseline="none")
    assert before.differences(after) == []
    assert before.differences(made("none,flat", lambda_kv=1.0)) == ["lambda_kv=1.0 (was 0.5)"]


def test_what_is_shared_is_a_setting() -> None:
    assert set(FIELDS) >= SHARED
