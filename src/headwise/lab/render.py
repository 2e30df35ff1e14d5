"""A result in words, as a terminal table, as a notebook table and as CSV. No arithmetic of its own beyond units."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Literal

from headwise.lab.stats import MIN_SEEDS

if TYPE_CHECKING:
    from rich.table import Table

    from headwise.lab.result import CompareResult, Diff, Ratio, VariantResult

MARKS = {"better": "✓", "worse": "✗", "equivalent": "≈", "undecided": "?"}
_RICH_STYLE = {"better": "green", "worse": "red", "equivalent": "cyan", "undecided": "yellow"}
_HTML_COLOUR = {"better": "#1a7f4b", "worse": "#c0392b", "equivalent": "#2f6fb3", "undecided": "#8a6d1d"}
NONE = "–"


# --- numbers ----------------------------------------------------------------------------------------------------------


def signed(value: float | None, digits: int = 4) -> str:
    """`+0.0123`, with a real minus sign; zero has none."""
    if value is None:
        return NONE
    text = f"{abs(value):.{digits}f}"
    return text if not float(text) else ("−" if value < 0 else "+") + text


def loss(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction as a signed percentage, not to be broken before its sign: 0.0123 → `+1.23 %`."""
    return NONE if value is None else signed(100 * value, digits) + "\u00a0%"


def p_value(value: float | None) -> str:
    if value is None:
        return NONE
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def quantity(value: float | None, unit: str = "") -> str:
    """Three digits and a decimal prefix: 1234567 → `1.23 M`."""
    if value is None:
        return NONE
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            number, suffix = value / scale, f"{prefix}{unit}"
            break
    else:
        number, suffix = value, unit
    digits = (
        0 if abs(number) >= 100 or (suffix == unit and float(value).is_integer()) else 1 if abs(number) >= 10 else 2
    )
    return f"{number:.{digits}f} {suffix}".rstrip()


def ratio(value: Ratio | None) -> str:
    if value is None:
        return NONE
    spread = "" if value.lo is None or value.hi is None else f" ({value.lo:.2f}–{value.hi:.2f})"
    return f"{value.ratio:.2f}×{spread}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def interval(ends: tuple[float, float] | None, digits: int = 4) -> str:
    return NONE if ends is None else f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def relative_interval(result: CompareResult, diff: Diff) -> tuple[float, float] | None:
    """The 95 % interval of a difference as fractions of the baseline's mean loss."""
    mean = result.variants[0].val_loss.mean
    return None if diff.ci95 is None or not mean else (diff.ci95[0] / abs(mean), diff.ci95[1] / abs(mean))


def difference(result: CompareResult, diff: Diff) -> str:
    """`−1.63 % [−2.04 %, −1.22 %]`"""
    ends = relative_interval(result, diff)
    text = percent(diff.relative)
    return text if ends is None else f"{text} [{percent(ends[0])}, {percent(ends[1])}]"


# --- words ------------------------------------------------------------------------------------------------------------


def needed(diff: Diff) -> str:
    """How many more seeds an undecided variant needs."""
    if diff.seeds_needed is None:
        return ""
    if diff.seeds_capped:
        return f"more than {diff.seeds_needed:,} more seeds needed"
    return f"≈{diff.seeds_needed} more seed{'s' * (diff.seeds_needed != 1)} needed"


def phrase(result: CompareResult, variant: VariantResult) -> str:
    """What is claimed about a variant, as the rest of a sentence that begins with its label."""
    diff = variant.diff
    if diff is None:
        return "is the baseline."
    base = result.variants[0].label
    measured = f"{percent(diff.relative)} validation loss"
    ends = relative_interval(result, diff)
    if ends is not None:
        measured += f" (95 % interval {percent(ends[0])} to {percent(ends[1])})"
    seeds = f"{diff.n} seed{'s' * (diff.n != 1)}"
    dropped = len(variant.val_loss.per_seed) - diff.n
    after = f" {dropped} seed{'s' * (dropped != 1)} left out, because a run failed." if dropped else ""
    margin = f"±{100 * result.margin:g} %"
    if diff.verdict in ("better", "worse"):
        p = p_value(diff.p_holm)
        p = p if p.startswith("<") else f"= {p}"
        return f"is {diff.verdict} than {base}: {measured}, p {p} after Holm’s correction, {seeds}.{after}"
    if diff.verdict == "equivalent":
        if diff.mean == 0 and diff.p == 1:
            return f"is equivalent to {base}: the losses of all {seeds} are identical.{after}"
        real = diff.p_holm is not None and diff.p_holm < result.alpha
        note = " The difference is real, but smaller than the margin of what matters." if real else ""
        return f"is equivalent to {base} within {margin}: {measured}, {seeds}.{note}{after}"
    if diff.n == 0:
        return f"against {base} is undecided: no seed finished on both sides.{after}"
    if diff.n < MIN_SEEDS:
        return (
            f"against {base} is undecided: {measured} so far, but {seeds} are too few for a claim "
            f"(at least {MIN_SEEDS}); {needed(diff)}.{after}"
        ).replace("1 seed are", "1 seed is")
    why = ""
    if diff.seeds_capped:
        why = " The seeds differ too much for a difference this small: train longer, or accept a wider margin."
    elif diff.p is not None and diff.p < result.alpha:
        why = f" It would be significant alone, but not as one of {len(result.variants) - 1} variants."
    return f"against {base} is undecided: {measured}, {seeds}; {needed(diff)}.{why}{after}"


