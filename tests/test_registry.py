"""The open registry: what is in it, what may join it, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

import headwise as hw
from headwise.attention import Attention, AttentionSpec, Context
from headwise.errors import RegistryError, SpecError
from headwise.ffn import FFNSpec
from headwise.model import build
from headwise.norm import NormSpec
from headwise.position import Position, PositionSpec
from headwise.registry import ATTENTION, FAMILIES, FFN, NORM, POSITION, ComponentSpec, Registry
from headwise.spec import apply_flags, count, parse


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = {r: (dict(r.list() and r._entries), dict(r._aliases)) for r in FAMILIES.values()}
    yield
    for registry, (entries, aliases) in before.items():
        registry._entries, registry._aliases = entries, aliases


class SigmoidSpec(AttentionSpec):
    """Sigmoid attention, which no file of the package knows.

    The first line is the summary.
    """

    kind: Literal["sigmoid"] = "sigmoid"
    positional: ClassVar[tuple[str, ...]] = ("slope",)
    slope: float = Field(1.0, gt=0)


class SigmoidAttention(Attention):
    """y_i = Σ_j≤i σ(slope · q_i·k_j) v_j."""

    spec: SigmoidSpec

    def attend(
        self, q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, context: Context, attn_mask: Any, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        repeats = self.n_heads // self.kv_heads
        k_BHSD, v_BHSD = (t.repeat_interleave(repeats, dim=1) for t in (k_BKSD, v_BKSD))
        T, S = q_BHTD.shape[2], k_BHSD.shape[2]
        seen_TS = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        weights_BHTS = (self.spec.slope * q_BHTD @ k_BHSD.mT).sigmoid() * seen_TS
        return weights_BHTS @ v_BHSD, weights_BHTS if need_weights else None


# ---- what is there ----


def test_the_names_everyone_builds_on() -> None:
    assert {"softmax", "window"} <= set(hw.list_attention())
    assert {"alibi", "learned", "none", "rope", "sinusoidal"} <= set(hw.list_position())
    assert {"layernorm", "rmsnorm"} <= set(hw.list_norm())
    assert {"bilinear", "geglu", "glu", "mlp", "reglu", "swiglu"} <= set(hw.list_ffn())
    for registry in FAMILIES.values():
        assert registry.list() == sorted(registry.list())
        assert not set(registry.list()) & set(registry.aliases())


def test_every_entry_says_in_one_line_what_it_is() -> None:
    for registry in FAMILIES.values():
        for kind in registry.list():
            summary = registry.get(kind).summary
            assert len(summary) > 10, kind
            assert "\n" not in summary


def test_aliases_lead_to_their_kind() -> None:
    assert ATTENTION.get("gqa") is ATTENTION.get("mha") is ATTENTION.get("softmax")
    assert ATTENTION.spec("mqa") == ATTENTION.spec({"kind": "softmax", "kv_heads": 1})
    assert ATTENTION.aliases()["gqa"].required == ("kv_heads",)
    with pytest.raises(SpecError, match=r"kv_heads: missing; gqa needs it: gqa\(kv_heads=…\)"):
        ATTENTION.spec("gqa")
    ATTENTION.alias("narrow", "window", window=4)
    assert ATTENTION.spec("narrow") == ATTENTION.spec({"kind": "window", "window": 4})
    with pytest.raises(SpecError, match=r"window: 5 given, but narrow means window=4; write window\(window=…\)"):
        ATTENTION.spec({"kind": "narrow", "window": 5})
    with pytest.raises(RegistryError, match="attention 'narrow' is registered already"):
        ATTENTION.alias("narrow", "softmax")


def test_modules_by_name() -> None:
    """The forms that document 000 and the README use."""
    x = torch.randn(2, 5, 48)
    out, weights = hw.get_attention("standard", d_model=48, n_heads=4)(x)
    assert out.shape == x.shape
    assert weights is None
    out, weights = hw.get_attention("gqa", d_model=48, n_heads=4, kv_heads=2)(x, return_attention_weights=True)
    assert weights.shape == (2, 4, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
    assert hw.get_ffn("swiglu", d_model=48)(x).shape == hw.get_ffn("standard", d_model=48, d_ff=7)(x).shape == x.shape
    assert hw.get_norm("rmsnorm", d_model=48, eps=1e-3)(x).shape == x.shape
    table = hw.get_position("learned", d_model=48, n_heads=4, max_seq_len=9)
    assert table.embed(x, torch.arange(5)).shape == x.shape
    assert table.table.num_embeddings == 9


def test_modules_by_name_are_refused_in_words() -> None:
    with pytest.raises(SpecError, match=r"unknown attention 'sofmax' \(did you mean 'softmax'\?\); allowed: .*window"):
        hw.get_attention("sofmax", d_model=48, n_heads=4)
    with pytest.raises(SpecError, match=r"kv_head: unknown field \(did you mean 'kv_heads'"):
        hw.get_attention("softmax", d_model=48, n_heads=4, kv_head=2)
    with pytest.raises(SpecError, match="kv_heads: 3 does not divide n_heads=4"):
        hw.get_attention("gqa", d_model=48, n_heads=4, kv_heads=3)
    for widths in ({"d_model": 0, "n_heads": 4}, {"d_model": 48, "n_heads": 0}, {"d_model": 48, "n_heads": 2.5}):
        with pytest.raises(SpecError, match="a positive whole number is wanted"):
            hw.get_attention("softmax", **widths)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="unknown attention 'pattern'"):
        hw.get_attention("pattern", d_model=48, n_heads=4, items=["softmax"])


def test_a_spec_of_another_family_is_refused() -> None:
    with pytest.raises(SpecError, match="unknown norm 'softmax'"):
        NORM.spec(ATTENTION.spec("softmax"))
    with pytest.raises(SpecError, match="attention: unknown attention 'rmsnorm'"):
        parse({"preset": "llama", "attention": NORM.spec("rmsnorm")})

    class ImpostorSpec(FFNSpec):
        """Of another family, under a kind that is there."""

        kind: Literal["softmax"] = "softmax"

    with pytest.raises(SpecError, match="'softmax' here is a ImpostorSpec, which is no attention"):
        ATTENTION.spec(ImpostorSpec())


# ---- what may join ----


def test_a_third_partys_attention_works_everywhere_with_nothing_else_touched() -> None:
    assert hw.register_attention(SigmoidSpec)(SigmoidAttention) is SigmoidAttention
    assert "sigmoid" in hw.list_attention()
    assert ATTENTION.get("sigmoid").summary == "Sigmoid attention, which no file of the package knows."

    ids = torch.randint(65, (2, 12))
    line = "llama(d_model=48, n_layers=3, n_heads=4, attention=pattern(sigmoid(0.5, kv_heads=2), window(4)))"
    spec = parse(line)
    assert str(spec) == line
    model = build(spec).eval()
    assert [type(block.attention).__name__ for block in model.stack.blocks] == [
        "SigmoidAttention",
        "WindowAttention",
        "SigmoidAttention",
    ]
    assert sum(p.numel() for p in model.parameters()) == count(spec).params
    changed = ids.clone()
    changed[:, 8:] = 0
    torch.testing.assert_close(model(changed)[:, :8], model(ids)[:, :8])

    flagged = apply_flags(parse("llama"), {"attn.impl": "sigmoid", "attn.slope": "2"})
    assert flagged == parse("llama(attention=sigmoid(2))") == parse("llama(attention=sigmoid(slope=2.0))")
    with pytest.raises(SpecError, match=r"attention.slope: input should be greater than 0, not -1"):
        parse("llama(attention=sigmoid(-1))")
    with pytest.raises(SpecError, match=r"did you mean 'sigmoid'\?"):
        parse("llama(attention=sigmoyd)")
    assert isinstance(hw.get_attention("sigmoid", d_model=8, n_heads=2), SigmoidAttention)


def test_every_family_is_open() -> None:
    class ScaleSpec(NormSpec):
        """Only a scale."""

        kind: Literal["test_scale"] = "test_scale"

        def param_count(self, dims: Any) -> int:
            return dims.d_model

    @hw.register_norm(ScaleSpec)
    class Scale(nn.Module):
        def __init__(self, spec: ScaleSpec, dims: Any) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(dims.d_model))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    class IdentitySpec(FFNSpec):
        """Nothing, or half of it."""

        kind: Literal["test_identity", "test_half"] = "test_identity"

    @hw.register_ffn(IdentitySpec)
    class Identity(nn.Module):
        def __init__(self, spec: IdentitySpec, dims: Any) -> None:
            super().__init__()
            self.factor = {"test_identity": 1.0, "test_half": 0.5}[spec.kind]

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * x

    class TableSpec(PositionSpec):
        """A bias with parameters."""

        kind: Literal["test_table"] = "test_table"

        def param_count(self, dims: Any) -> int:
            return 7

    @hw.register_position(TableSpec)
    class Table(Position):
        def __init__(self, spec: TableSpec, dims: Any) -> None:
            super().__init__(spec, dims)
            self.table = nn.Parameter(torch.zeros(7))

    line = (
        "gpt2(position=pattern(test_table, none, test_table), norm=test_scale, ffn=pattern(test_identity, test_half))"
    )
    spec = parse(line)
    assert parse(str(spec)) == spec
    model = build(spec)
    assert count(spec).params == sum(p.numel() for p in model.parameters())
    assert [block.ffn.factor for block in model.stack.blocks] == [1.0, 0.5, 1.0, 0.5, 1.0]


def test_a_duplicate_is_an_error_and_changes_nothing() -> None:
    class AgainSpec(AttentionSpec):
        """Softmax once more, with a name of its own beside it."""

        kind: Literal["test_new", "softmax"] = "softmax"

    before = ATTENTION.get("softmax")
    with pytest.raises(RegistryError, match=r"^attention 'softmax' is registered already; choose another name$"):
        hw.register_attention(AgainSpec)(SigmoidAttention)
    assert ATTENTION.get("softmax") is before
    assert "test_new" not in ATTENTION.list()

    class AliasSpec(AttentionSpec):
        """Named as an alias is."""

        kind: Literal["gqa"] = "gqa"

    with pytest.raises(RegistryError, match="'gqa' is registered already"):
        hw.register_attention(AliasSpec)(SigmoidAttention)
    hw.register_attention(SigmoidSpec)(SigmoidAttention)
    with pytest.raises(RegistryError, match="'sigmoid' is registered already"):
        hw.register_attention(SigmoidSpec)(SigmoidAttention)


@pytest.mark.parametrize("name", ["my-kind", "2d", "lambda", "None", "true", "a b", "", "ﬁne", "pattern"])
def test_a_kind_must_be_a_name_that_a_line_can_hold(name: str) -> None:
    registry = Registry("attention")
    with pytest.raises(RegistryError, match="attention"):
        registry.alias(name, "softmax")
    assert not registry._aliases


def test_a_spec_must_declare_its_kind() -> None:
    class NamelessSpec(ComponentSpec):
        """No Literal."""

    with pytest.raises(RegistryError, match='NamelessSpec must declare its kind: kind: Literal\\["name"\\] = "name"'):
        FFN.register(NamelessSpec)(SigmoidAttention)
    assert POSITION.list()


# ---- plug-ins ----

PLUGIN = """
from typing import Literal
from headwise.norm import NormSpec
from headwise.norm.rmsnorm import RMSNorm
from headwise.registry import register_norm

