"""From made-up records to verdicts: pairs, steps to the baseline's loss, likeness and its control, the claims."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_abs import ARMS, COSINES, EFFECTS, LAYERS, judged, make_ab, make_inputs

from headwise.errors import SettingsError
from headwise.lab.ab.markdown import markdown
from headwise.lab.ab.result import ABResult
from headwise.lab.ab.summary import first_at, gaps
from headwise.lab.ab.words import contrast, headline, likeness, reach, sentences
from headwise.lab.claims import CLAIMS, Finding, findings, judge
from headwise.lab.result import Series
from headwise.lab.stats import assess, assess_pairs


@pytest.fixture(scope="module")
def result() -> ABResult:
    return make_ab()


def variant(result: ABResult, name: str) -> int:
    return [arm.arm for arm in result.arms].index(name)


# --- statistics -------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(1, 3), min_size=6, max_size=6), min_size=2, max_size=5))
def test_pairs_with_one_baseline_are_a_comparison(rows: list[list[float]]) -> None:
    base, *others = rows
    assert assess_pairs([(base, row) for row in others]) == assess(base, others)


def test_a_pair_is_judged_against_its_own_baseline_and_corrected_for_all() -> None:
    one, two = [1.0, 1.1, 1.2, 1.0, 1.15, 1.3], [2.0, 2.2, 2.1, 2.0, 2.3, 2.15]
    low = [0.9, 1.02, 1.09, 0.91, 1.03, 1.2]
    both = assess_pairs([(one, low), (two, two)])
    (alone,) = assess(one, [low])
    assert both[0].p == alone.p
    assert both[0].p_holm == pytest.approx(2 * (alone.p_holm or 0))
    assert both[1].verdict == "equivalent"


def test_arms_are_judged_as_lines_are(result: ABResult) -> None:
    for arm, row in zip(result.arms, result.variants, strict=True):
        expected = EFFECTS[arm.arm]
        if row.diff is None:
            assert arm.arm == "flat"
            continue
        assert row.diff.relative == pytest.approx(expected, abs=0.01)
        assert row.diff.verdict == ("worse" if expected > 0 else "better")
    base = assess(result.variants[0].val_loss.per_seed, [v.val_loss.per_seed for v in result.variants[1:]])
    assert [v.diff and v.diff.p_holm for v in result.variants[1:]] == [each.p_holm for each in base]


def test_contrasts_are_the_pairs_that_differ_in_one_setting(result: ABResult) -> None:
    assert {(each.arm, each.against) for each in result.contrasts} == {
        ("flat", "none"),
        ("structured", "none"),
        ("structured", "flat"),
        ("structured:share=no", "structured"),
        ("structured:init=random", "structured"),
    }
    each = next(c for c in result.contrasts if c.arm == "structured:init=random")
    assert each.question == "init_uniform: no instead of yes"
    assert (each.diff.verdict, each.train_diff.verdict) == ("worse", "worse")
    assert each.gap is not None
    assert each.gap.mean == pytest.approx(0.005 - 0.6, abs=0.01)
    assert "cosine beyond shuffled −0.59" in contrast(each)


def test_a_failed_run_leaves_its_pairs_and_is_named() -> None:
    runs, setup = make_inputs()
    runs[2].val_loss, runs[2].error = None, "TrainingError: step 7: the loss is nan"
    result = judged(runs, setup)
    arm = result.arms[2]
    assert (arm.arm, result.variants[2].diff and result.variants[2].diff.n) == ("structured", 5)
    assert arm.train_loss.per_seed[0] is None
    assert arm.alignment["cosine_k"].per_seed[0] is None
    assert (arm.steps_to_baseline.n_pairs, arm.steps_to_baseline.per_seed[0]) == (5, None)
    assert "structured, seed 0: TrainingError" in markdown(result)


# --- steps to the baseline's loss -------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.floats(0, 10))
def test_first_step_at_a_loss(losses: list[float], goal: float) -> None:
    """By the definition: the first point at or below, or where the line to it from the point before crosses."""
    curve = Series(step=[10 * (i + 1) for i in range(len(losses))], loss=losses)
    found = first_at(curve, goal)
    below = [i for i, loss in enumerate(losses) if loss <= goal]
    if not below:
        assert found is None
        return
    i = below[0]
    share = 1.0 if i == 0 else (losses[i - 1] - goal) / (losses[i - 1] - losses[i])
    assert found == pytest.approx(10 * (i + share))


def test_steps_to_the_baselines_loss(result: ABResult) -> None:
    """The baseline needs all its steps, a better arm fewer, a worse one never arrives."""
    base = result.arms[variant(result, "flat")].steps_to_baseline
    assert base.per_seed == [300.0] * 6
    better = result.arms[variant(result, "structured")].steps_to_baseline
    assert better.mean is not None
    assert 100 < better.mean < 250
    worse = result.arms[variant(result, "none")].steps_to_baseline
    assert (worse.mean, worse.n_reached, worse.n_pairs) == (None, 0, 6)
    assert reach(worse, 300) == "never"
    assert reach(better.model_copy(update={"n_reached": 4}), 300).endswith("of 300 (4 of 6 seeds)")


# --- likeness ---------------------------------------------------------------------------------------------------------


def test_likeness_has_its_control_beside_it(result: ABResult) -> None:
    for name, (own, shuffled) in COSINES.items():
        arm = result.arm(name)
        alignment = arm.alignment["cosine_v"]
        assert len(alignment.layers) == len(alignment.shuffled_layers) == LAYERS
        assert alignment.mean == pytest.approx(own, abs=0.01)
        assert alignment.shuffled == pytest.approx(shuffled, abs=0.01)
        assert alignment.gap == pytest.approx(own - shuffled, abs=0.01)
        assert gaps(arm)[0] == pytest.approx(own - shuffled, abs=0.01)
    assert result.arm("none").alignment == {}
    assert likeness(result.arm("none")) == "has no projected teacher to be compared with."


def test_a_cosine_that_shuffled_teachers_reach_too_is_called_a_collapse(result: ABResult) -> None:
    collapsed, sound = result.arm("structured:init=random"), result.arm("structured")
    assert (collapsed.collapse, sound.collapse, result.arm("none").collapse) == ("collapsed", "no", None)
    words = likeness(collapsed)
    assert re.search(r"reaches a cosine of 0\.97\d with its own teacher and 0\.96\d with shuffled ones", words)
    assert re.search(r"the one rose from 0\.\d+ to 0\.97\d, the other rose from 0\.\d+ to 0\.96\d", words)
    assert "This cosine shows no alignment" in words
    assert "(collapse)" in words
    assert "collapse" not in likeness(sound)
    assert "This cosine shows no alignment" in markdown(result)


def test_a_cosine_that_is_mostly_shared_says_so() -> None:
    runs, setup = make_inputs()
    for run in runs:
        for name, each in run.likeness.items():
            each.layers = [0.5 if name.endswith("shuffled") else 0.8] * LAYERS
    arm = judged(runs, setup).arm("structured")
    assert arm.collapse == "mostly"
    assert "only the gap is owed to the text" in likeness(arm)


# --- claims -----------------------------------------------------------------------------------------------------------


def outcomes(result: ABResult) -> dict[str, str]:
    return {finding.claim: finding.outcome for finding in findings(result)}


def with_effects(monkeypatch: pytest.MonkeyPatch, effects: dict[str, float], **inputs: object) -> dict[str, str]:
    for name, effect in effects.items():
        monkeypatch.setitem(EFFECTS, name, effect)
    return outcomes(make_ab(**inputs))  # type: ignore[arg-type]


def test_claims_are_confirmed_by_effects_of_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    found = with_effects(monkeypatch, {"structured:init=random": 0.0}, noise=0.002)
    assert found == dict.fromkeys(CLAIMS, "confirmed")


def test_a_real_improvement_that_is_too_small_refutes_a_claim_of_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EFFECTS, "structured", -0.01)
    monkeypatch.setitem(EFFECTS, "structured:share=no", -0.01)
    result = make_ab(noise=0.002)
    found = judge("kv-structured", result)
    assert found.outcome == "refuted"
    assert [each.outcome for each in found.measured] == ["refuted", "confirmed"]
    assert "lower indeed, but by less" in found.words
    assert judge("kv-share-dim", result).outcome == "refuted"


def test_claims_are_inconclusive_in_noise_and_below_five_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(with_effects(monkeypatch, {}, n_seeds=4).values()) == {"inconclusive"}
    noisy = with_effects(monkeypatch, {"structured": -0.03}, noise=0.1)
    assert noisy["kv-structured"] == "inconclusive"


def test_a_cosine_is_judged_by_its_gap_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A higher cosine that shuffled teachers reach as well refutes the claim."""
    monkeypatch.setitem(COSINES, "structured", (0.99, 0.98))
    found: Finding = judge("kv-cosine", make_ab())
    assert found.outcome == "refuted"
    assert found.measured[0].mean == pytest.approx(0.01 - 0.5, abs=0.01)