def sentence(result: CompareResult, variant: VariantResult) -> str:
    return f"{variant.label} {phrase(result, variant)}"


def verdict(variant: VariantResult) -> str:
    """`✓ better`, `? undecided`, or `baseline`."""
    return "baseline" if variant.diff is None else f"{MARKS[variant.diff.verdict]} {variant.diff.verdict}"


# --- tables -----------------------------------------------------------------------------------------------------------

COLUMNS = ("Line", "Params", "Loss", "Δ loss [95 %]", "p Holm", "Detectable", "Train", "Decode", "Memory", "Verdict")


TERMINAL_COLUMNS = ("Line", "Params", "Loss", "Δ loss", "Train", "Decode", "Memory", "Verdict")


def cells(result: CompareResult, variant: VariantResult) -> tuple[str, ...]:
    """One row of the summary, in the order of COLUMNS."""
    diff, ratios = variant.diff, variant.ratios
    mean = result.variants[0].val_loss.mean
    seen = None if diff is None or diff.min_detectable is None or not mean else diff.min_detectable / abs(mean)
    verdict_text = verdict(variant)
    if diff is not None and diff.verdict == "undecided" and diff.seeds_needed is not None:
        verdict_text += f", {needed(diff)}"
    return (
        variant.label,
        quantity(variant.params),
        loss(variant.val_loss.mean),
        NONE if diff is None else difference(result, diff),
        NONE if diff is None else p_value(diff.p_holm),
        NONE if seen is None else f"{100 * seen:.2f} %",
        ratio(ratios.train),
        ratio(ratios.decode),
        ratio(ratios.memory),
        verdict_text,
    )