class PluggedSpec(NormSpec):
    '''A plug-in's norm.'''
    kind: Literal["{kind}"] = "{kind}"
    eps: float = 1e-6

@register_norm(PluggedSpec)
class Plugged(RMSNorm):
    pass
"""

USE = """
import headwise as hw
for attempt in range(2):
    try:
        print(hw.list_norm(), hw.parse("llama(norm=plugged)"))
    except hw.HeadwiseError as error:
        print(type(error).__name__, error)
print(hw.list_ffn() and "other families work")
"""


# Torch is loaded once for all; headwise, and what is installed beside it, by each alone.
EACH = """
import os, sys, torch
code, *folders = sys.argv[1:]
for folder in folders:
    print("----", flush=True)
    if not os.fork():
        sys.path.insert(0, folder)
        exec(code)
        sys.stdout.flush()
        os._exit(0)
    assert not os.wait()[1]
"""


def install(folder: Path, plugins: dict[str, str]) -> str:
    """Put packages with these modules (name → source) there."""
    folder.mkdir()
    for name, source in plugins.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[headwise.norm]\n{name} = {name}\n", encoding="utf-8")
    return str(folder)


def printed(*folders: str) -> list[list[str]]:
    """What USE prints where the packages of each folder are installed."""
    done = subprocess.run([sys.executable, "-c", EACH, USE, *folders], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [part.splitlines() for part in done.stdout.split("----\n")[1:]]


def test_an_installed_package_joins_by_its_entry_point(tmp_path: Path) -> None:
    (lines,) = printed(install(tmp_path / "site", {"hw_plugged": PLUGIN.format(kind="plugged")}))
    assert lines == ["['layernorm', 'plugged', 'rmsnorm'] llama(norm=plugged)"] * 2 + ["other families work"]


BROKEN = {
    "import no_such_module_here": "ModuleNotFoundError: No module named 'no_such_module_here'",
    "def broken(:\n": "SyntaxError: invalid syntax",
    "raise ValueError('two\\nlines')": "ValueError: two lines",
    PLUGIN.format(kind="rmsnorm"): "norm 'rmsnorm' is registered already",
}


def test_a_broken_plugin_is_one_line_at_every_look_up(tmp_path: Path) -> None:
    """Not at the first alone: the second once went on with a silently smaller registry."""
    sound = {"b_sound": PLUGIN.format(kind="plugged")}
    folders = [install(tmp_path / str(n), {"a_broken": source, **sound}) for n, source in enumerate(BROKEN)]
    for lines, reason in zip(printed(*folders), BROKEN.values(), strict=True):
        assert len(lines) == 3
        assert lines[0] == lines[1]
        assert lines[0].startswith("RegistryError ")
        for piece in ("plug-in 'a_broken' (a_broken) for norm", reason, "fix or uninstall"):
            assert piece in lines[0]
        assert lines[2] == "other families work"


def test_an_alias_is_not_silently_overridden() -> None:
    """mqa(kv_heads=4) once was softmax(kv_heads=4) without a word."""
    with pytest.raises(SpecError, match=r"kv_heads: 4 given, but mqa means kv_heads=1; write softmax\(kv_heads=…\)"):
        parse("llama(attention=mqa(kv_heads=4))")
    assert parse("llama(attention=mqa(kv_heads=1))") == parse("llama(attention=mqa)")
