"""Flash attention: tiles of plain torch against the definition, and the Triton kernels, in Triton's interpreter.

The interpreter runs each program of a kernel in Python on numpy, so sizes are small: a few tiles, odd ones at the ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.kernels import flash
from headwise.kernels.attention import naive as plain
from headwise.kernels.attention import sdpa
from headwise.kernels.flash import attention, available, fused, naive, online


def inputs(case: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v (and the key bias), in the case's dtype, and the settings."""
    made = {"B": 1, "H": 2, "K": 1, "T": 5, "S": 5, "E": 8, "D": 8, "dtype": torch.float64, **case}
    B, H, K, T, S, E, D = (made[name] for name in "BHKTSED")
    generator = torch.Generator().manual_seed(T + 3 * S + 7 * E)
    shapes = [(B, H, T, E), (B, K, S, E), (B, K, S, D)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(made["dtype"]) for shape in shapes]
    if made.get("bias"):
        tensors.append(torch.randn(*made["bias"], S, generator=generator, dtype=torch.float64).to(made["dtype"]))
    settings = {name: made.get(name) for name in ("window", "softcap")}
    settings |= {"lead": made.get("lead", 0) if made.get("window") else 0}
    settings |= {"scale": made.get("scale", E**-0.5), "causal": made.get("causal", True)}
    if made.get("segments"):
        keys = torch.arange(S).div(made["segments"], rounding_mode="floor").expand(B, S)
        settings["segments"] = (keys[:, S - T :], keys)
    return tensors, settings


def run(function: Any, tensors: list[Tensor], settings: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Output, logarithms of the sums, and the gradients of a random weighting of both, in float64."""
    q, k, v, *bias = leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    y, lse = function(q, k, v, key_bias=bias[0] if bias else None, **settings)
    assert y.dtype == dtype
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y, lse)]
    seen = lse != -torch.inf
    total = (y.double() * weights[0]).sum() + (lse.double()[seen] * weights[1][seen]).sum()
    grads = torch.autograd.grad(total, leaves)
    return [x.detach().double() for x in (y, lse.masked_fill(~seen, -9.0), *grads)]


def rms(x: Tensor) -> float:
    return x.pow(2).mean().sqrt().item()


def assert_errs_no_more_than_naive(case: dict[str, Any]) -> None:
    """Against float64: at most twice the naive form's error forward, three times backward."""
    tensors, settings = inputs(case)
    dtype = case["dtype"]
    exact = run(naive.attention, tensors, settings, torch.float64)
    rough = run(naive.attention, tensors, settings, dtype)
    fast = run(attention, tensors, settings, dtype)
    eps = torch.finfo(torch.float32 if dtype == torch.float32 else dtype).eps
    for name, e, n, f in zip(("y", "lse", "dq", "dk", "dv", "dbias"), exact, rough, fast):
        factor = 2 if name in ("y", "lse") else 3
        assert f.isfinite().all(), name
        assert rms(f - e) <= factor * rms(n - e) + eps * rms(e), f"{name}: {rms(f - e):.2e}, naive {rms(n - e):.2e}"


# ---- tiles of plain torch ----


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    K, T = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    H = K * draw(st.integers(1, 2))
    return {
        "B": 2, "K": K, "H": H, "T": T, "S": T + draw(st.integers(0, 30)), "D": draw(st.sampled_from([8, 5])),
        "causal": draw(st.booleans()), "window": draw(st.none() | st.integers(1, 40)),
        "lead": draw(st.sampled_from([0, 3, 33])),
        "softcap": draw(st.sampled_from([None, 2.0])), "segments": draw(st.sampled_from([None, 7, 20])),
        "bias": draw(st.sampled_from([None, (1, 1), (2, K), (1, H)])),
    }  # fmt: skip


@given(situations(), st.integers(1, 20), st.integers(1, 20))
def test_a_running_maximum_over_tiles_of_any_size_is_the_softmax(case: dict[str, Any], rows: int, columns: int) -> None:
    tensors, settings = inputs(case)
    expected = run(naive.attention, tensors, settings, torch.float64)
    actual = run(online.attention, tensors, settings | {"rows": rows, "columns": columns}, torch.float64)
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=1e-11)


def test_the_definition_is_that_of_attention() -> None:
    tensors, settings = inputs({"T": 9, "S": 12, "window": 5, "segments": 4})
    del settings["softcap"], settings["lead"]
    y, weights = plain.attention(*tensors, **settings)
    same, lse = naive.attention(*tensors, **settings)
    torch.testing.assert_close(same, y)
    assert lse.shape == weights.shape[:3]