def test_no_difference_at_all_refutes_a_mere_direction() -> None:
    runs, setup = make_inputs()
    for run in runs:
        for each in run.likeness.values():
            each.layers = [0.5] * LAYERS
    assert judge("kv-cosine", judged(runs, setup)).outcome == "refuted"


def test_a_claim_needs_its_arms() -> None:
    result = make_ab("flat,structured")
    assert set(outcomes(result)) == {"kv-structured", "kv-cosine"}
    with pytest.raises(SettingsError, match="has no arm structured:init_uniform=False; it has flat, structured"):
        judge("kv-uniform-init", result)
    with pytest.raises(SettingsError, match="there are kv-structured, kv-cosine"):
        judge("kv-other", result)


def test_every_claim_says_what_settles_it(result: ABResult) -> None:
    for finding in findings(result):
        about = finding.as_json()
        assert about["words"].startswith(finding.outcome)
        claim = CLAIMS[finding.claim]
        assert claim.confirmed_if
        assert claim.refuted_if
        assert (Path(__file__).parents[2] / claim.run.removeprefix("python ")).exists()


# --- words ------------------------------------------------------------------------------------------------------------


def test_the_verdict_stands_first_and_every_figure_is_there(result: ABResult) -> None:
    text = markdown(result)
    assert text.startswith("# KV-cache distillation: 4 ways to distil against flat\n\n- **none** is worse than flat")
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert sections == [
        *("Arms", "The claims of document 004", "One thing at a time", "Loss by part"),
        *("Student and projected teacher", "Repeat it"),
    ]
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {row.count("|") for row in table.splitlines()}
        assert len(widths) == 1, table
    assert "nan" not in text
    for line in sentences(result):
        assert not math.isnan(len(line))
    assert headline(make_ab("flat,structured")) == "structured is better than flat"
    assert headline(make_ab("flat,structured", n_seeds=2)) == "structured against flat: undecided"


def test_arms_with_other_layers_stand_in_one_table() -> None:
    """With the projector on the student's side the layers are the teacher's, of which there may be more."""
    runs, setup = make_inputs()
    for run in runs:
        if run.variant == 2:
            for each in run.likeness.values():
                each.layers = [*each.layers, None, 0.00001]
    text = markdown(judged(runs, setup))
    rows = re.search(r"Cosine of keys, by layer:\n\n((?:^\|.*\n)+)", text, re.MULTILINE)
    assert rows is not None
    table = rows[1].splitlines()
    assert {row.count("|") for row in table} == {LAYERS + 4}
    assert next(row for row in table if row.startswith("| structured, own")).endswith("| – | 0.000 |")
    assert next(row for row in table if row.startswith("| flat, own")).endswith("| – | – |")


def test_the_result_is_read_back_as_it_was(result: ABResult, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("ab")
    result.save(folder)
    assert ABResult.load(folder) == result
    csv = result.to_csv(folder / "result.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in csv[1:]] == ARMS.split(",")
