"""Position codes: what the documents and papers promise of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise import kernels
from headwise.errors import HeadwiseError
from headwise.model import build
from headwise.position.alibi import ALiBiEncoding, slopes
from headwise.position.sinusoidal import sinusoids
from headwise.registry import get_position

PAIRINGS = ["half", "interleaved"]


def rotated(x: torch.Tensor, positions: list[int], **fields: object) -> torch.Tensor:
    position = get_position("rope", d_model=64, n_heads=1, **fields)
    return position.encode(torch.tensor(positions), max(positions) + 1, x.shape[-1]).rotate(x)


@given(st.integers(0, 4000), st.integers(0, 4000), st.integers(0, 100_000), st.sampled_from(PAIRINGS))
def test_rope_score_depends_on_the_distance_alone(i: int, j: int, shift: int, pairing: str) -> None:
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)
    here = rotated(q, [i], pairing=pairing) * rotated(k, [j], pairing=pairing)
    there = rotated(q, [i + shift], pairing=pairing) * rotated(k, [j + shift], pairing=pairing)
    assert here.sum().item() == pytest.approx(there.sum().item(), abs=1e-9)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_rope_keeps_lengths_and_leaves_the_unturned_part(pairing: str) -> None:
    x = torch.randn(2, 3, 5, 64, dtype=torch.float64)
    y = rotated(x, list(range(5)), pairing=pairing, partial_rotary_factor=0.25)
    assert torch.equal(y[..., 16:], x[..., 16:])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[..., 0, :], x[..., 0, :]), "position 0 does not turn"


def test_rope_pairings_are_one_rotation_in_two_layouts() -> None:
    x = torch.randn(1, 1, 9, 64, dtype=torch.float64)
    to_interleaved = torch.arange(64).view(2, 32).T.flatten()
    half = rotated(x, list(range(9)))
    torch.testing.assert_close(
        rotated(x[..., to_interleaved], list(range(9)), pairing="interleaved"), half[..., to_interleaved]
    )


def test_rope_angles_are_the_published_ones() -> None:
    """θ_1 at D = 64 is 0.750 and θ_31 is 1.33e-4 (document 001 prints others)."""
    angles = get_position("rope", d_model=64, n_heads=1).encode(torch.tensor([1]), 2, 64).angles[0]
    assert angles[0].item() == 1
    assert angles[1].item() == pytest.approx(0.750, abs=5e-4)
    assert angles[31].item() == pytest.approx(1.33e-4, abs=5e-7)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_rope_fast_form_equals_complex_numbers(pairing: str) -> None:
    x = torch.randn(2, 2, 50, 32, dtype=torch.float64)
    fast = rotated(x, list(range(50)), pairing=pairing, partial_rotary_factor=0.5)
    with kernels.naive():
        torch.testing.assert_close(rotated(x, list(range(50)), pairing=pairing, partial_rotary_factor=0.5), fast)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_rope_forms_agree_in_half_precision(pairing: str) -> None:
    """The readable form too turns by exact angles, though bfloat16 has no complex numbers."""
    x = torch.randn(1, 2, 2, 64).bfloat16()
    fast = rotated(x, [3, 1001], pairing=pairing)
    with kernels.naive():
        readable = rotated(x, [3, 1001], pairing=pairing)
    torch.testing.assert_close(readable, fast)


def test_alibi_slopes_follow_the_paper_for_any_number_of_heads() -> None:
    assert slopes(8) == [2.0 ** -(h + 1) for h in range(8)]
    assert slopes(16)[:2] == pytest.approx([2**-0.5, 2**-1])
    # For 12 heads: the 8 slopes of 8 heads, then every other slope of 16.
    assert slopes(12) == slopes(8) + slopes(16)[0:8:2]
    assert all(len(slopes(n)) == n for n in range(1, 130))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_heads", [8, 12])
def test_alibi_factors_are_the_bias_up_to_a_constant_in_each_row(dtype: torch.dtype, n_heads: int) -> None:
    x = torch.zeros(1, dtype=dtype)
    encoding = ALiBiEncoding(torch.tensor(slopes(n_heads)), 700, 1500)
    a, b = (f.to(dtype).double() for f in encoding.bias_factors(x))
    written = ALiBiEncoding(torch.tensor(slopes(n_heads)), 700, 1500).bias(x.double(), 0, 700)
    causal = torch.ones(700, 1500).tril(800).bool()
    row_constant = (a @ b.T - written).masked_fill(~causal, torch.nan)
    spread = row_constant.nan_to_num(-torch.inf).amax(-1) - row_constant.nan_to_num(torch.inf).amin(-1)
    # Split in two parts, the slopes carry 16 bits in bfloat16: 1e-5 of the largest bias.
    assert spread.abs().max() <= {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]


def test_alibi_slopes_keep_their_precision_in_a_half_precision_model() -> None:
    """Slopes held in a buffer were once rounded when a model was cast to bfloat16."""
    position = get_position("alibi", d_model=12, n_heads=12).bfloat16()
    encoding = position.encode(torch.arange(3), 3, 1)
    assert encoding.slopes_H.tolist() == torch.tensor(slopes(12)).tolist()


def test_alibi_loses_no_accuracy_at_far_positions() -> None:
    """The factors go before q and k; behind them, the large terms swallow the small ones' bits."""
    from headwise.kernels.attention import naive, sdpa

    q, k, v = torch.randn(3, 1, 8, 1025, 64)
    encoding = ALiBiEncoding(torch.tensor(slopes(8)), 1025, 1025)
    exact, _ = naive.attention(
        q.double(), k.double(), v.double(), scale=0.125, bias_HTS=encoding.bias(q.double(), 0, 1025)
    )
    plain, _ = naive.attention(q, k, v, scale=0.125, bias_HTS=encoding.bias(q, 0, 1025))
    factors = encoding.bias_factors(q)
    fast = sdpa.attention(q, k, v, scale=0.125, bias_factors=factors)
    assert (fast - exact).abs().max() <= 2 * (plain - exact).abs().max()


@given(st.integers(0, 100_000), st.integers(1, 64))
def test_sinusoids_are_the_formula(p: int, half: int) -> None:
    width = 2 * half
    waves = sinusoids(torch.tensor([p]), width, 10000.0)[0].double()
    angle = p / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    # float32 angles of far positions carry 24 bits.
    torch.testing.assert_close(waves[0::2], angle.sin(), atol=1e-6 + p * 2e-7, rtol=0)
    torch.testing.assert_close(waves[1::2], angle.cos(), atol=1e-6 + p * 2e-7, rtol=0)


def test_learned_positions_end_with_their_table_and_say_so() -> None:
    model = build("gpt2(d_model=16, n_layers=1, n_heads=2, vocab_size=11, max_seq_len=8)")
    model(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(HeadwiseError, match="max_seq_len=8 rows; shorten the input"):
        model(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize("position", ["rope", "alibi", "sinusoidal", "none"])
def test_other_positions_have_no_limit(position: str) -> None:
    model = build(f"gpt2(d_model=16, n_layers=1, n_heads=2, vocab_size=11, max_seq_len=8, position={position})")
    assert model(torch.zeros(1, 50, dtype=torch.long)).shape == (1, 50, 11)