def rich_table(result: CompareResult) -> Table:
    """The summary for a terminal, spreads on a second line so that it fits 80 columns; empty columns are left out."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    n = len(result.seeds)
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=Text(
            f"{len(result.variants) - 1} against {result.baseline}, {n} seed{'s' * (n != 1)}, {result.dataset.name}"
        ),
        caption=Text(
            f"loss: nats a token, validation; speed and memory: × baseline; margin ±{100 * result.margin:g} %"
        ),
    )
    rows = [_terminal_cells(result, v) for v in result.variants]
    shown = [i for i in range(len(TERMINAL_COLUMNS)) if any(row[i] != NONE for row in rows)]
    for i in shown:
        name = TERMINAL_COLUMNS[i]
        justify: Literal["left", "right"] = "left" if name in ("Line", "Verdict") else "right"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name != "Line")
    for variant, row in zip(result.variants, rows, strict=True):
        colour = "" if variant.diff is None else _RICH_STYLE[variant.diff.verdict]
        # Text, not markup: a line that holds square brackets must not be read as a style.
        table.add_row(*(Text(row[i], style=colour if TERMINAL_COLUMNS[i] == "Verdict" else "") for i in shown))
    return table


def _terminal_cells(result: CompareResult, variant: VariantResult) -> tuple[str, ...]:
    diff, ratios = variant.diff, variant.ratios
    delta, decision = NONE, "baseline"
    if diff is not None:
        delta, decision = percent(diff.relative), f"{MARKS[diff.verdict]} {diff.verdict}"
        ends = relative_interval(result, diff)
        if ends is not None:
            delta += f"\n± {50 * (ends[1] - ends[0]):.2f} %"
        if diff.seeds_needed is not None:
            decision += f"\n{'>' if diff.seeds_capped else '≈'}{diff.seeds_needed:,} more seeds"
    return (
        variant.label,
        quantity(variant.params),
        loss(variant.val_loss.mean),
        delta,
        *(short_ratio(r) for r in (ratios.train, ratios.decode, ratios.memory)),
        decision,
    )


def short_ratio(value: Ratio | None) -> str:
    """A ratio, and half of its interval on a second line."""
    if value is None:
        return NONE
    spread = "" if value.lo is None or value.hi is None else f"\n±{(value.hi - value.lo) / 2:.2f}"
    return f"{value.ratio:.2f}×{spread}"


def notebook_html(result: CompareResult) -> str:
    """A compact table for notebooks: inline styles, the page's own colours, so that it fits light and dark themes."""
    rows = [cells(result, v) for v in result.variants]
    shown = _filled(rows)
    rule = "border-bottom:1px solid rgba(128,128,128,.35);padding:.35em .7em;"
    head = "".join(
        f'<th scope="col" style="{rule}text-align:{_align(i)};font-weight:600">{escape(COLUMNS[i])}</th>' for i in shown
    )
    body = ""
    for variant, row in zip(result.variants, rows, strict=True):
        body += "<tr>"
        for i in shown:
            style = f"{rule}text-align:{_align(i)}"
            text = escape(row[i])
            if i == 0:
                style += ";font-weight:400"
                body += f'<th scope="row" style="{style}" title="{escape(variant.line)}"><code>{text}</code></th>'
                continue
            if i == len(COLUMNS) - 1 and variant.diff is not None:
                colour = _HTML_COLOUR[variant.diff.verdict]
                mark, _, rest = text.partition(",")
                pill = f"background:{colour};color:#fff;border-radius:1em;padding:.1em .6em;white-space:nowrap"
                text = f'<span style="{pill}">{mark}</span>{rest}'
            body += f'<td style="{style}">{text}</td>'
        body += "</tr>"
    failed = f" · {len(result.failed_runs)} failed" if result.failed_runs else ""
    caption = f"{len(result.seeds)} seeds · {result.dataset.name} · margin ±{100 * result.margin:g} %{failed}"
    below = "caption-side:bottom;text-align:left;opacity:.75;padding:.4em .7em"
    return (
        '<div style="overflow-x:auto"><table style="border-collapse:collapse;font-variant-numeric:tabular-nums">'
        f'<caption style="{below}">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def csv_text(result: CompareResult) -> str:
    """One row a variant; plain numbers, empty where there is none; the loss of each seed in a column of its own."""
    rows = [_csv_row(result, v) for v in result.variants]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _csv_row(result: CompareResult, v: VariantResult) -> dict[str, object]:
    d, r = v.diff, v.ratios
    row: dict[str, object] = {
        "line": v.line,
        "resolved": v.resolved,
        "params": v.params,
        "flops_per_token": v.flops_per_token,
        "lr": v.lr,
        "val_loss": v.val_loss.mean,
        **_ends("val_loss", v.val_loss.ci95),
        "bits_per_byte": v.bits_per_byte.mean,
        "diff": d and d.mean,
        **_ends("diff", d.ci95 if d else None),
        "diff_relative": d and d.relative,
        "p": d and d.p,
        "p_holm": d and d.p_holm,
        "p_equivalent": d and d.p_equivalent,
        "effect_size": d and d.effect_size,
        "min_detectable": d and d.min_detectable,
        "verdict": d and d.verdict,
        "seeds_needed": d and d.seeds_needed,
        "train_tokens_per_s": v.train_tokens_per_s,
        "decode_tokens_per_s": v.decode_tokens_per_s,
        "peak_memory_bytes": v.peak_memory_bytes,
    }
    for name, value in (("train", r.train), ("decode", r.decode), ("memory", r.memory)):
        row[f"{name}_ratio"] = value and value.ratio
        ends = None if value is None or value.lo is None or value.hi is None else (value.lo, value.hi)
        row.update(_ends(f"{name}_ratio", ends))
    row.update((f"val_loss_seed_{s}", x) for s, x in zip(result.seeds, v.val_loss.per_seed, strict=True))
    return row


def _ends(name: str, ends: tuple[float, float] | None) -> dict[str, float | None]:
    return {f"{name}_lo": ends and ends[0], f"{name}_hi": ends and ends[1]}


def _filled(rows: Sequence[Sequence[str]]) -> list[int]:
    """The columns in which at least one row says something."""
    return [i for i in range(len(COLUMNS)) if any(row[i] != NONE for row in rows)]


def _align(column: int) -> str:
    return "left" if column in (0, len(COLUMNS) - 1) else "right"
