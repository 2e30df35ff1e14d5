"""The public surface, pinned: a name that others build on does not vanish or change its kind unnoticed."""

from __future__ import annotations

import subprocess
import sys

import headwise as hw
from headwise.lab.settings import CompareSettings
from headwise.train import TrainSettings

PUBLIC = {
    *("ModelSpec", "HeadwiseError", "parse", "count", "list_presets", "build", "swap", "load", "save_pretrained"),
    *("quantise", "train", "resume", "generate", "compare", "bench", "register_with_transformers", "Engine", "distill"),
    *(
        f"{verb}_{family}"
        for verb in ("register", "get", "list")
        for family in ("attention", "position", "norm", "ffn")
    ),
}
SETTINGS = (
    "data tokenizer out seed seeds steps batch_size lr min_lr warmup betas weight_decay clip match lr_grid margin "
    "workers checkpoint_every eval_every dtype device compile"
)


def test_public_names_are_these_and_all_resolve() -> None:
    assert set(hw.__all__) == PUBLIC | {"__version__"}
    assert set(dir(hw)) == set(hw.__all__)
    for name in PUBLIC:
        assert callable(getattr(hw, name)), name


def test_settings_keep_their_published_names() -> None:
    assert set(SETTINGS.split()) <= set(CompareSettings.model_fields)
    assert set(SETTINGS.split()) - {"seeds", "match", "lr_grid", "margin", "workers"} <= set(TrainSettings.model_fields)


def test_functions_named_like_subpackages_stay_functions() -> None:
    """Importing headwise.train once replaced the function hw.train by the subpackage."""
    code = "import headwise.train.loop, headwise.generate, headwise as hw; assert callable(hw.train and hw.generate)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_that_are_not_there_are_attribute_errors() -> None:
    assert not hasattr(hw, "no_such_name")