def test_softmaxes_of_blocks_do_not_add_up() -> None:
    """Document 001's blocked class: every row of a block weighs 1, so the output grows with the number of blocks."""
    (q, k, v), settings = inputs({"T": 12, "S": 12, "K": 2, "causal": False})
    expected, _ = naive.attention(q, k, v, **settings)
    for columns in (12, 4):
        added = torch.zeros_like(expected)
        for left in range(0, 12, columns):
            block = slice(left, left + columns)
            added += (settings["scale"] * q @ k[:, :, block].mT).softmax(-1) @ v[:, :, block]
        assert torch.allclose(added, expected) == (columns == 12)
        right, _ = online.attention(q, k, v, **settings, columns=columns)
        torch.testing.assert_close(right, expected)


# ---- the Triton kernels ----

CASES: dict[str, dict[str, Any]] = {
    "one query, one key": {"T": 1, "S": 1},
    "causal, odd length": {"T": 70, "S": 70, "E": 16, "D": 16},
    "bidirectional, grouped heads": {"T": 40, "S": 40, "H": 4, "K": 2, "causal": False},
    "queries are the last of the keys": {"T": 33, "S": 101, "B": 2},
    "window, causal": {"T": 150, "S": 150, "window": 20},
    "window, both sides": {"T": 110, "S": 140, "window": 37, "causal": False},
    "window and the first keys": {"T": 150, "S": 170, "window": 20, "lead": 5},
    "window, both sides, and the first keys": {"T": 140, "S": 140, "window": 9, "lead": 40, "causal": False},
    "soft cap": {"T": 66, "S": 66, "softcap": 1.5},
    "key bias of the batch and key head": {"B": 2, "T": 40, "S": 45, "H": 4, "K": 2, "bias": (2, 2)},
    "key bias of the query head": {"B": 2, "T": 40, "S": 40, "H": 4, "K": 2, "bias": (1, 4), "causal": False},
    "widths that are no powers of two": {"T": 34, "S": 34, "E": 20, "D": 33, "K": 2},
    "segments": {"B": 2, "T": 70, "S": 80, "segments": 23, "causal": False},
    "everything": {
        "B": 2, "T": 70, "S": 100, "H": 4, "K": 2, "E": 24, "D": 16, "window": 40, "softcap": 3.0, "bias": (1, 2),
        "segments": 60,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_kernels_err_no_more_than_the_definition(name: str) -> None:
    assert_errs_no_more_than_naive({"dtype": torch.float32, **CASES[name]})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal, odd length", "everything"])
def test_kernels_err_no_more_than_the_definition_in_half_precision(name: str, dtype: torch.dtype) -> None:
    assert_errs_no_more_than_naive({"dtype": dtype, **CASES[name]})


@pytest.mark.parametrize("causal", [True, False])
def test_a_block_in_which_all_is_masked_leaves_no_trace(causal: bool) -> None:
    """Tiles are 32 by 32. The rows of the last segment see nothing of the first tiles,
    which are loaded for the rows of the segment before: an unguarded running maximum of −∞ makes them NaN.
    """
    (q, k, v), settings = inputs({"T": 150, "S": 150, "causal": causal, "dtype": torch.float32})
    keys = (torch.arange(150) >= 100).long()[None]
    settings["segments"] = (keys, keys)
    together = run(attention, [q, k, v], settings, torch.float32)
    assert all(x.isfinite().all() for x in together)
    del settings["segments"]
    for part in (slice(0, 100), slice(100, 150)):
        alone, lse = naive.attention(q[:, :, part], k[:, :, part], v[:, :, part], **settings)
        torch.testing.assert_close(together[0][:, :, part].float(), alone, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(together[1][:, :, part].float(), lse, atol=2e-6, rtol=1e-5)


def test_a_query_that_sees_nothing_gets_zero_and_gives_no_gradient() -> None:
    (q, k, v), settings = inputs({"T": 40, "S": 40, "dtype": torch.float32})
    queries, keys = torch.zeros(1, 40, dtype=torch.long), torch.zeros(1, 40, dtype=torch.long)
    queries[:, 7] = 1  # of a segment that has no keys
    y, lse, dq, dk, dv = run(attention, [q, k, v], settings | {"segments": (queries, keys)}, torch.float32)
    assert not y[:, :, 7].any()
    assert not dq[:, :, 7].any()
    assert (lse[:, :, 7] == -9.0).all(), "its logarithm of a sum is −∞"
    assert all(x.isfinite().all() for x in (y, dq, dk, dv))


@pytest.mark.parametrize("causal", [True, False])
def test_a_key_bias_of_minus_infinity_hides_the_key(causal: bool) -> None:
    """Hidden are more keys than a tile holds, and under the causal mask all that the first 100 queries could see: also
    tiles that need no mask hold rows that see nothing.
    """
    (q, k, v), settings = inputs({"T": 150, "S": 150, "causal": causal, "dtype": torch.float32})
    bias = torch.zeros(1, 1, 150)
    bias[..., :100] = -torch.inf
    y, lse, dq, dk, dv, _ = run(attention, [q, k, v, bias], settings, torch.float32)
    seeing = slice(100, None) if causal else slice(None)
    expected, sums = naive.attention(q[:, :, seeing], k[:, :, 100:], v[:, :, 100:], **settings)
    torch.testing.assert_close(y[:, :, seeing].float(), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse[:, :, seeing].float(), sums, atol=2e-6, rtol=1e-5)
    assert not dk[:, :, :100].any()
    assert not dv[:, :, :100].any()
    assert dq.isfinite().all()
    if causal:
        assert not y[:, :, :100].any()
        assert not dq[:, :, :100].any()


def test_tiles_out_of_reach_are_not_loaded() -> None:
    """NaN in keys that no window reaches spreads as soon as they are multiplied, whatever the mask says afterwards."""
    (q, k, v), settings = inputs({"T": 64, "S": 200, "window": 10, "dtype": torch.float32})
    expected, _ = attention(q, k, v, **settings)
    for x in (k, v):
        x[:, :, :96] = torch.nan  # the first query stands at 136 and sees keys from 127 on, which lie in the tile at 96
    assert torch.equal(attention(q, k, v, **settings)[0], expected)


def test_large_scores_neither_overflow_nor_lose_their_row() -> None:
    (q, k, v), settings = inputs({"T": 40, "S": 40, "scale": 300.0, "dtype": torch.float32})
    y, lse = attention(q, k, v, **settings)
    expected, sums = naive.attention(q.double(), k.double(), v.double(), **settings)
    torch.testing.assert_close(y.double(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lse.double(), sums, atol=1e-3, rtol=1e-5)


def test_rows_may_lie_anywhere_in_memory() -> None:
    """Heads split off from [B,T,H·D] are views; columns that do not lie in one piece are copied."""
    (q, k, v), settings = inputs({"T": 20, "S": 20, "H": 2, "K": 2, "E": 16, "D": 16, "dtype": torch.float32})
    expected, _ = attention(q, k, v, **settings)
    views = [q.transpose(1, 2).contiguous().transpose(1, 2), k.mT.contiguous().mT, v]
    y, _ = attention(*views, **settings)
    assert torch.equal(y, expected)
    assert y.transpose(1, 2).is_contiguous(), "putting the heads side by side costs no copy"


def test_the_operators_keep_torchs_rules() -> None:
    """Schema, shapes and strides promised to the compiler, gradients registered; then whole under the compiler."""
    (q, k, v, bias), settings = inputs({"T": 18, "S": 20, "bias": (1, 1), "dtype": torch.float32})
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    given = (*leaves, None, None, settings["scale"], True, None, 0, None)
    operator = torch.ops.headwise.flash_attention.default
    torch.library.opcheck(operator, given)

    def loss(*tensors: Tensor) -> Tensor:
        y, lse = attention(*tensors[:3], key_bias=tensors[3], **settings)
        return y.square().sum() + lse.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager_default_partitioner", fullgraph=True)
    ours, theirs = (torch.autograd.grad(form(*leaves), leaves) for form in (compiled, loss))
    torch.testing.assert_close(ours, theirs)


def test_under_autocast_the_kernels_run_in_its_dtype() -> None:
    tensors, settings = inputs({"T": 20, "S": 20, "dtype": torch.float32})
    tensors[2] = tensors[2].bfloat16()  # a rotary code leaves queries and keys in float32, values come as they are
    with torch.autocast("cpu", torch.bfloat16):
        y, lse = attention(*tensors, **settings)
    assert (y.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_a_processor_keeps_torchs_kernel() -> None:
    q = torch.zeros(1, 1, 64, 64)
    assert not available(q)
    assert fused(q, q, q, scale=1.0, causal=True, window=3) is None


@pytest.mark.parametrize("fields", [{"window": 11, "first": 3}, {"softcap": 2.0}, {"segments": True}, {}])
def test_attention_goes_through_the_kernels_where_torch_has_none(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (q, k, v), settings = inputs({"T": 40, "S": 60, "H": 4, "K": 2, "dtype": torch.float32})
    shared: dict[str, Any] = {"scale": settings["scale"], "sink_H": torch.tensor([0.7, -1.3, 0.0, 2.0]), **fields}
    if fields.get("segments"):
        keys = torch.arange(60).div(25, rounding_mode="floor")[None]
        shared["segments"] = (keys[:, 20:], keys)
    elsewhere = sdpa.attention(q, k, v, **shared)
    monkeypatch.setattr(flash, "available", lambda q, v: True)  # as on a GPU
    calls = []
    monkeypatch.setattr(flash, "attention", lambda *a, **kw: calls.append(kw) or attention(*a, **kw))
    here = sdpa.attention(q, k, v, **shared)
    torch.testing.assert_close(here, elsewhere)
    assert len(calls) == 1
    sdpa.attention(q, k, v, **shared, attn_mask=torch.zeros(40, 60))
    assert len(calls) == 1, "the kernels know no mask but their own"


def test_a_learned_sink_takes_its_share_of_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "available", lambda q, v: True)  # as on a GPU
    (q, k, v), settings = inputs({"T": 40, "S": 60, "window": 11, "lead": 3, "dtype": torch.float32})
    sink = torch.tensor([0.7, -1.3], requires_grad=True)
    seen = naive.visible(40, 60, True, 11, 3, None)
    scores = (settings["scale"] * q @ k.mT).masked_fill(~seen, -torch.inf)
    weights = torch.cat([scores, sink[None, :, None, None].expand(1, 2, 40, 1)], -1).softmax(-1)[..., :-1]
    expected = weights @ v
    y = fused(q, k, v, sink_H=sink, **settings)
    assert y is not None
    torch.testing.assert_close(y, expected)
    ours, theirs = (torch.autograd.grad(x.square().sum(), sink) for x in (y, expected))
    torch.testing.assert_close(ours, theirs)
    assert fused(q, k[:, :, :40], v[:, :, :40], scale=1.0, causal=True) is None, "stock attention fuses this"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"H": 3, "K": 2}, "K dividing H"),
    "more queries than keys": ({"T": 6, "S": 5}, "T ≤ S"),
    "dtype": ({"dtype": torch.float64}, "float64.*the kernels want one of float16"),
    "width": ({"E": 300}, "width 300; the kernels go up to 256"),
    "window": ({"window": 0}, "window=0"),
    "soft cap": ({"softcap": -1.0}, "softcap=-1.0"),
    "scale": ({"scale": 0.0}, "scale=0.0"),
    "bias": ({"bias": (3, 1)}, r"key_bias is \(3, 1, 5\); wanted \[1 or 1, 1, 1 or 2, 5\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_said(name: str) -> None:
    case, message = WRONG[name]
    tensors, settings = inputs({"dtype": torch.float32, **case})
    with pytest.raises(HeadwiseError, match=message):
        attention(*tensors[:3], key_bias=tensors[3] if len(tensors) > 3 else None, **settings)


def test_segments_that_do_not_fit_are_said() -> None:
    tensors, settings = inputs({"dtype": torch.float32})
    wrong = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(HeadwiseError, match=r"segments are \(1, 3\) and \(1, 3\); wanted \[1,5\]"):
        attention(*tensors, **settings, segments=(wrong, wrong))


def test_kernels_become_code_for_hopper_without_a_gpu() -> None:
    """The interpreter takes what the compiler does not. This makes machine code, looks for tensor cores, and holds the
    shared memory against what there is.
    """
    driver = Path(__file__).with_name("compiled_flash.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(driver)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in done.stdout.splitlines():
        kernel, shared, matrix = line.split()
        assert int(shared) <= 227 * 1024, kernel
        assert matrix == ("none" if kernel == "delta" else "wgmma"), kernel
    assert len(done.stdout.splitlines()) == 5


def test_tanh_is_exact_to_a_few_units_in_the_last_place() -> None:
    """A soft cap multiplies it by up to 50, and an absolute error near 0 with it. A query that sees one key has that
    key's score for the logarithm of its sum.
    """
    (q, k, v), settings = inputs({"T": 64, "S": 64, "E": 16, "window": 1, "dtype": torch.float32})
    for size in (1e-3, 1.0, 100.0):
        settings["softcap"] = 50.0
        _, lse = attention(q, size * k, v, **settings)
        _, exact = naive.attention(q.double(), (size * k).double(), v.double(), **settings)
        assert rms(lse.double() - exact) <= 3e-7 * rms(exact), size
