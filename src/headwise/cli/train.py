"""`headwise train`: one architecture, trained."""

from __future__ import annotations

from collections.abc import Sequence

from headwise.cli.arguments import Parser, read_lines, say, show
from headwise.cli.outcome import new_folder, tell_run
from headwise.errors import together
from headwise.io.pretrained import saved_spec
from headwise.train import TrainSettings, train
from headwise.train.folder import RunFolder
from headwise.train.job import pinned, prepare

EXAMPLES = """
train gpt2 --data shakespeare --steps 300 --out runs/gpt2
train 'llama(attention=gqa(kv_heads=2))' --size 5m --data my-texts/ --tokenizer bpe:8000 --steps 2000
train llama --model.attention.kind window --model.attention.window 256 --lr 3e-4
train --init-from runs/swapped --steps 200 --lr 3e-4
train llama --steps 2000 --dry-run
"""


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "train",
        "Train one architecture. The folder --out (default runs/train-TIME) gets metrics, checkpoints and the model;\n"
        "a run that was stopped goes on with `headwise resume`.",
        EXAMPLES,
        model_flags=True,
    )
    parser.add_argument(
        "line", metavar="LINE", nargs="?", help="the architecture: a line or a YAML file; default that of --init-from"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, and do nothing")
    arguments = parser.read(argv, TrainSettings)
    line: str | None = arguments.options.line
    start: str | None = arguments.settings.get("init_from")
    if line is None and start is None:
        parser.error("the following arguments are required: LINE")
    (spec,), settings = together(
        lambda: read_lines([str(saved_spec(str(start))) if line is None else line], arguments.flags),
        lambda: TrainSettings(**{"out": new_folder("train"), **arguments.settings}),
    )
    if arguments.options.dry_run:
        from headwise.lab.estimate import estimate_training

        estimate = estimate_training(spec, TrainSettings(**arguments.settings))
        show(arguments, estimate.as_json(), lambda: print(estimate))
        return 0
    if settings.out is not None:
        RunFolder(settings.out).check_free()  # before the data are read, and before anything is announced
    settings = pinned(settings)
    dataset = prepare(spec, settings).dataset
    say(f"training in {settings.out}")
    tell_run(arguments, train(spec, settings, dataset=dataset))
    return 0
