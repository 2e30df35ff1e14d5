"""AB_RESULTS.md: an A/B in Markdown, the verdict first, then what it rests on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headwise.lab.ab.result import ABResult
from headwise.lab.ab.words import contrast, headline, likeness, number, own_and_shuffled, reach
from headwise.lab.claims import CLAIMS, findings
from headwise.lab.render import NONE, difference, interval, loss, p_value, phrase, quantity, verdict

FILE_NAME = "AB_RESULTS.md"
NAMES = {"cosine_k": "Cosine of keys", "cosine_v": "Cosine of values", "cosine_output": "Cosine of outputs"}
NAMES |= {"cka_k": "CKA of keys", "cka_v": "CKA of values", "cka_output": "CKA of outputs"}


def markdown(result: ABResult) -> str:
    """AB_RESULTS.md."""
    verdicts = "\n".join(f"- **{v.label}** {phrase(result, v)}" for v in result.variants[1:])
    blocks = [
        f"# KV-cache distillation: {headline(result)}",
        verdicts,
        *result.notes,
        _facts(result),
        _arms_table(result),
        *_claims(result),
        *_contrasts(result),
        *_parts(result),
        *_likeness(result),
        *_failed(result),
        _again(result),
    ]
    return "\n\n".join(blocks) + "\n"


def _facts(result: ABResult) -> str:
    baseline, n = result.variants[0], len(result.seeds)
    steps = f", {baseline.steps:,} steps each" if baseline.steps else ""
    return (
        f"Baseline **{baseline.label}**; {n} seed{'s' * (n != 1)}{steps}. {result.conditions}".rstrip()
        + f"\n\nTeacher `{', '.join(result.teacher)}`; student `{result.student}`, {baseline.params:,} parameters; "
        f"data {result.dataset.name}; margin of what matters ±{100 * result.margin:g} %."
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], rest: str = "--:|") -> str:
    """A Markdown table; all columns but the first to the right, unless `rest` says otherwise."""
    lines = ["| " + " | ".join(headings) + " |", "|---|" + rest * (len(headings) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _arms_table(result: ABResult) -> str:
    headings = ["Arm", "Aligner", "Validation loss [95 %]", "Δ loss [95 %]", "p Holm", "Verdict", "Steps to baseline’s"]
    headings += ["Cosine K (shuffled)", "Cosine V (shuffled)", "Tokens/s"]
    rows = []
    for v, arm in zip(result.variants, result.arms, strict=True):
        rows.append(
            [
                v.label,
                f"{arm.aligner_params:,}",
                f"{loss(v.val_loss.mean)} {interval(v.val_loss.ci95)}",
                NONE if v.diff is None else difference(result, v.diff),
                NONE if v.diff is None else p_value(v.diff.p_holm),
                verdict(v),
                reach(arm.steps_to_baseline, v.steps),
                own_and_shuffled(arm.alignment.get("cosine_k")),
                own_and_shuffled(arm.alignment.get("cosine_v")),
                quantity(arm.tokens_per_s),
            ]
        )
    return "## Arms\n\n" + table(headings, rows)


def _claims(result: ABResult) -> list[str]:
    found = findings(result)
    if not found:
        return []
    rows = [
        [each.claim, each.statement, f"**{each.outcome}**", "; ".join(m.words for m in each.measured)] for each in found
    ]
    rules = "\n".join(
        f"- {each.claim}: confirmed if {CLAIMS[each.claim].confirmed_if}; refuted if {CLAIMS[each.claim].refuted_if}."
        for each in found
    )
    heading = "## The claims of document 004"
    return [f"{heading}\n\n{table(['Claim', 'Statement', 'Verdict', 'Measured'], rows, '---|')}\n\n{rules}"]


def _contrasts(result: ABResult) -> list[str]:
    lines = [f"- {each.question}. {contrast(each)}" for each in result.contrasts]
    if not lines:
        return []
    lead = "Arms that differ in one setting, paired by seed; p after Holm’s correction over all of these."
    return [f"## One thing at a time\n\n{lead}\n\n" + "\n".join(lines)]


def parts_of(result: ABResult) -> list[str]:
    """The parts of the texts that losses are told of; empty where there is one only."""
    parts = list(dict.fromkeys(part for arm in result.arms for part in arm.val_loss_by_part))
    return parts if len(parts) > 1 else []


def _parts(result: ABResult) -> list[str]:
    if not (parts := parts_of(result)):
        return []
    rows = [
        [arm.arm, *(loss(arm.val_loss_by_part[p].mean) if p in arm.val_loss_by_part else NONE for p in parts)]
        for arm in result.arms
    ]
    return ["## Loss by part\n\n" + table(["Arm", *parts], rows)]


def _likeness(result: ABResult) -> list[str]:
    measured = [arm for arm in result.arms if arm.alignment]
    if not measured:
        return []
    text = "## Student and projected teacher\n\n" + "\n".join(f"- **{arm.arm}** {likeness(arm)}" for arm in measured)
    for name, title in NAMES.items():
        rows = [
            [f"{arm.arm}, {what}", *(NONE if x is None else number(x) for x in layers)]
            for arm in measured
            if (alignment := arm.alignment.get(name)) is not None
            for what, layers in (("own", alignment.layers), ("shuffled", alignment.shuffled_layers))
        ]
        if rows:
            width = max(map(len, rows))  # with the projector on the student's side, layers are the teacher's
            layers = [f"layer {i}" for i in range(width - 1)]
            rows = [row + [NONE] * (width - len(row)) for row in rows]
            text += f"\n\n{title}, by layer:\n\n" + table(["Arm", *layers], rows)
    return [text]


def _failed(result: ABResult) -> list[str]:
    if not result.failed_runs:
        return []
    return ["## Failed runs\n\n" + "\n".join(f"- {r.label}, seed {r.seed}: {r.error}" for r in result.failed_runs)]


def _again(result: ABResult) -> str:
    commands = [result.command, *(arm.command for arm in result.arms)]
    shown = "\n".join(command for command in commands if command)
    about = ", ".join(f"{name} {value}" for name, value in result.environment if value not in ("", None))
    return f"## Repeat it\n\n```bash\n{shown}\n```\n\nMeasured with {about}." if shown else f"Measured with {about}."
