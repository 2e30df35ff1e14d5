"""Positions taken out of keys again: the inverse of working them in, for every scaling, pairing and share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kv_models import drawn

from headwise.dims import Dims
from headwise.kernels import naive
from headwise.position import Encoding, SomeKeys, rope
from headwise.registry import POSITION
from headwise.spec.grammar import read_value

SCALINGS = [
    "",
    "linear(4)",
    "ntk(4)",
    "dynamic(4, original_max_position_embeddings=16)",
    "yarn(4, original_max_position_embeddings=16)",
    "yarn(40, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=1.0)",
    "llama3(8, original_max_position_embeddings=16)",
    "longrope(4, original_max_position_embeddings=16, short_factor={short}, long_factor={long})",
    "longrope(4, original_max_position_embeddings=99, short_factor={short}, long_factor={long}, attention_factor=0.5)",
]


def test_every_scaling_is_among_them() -> None:
    assert {call.partition("(")[0] for call in SCALINGS} - {""} == set(rope.SCALINGS)


def code(call: str, positions: torch.Tensor, seq_len: int, head_dim: int = 8) -> Encoding:
    position = POSITION.build(POSITION.spec(read_value(call)), Dims(d_model=4 * head_dim, n_heads=4))
    encoding: Encoding = position.encode(positions, seq_len, head_dim)
    return encoding


@st.composite
def ropes(draw: st.DrawFn) -> str:
    share = draw(st.sampled_from([0.5, 1.0]))
    pairs = int(8 * share) // 2
    lists = {"short": [1.0 + n / 8 for n in range(pairs)], "long": [1.0 + n for n in range(pairs)]}
    scaling = draw(st.sampled_from(SCALINGS)).format(**lists)
    fields = [f"pairing={draw(st.sampled_from(['half', 'interleaved']))}", f"partial_rotary_factor={share}"]
    fields += [f"base={draw(st.sampled_from([100.0, 1e4, 1e6]))}"] + ([f"scaling={scaling}"] if scaling else [])
    return f"rope({', '.join(fields)})"


@given(ropes(), st.integers(1, 40), st.integers(0, 5000), st.booleans(), st.integers(0, 3))
def test_unrotate_is_the_inverse_of_rotate(call: str, T: int, start: int, by_row: bool, seed: int) -> None:
    positions = torch.arange(start, start + T)
    encoding = code(call, torch.stack([positions, positions + 7]) if by_row else positions, start + T + 7)
    x = drawn(2, 3, T, 8, seed=seed)
    for there, back in ((encoding.rotate, encoding.unrotate), (encoding.unrotate, encoding.rotate)):
        torch.testing.assert_close(back(there(x)), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(encoding.unrotate(encoding.rotate(x.float())), x.float(), rtol=0, atol=1e-5)
    with naive():
        torch.testing.assert_close(encoding.unrotate(encoding.rotate(x)), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scaling", [s for s in SCALINGS if s.startswith("yarn") or "attention_factor" in s])
def test_the_amplitude_is_taken_out(scaling: str) -> None:
    """Turning back alone would leave keys longer, or shorter, than they were."""
    call = f"rope(scaling={scaling.format(short=[1.0] * 4, long=[1.0] * 4)})"
    encoding, x = code(call, torch.arange(9), 9), drawn(1, 2, 9, 8)
    turned = encoding.rotate(x).norm(dim=-1)
    assert not torch.allclose(turned, x.norm(dim=-1))
    torch.testing.assert_close(encoding.unrotate(encoding.rotate(x)).norm(dim=-1), x.norm(dim=-1))


def test_half_precision_comes_back_to_its_rounding() -> None:
    encoding, x = code("rope", torch.arange(30000, 30009), 30009), drawn(1, 2, 9, 8, dtype=torch.bfloat16)
    back = encoding.unrotate(encoding.rotate(x))
    assert back.dtype == torch.bfloat16
    torch.testing.assert_close(back, x, rtol=0, atol=0.03)


@pytest.mark.parametrize("call", ["none", "alibi", "learned", "sinusoidal"])
def test_codes_that_turn_nothing_take_nothing_out(call: str) -> None:
    encoding, x = code(call, torch.arange(9), 9), drawn(1, 2, 9, 8)
    assert torch.equal(encoding.unrotate(x), x)


def test_some_keys_take_out_what_they_work_in() -> None:
    encoding, x = code("rope", torch.arange(9), 9), drawn(1, 2, 9, 8)
    some = SomeKeys(encoding, torch.arange(4))
    torch.testing.assert_close(some.unrotate(encoding.rotate(x)), x)


def test_mixing_turned_heads_of_two_codes_is_no_turned_mix() -> None:
    """Why keys are un-rotated first: a mean of keys turned by unlike codes is not the mean key, turned."""
    x, y = drawn(1, 1, 9, 8), drawn(1, 1, 9, 8, seed=1)
    one, other = code("rope", torch.arange(9), 9), code("rope(base=100.0)", torch.arange(9), 9)
    mixed = (one.rotate(x) + other.rotate(y)) / 2
    assert not torch.allclose(one.unrotate(mixed), (x + y) / 2, atol=0.1)
    torch.testing.assert_close((one.unrotate(one.rotate(x)) + other.unrotate(other.rotate(y))) / 2, (x + y) / 2)
