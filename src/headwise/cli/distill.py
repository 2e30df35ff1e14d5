"""`headwise distill`: a student learns from a teacher's keys, values, hidden states and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headwise.cli.arguments import Parser, say, show
from headwise.cli.outcome import new_folder, tell_ab, tell_run
from headwise.distill.settings import DistillSettings
from headwise.errors import SettingsError, one_of

SUBJECTS = ("run", "profile", "ab", "compare")
# Document 004's words, and what they are called here.
ALIASES = {
    "--kv-projection-mode": "--projection",
    "--use-structural-loss": "--structural-loss",
    "--max-steps": "--steps",
    "--output-dir": "--out",
}
RUN_EXAMPLES = """
distill run --teacher runs/teacher --student 'llama(attention=gqa(kv_heads=1))' --projection structured --out runs/kv
distill run --teacher smollm2.gguf --student 'llama(d_model=256, n_layers=8)' --data gsm8k/ --cache-teacher --steps 500
distill run --recipe heal --student runs/swapped --data shakespeare --out runs/healed
distill run --teacher runs/a --teacher runs/b --teacher-weights 2,1 --student llama --logit-kd 2,0.5
distill run --teacher runs/teacher --student llama --epochs 3 --dry-run
"""
PROFILE_EXAMPLES = """
distill profile --projection structured --teacher runs/teacher --student llama
distill profile --projection flat --teacher smollm2.gguf --student 'llama(d_model=256, n_layers=8)' --seq-len 256
"""
AB_EXAMPLES = """
distill ab --teacher runs/teacher --student 'llama(d_model=64, n_layers=2, n_heads=4)' --steps 500 --out runs/ab
distill ab --teacher runs/teacher --student llama --arms none,flat,structured,flat:lambda_kv=2 --seeds 8
distill ab --teacher smollm2.gguf --student 'llama(d_model=256)' --data gsm8k/ --format gsm8k --cache-teacher
"""
COMPARE_EXAMPLES = """
distill compare --baseline runs/flat --experimental runs/structured --output AB_RESULTS.md
"""


def main(argv: Sequence[str]) -> int:
    subject, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if subject in ("-h", "--help"):
        print(overview())
        return 0 if argv else 2
    if subject not in SUBJECTS:
        raise SettingsError(f"{one_of(subject, SUBJECTS, 'subject')}; see `headwise distill --help`")
    return {"run": _run, "profile": _profile, "ab": _ab, "compare": _compare}[subject](with_own_words(rest))


def overview() -> str:
    """What `headwise distill --help` prints."""
    first = [examples.strip().splitlines()[0] for examples in (RUN_EXAMPLES, PROFILE_EXAMPLES, AB_EXAMPLES)]
    shown = "\n".join(f"  headwise {line}" for line in first)
    return (
        "usage: headwise distill run|profile|ab|compare …\n\n"
        "  run      train a student beside a teacher\n"
        "  profile  what a step of `run` would cost: shapes, parameters, time, memory, and a check for NaN\n"
        "  ab       compare ways to align over seeds, with a verdict\n"
        "  compare  two finished runs against each other\n\n"
        "`headwise distill run --help` and so on have every setting. Each takes --json.\n\n"
        f"examples:\n{shown}"
    )


def with_own_words(argv: Sequence[str]) -> list[str]:
    """The arguments with document 004's spellings made ours."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words.append(ALIASES.get(name.replace("_", "-"), name) + equals + value if name.startswith("--") else word)
    return words


def _run(argv: Sequence[str]) -> int:
    parser = Parser(
        "distill run",
        "Train a student beside a teacher: on the text, and on what the teacher makes of it. The folder --out (by\n"
        "default runs/distill-TIME) is a training run's: `headwise resume`, `eval` and `generate` work on it.\n"
        "Document 004's spellings (--kv_projection_mode, --max_steps, --output_dir, …) are understood too.",
        RUN_EXAMPLES,
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained and how large it is")
    arguments = parser.read(argv, DistillSettings)
    settings = DistillSettings(**{"out": new_folder("distill"), **arguments.settings})
    if arguments.options.dry_run:
        from headwise.distill.plan import plan

        found = plan(settings)
        show(arguments, found.as_json(), lambda: print(found))
        return 0
    from headwise.distill.run import distill

    tell_run(arguments, distill(settings, say=say))
    return 0


def _profile(argv: Sequence[str]) -> int:
    parser = Parser(
        "distill profile",
        "What a step of `headwise distill run` with the same flags would cost: shapes [B,L,H,T,D], parameters, time\n"
        "of teacher, student and aligner, memory, and whether every number is finite. Nothing is written.",
        PROFILE_EXAMPLES,
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="steps that are measured (default: 3)")
    arguments = parser.read(argv, DistillSettings)
    from headwise.distill.profile import profile

    found = profile(DistillSettings(**arguments.settings), rounds=arguments.options.rounds)
    show(arguments, found.as_json(), lambda: print(found))
    return int(bool(found.not_finite))


def _ab(argv: Sequence[str]) -> int:
    from headwise.lab.ab import ABSettings, ab

    parser = Parser(
        "distill ab",
        "Distil by every arm on several seeds, and judge each against the baseline: same student, batches, order and\n"
        "steps. The folder --out (default runs/ab-TIME) gets report.html, AB_RESULTS.md, result.json, result.csv; the\n"
        "same command goes on where a stopped one was, also with more --seeds or other --arms.",
        AB_EXAMPLES,
    )
    arguments = parser.read(argv, ABSettings)
    settings = ABSettings(**{"out": new_folder("ab"), **arguments.settings})
    return tell_ab(arguments, ab(settings, progress=True), Path(settings.out or ""))


def _compare(argv: Sequence[str]) -> int:
    parser = Parser(
        "distill compare",
        "Two finished runs of `headwise distill run` against each other: losses, steps, likeness to the teacher with\n"
        "its control, and in what else the two differ. Markdown, on stdout or in --output.",
        COMPARE_EXAMPLES,
    )
    parser.add_argument("--baseline", type=Path, required=True, metavar="DIR", help="the --out of one run")
    parser.add_argument("--experimental", type=Path, required=True, metavar="DIR", help="that of the other")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the Markdown goes, as AB_RESULTS.md")
    arguments = parser.read(argv)
    options = arguments.options

    from headwise.lab.ab import compare_runs
    from headwise.lab.ab.markdown import markdown

    result = compare_runs(options.baseline, options.experimental, options.output)
    text = f"report: {options.output}" if options.output else markdown(result).rstrip()
    show(arguments, result.model_dump(mode="json"), lambda: print(text))
    return 0
