"""Rotary embedding: the shared contract, and the precision its angles are kept in."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.model.rope import angles, rotate, rotate_pairs
from minglm.testing.model import check_rope, normal
from minglm.testing.strategies import seeds


def ours(x_BSNA, positions_BS, rotary_dim, theta):
    """Compute the angles and rotate."""
    return rotate(x_BSNA, *angles(positions_BS, rotary_dim, theta))


def test_rope_keeps_the_contract():
    """Half-split rotation of the first dimensions, by exact angles; dot products see only distance."""
    check_rope(ours)


def interleaved(x_BSNA, positions_BS, rotary_dim, theta):
    """Rotate neighbours, the layout of other GLM models; right for them and wrong for these checkpoints."""
    cos, sin = angles(positions_BS, rotary_dim, theta)
    a = x_BSNA[..., 0:rotary_dim:2]
    b = x_BSNA[..., 1:rotary_dim:2]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([turned, x_BSNA[..., rotary_dim:]], -1)


def last_dimensions(x_BSNA, positions_BS, rotary_dim, theta):
    """Rotate the end of each head and not its beginning."""
    return ours(x_BSNA.flip(-1), positions_BS, rotary_dim, theta).flip(-1)


def frequencies_over_the_head(x_BSNA, positions_BS, rotary_dim, theta):
    """Spread the frequencies over the whole head although only a part rotates."""
    cos, sin = angles(positions_BS, x_BSNA.shape[-1], theta)
    return rotate(x_BSNA, cos[..., : rotary_dim // 2], sin[..., : rotary_dim // 2])


def backwards(x_BSNA, positions_BS, rotary_dim, theta):
    """Turn the other way; dot products do not show it, released weights do."""
    return ours(x_BSNA, -positions_BS, rotary_dim, theta)


def positions_of_the_row(x_BSNA, positions_BS, rotary_dim, theta):
    """Count 0, 1, 2, ... and never read the positions, so packed documents do not restart."""
    return ours(x_BSNA, torch.arange(x_BSNA.shape[1])[None], rotary_dim, theta)


@pytest.mark.parametrize(
    "broken",
    [interleaved, last_dimensions, frequencies_over_the_head, backwards, positions_of_the_row],
)
def test_contract_finds_broken_rope(broken):
    """Each mistake others have made is found."""
    with pytest.raises(AssertionError):
        check_rope(broken)


@given(
    position=st.integers(0, 1_048_576) | st.sampled_from([30_000, 202_751]),
    rotary_dim=st.sampled_from([4, 64, 128]),
    theta=st.sampled_from([10_000.0, 1_000_000.0]),
)
def test_angles_are_exact_at_the_longest_position(position, rotary_dim, theta):
    """Cosine and sine equal Python's, far out too.

    The tolerance is the rounding of a float32 number below 1, and that of a float64 angle of a million: 1e-10.
    """
    cos, sin = angles(torch.tensor([[position]]), rotary_dim, theta)
    assert cos.dtype == sin.dtype == torch.float32
    for pair in range(rotary_dim // 2):
        angle = position * theta ** (-2 * pair / rotary_dim)
        assert abs(cos[0, 0, 0, pair].item() - math.cos(angle)) < 1e-7
        assert abs(sin[0, 0, 0, pair].item() - math.sin(angle)) < 1e-7


@given(seed=seeds, pairs=st.integers(1, 4), position=st.integers(0, 99))
def test_neighbours_rotate_as_complex_numbers(seed, pairs, position):
    """In the layout of latent attention: two neighbours are a real and an imaginary part, times e^(i angle)."""
    x_BSNA = normal(seed, 2, 3, 2, 2 * pairs)
    positions_BS = position + torch.arange(3)[None]
    found = rotate_pairs(x_BSNA, *angles(positions_BS, 2 * pairs, 100.0))
    numbers = torch.view_as_complex(x_BSNA.double().unflatten(-1, (pairs, 2)))
    turns = 100.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angle = positions_BS[..., None, None] * turns
    expected = torch.view_as_real(numbers * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)  # float32


@given(seed=seeds)
def test_bfloat16_in_bfloat16_out(seed):
    """Activations keep their dtype, and a rotation keeps the length of every pair up to bfloat16's 8 bits."""
    x_BSNA = normal(seed, 1, 5, 2, 8).bfloat16()
    y_BSNA = ours(x_BSNA, torch.arange(5)[None] * 1000, 8, 10_000.0)
    assert y_BSNA.dtype == torch.bfloat16
    before, after = (x.float().unflatten(-1, (2, 4)).norm(dim=-2) for x in (x_BSNA, y_BSNA))
    torch.testing.assert_close(before, after, atol=0.02, rtol=0.02)


def test_largest_wavelength_of_the_released_model():
    """With base 1,000,000 and 64 rotary dimensions the slowest pair needs four million positions for a turn."""
    cos, _ = angles(torch.tensor([[1]]), 64, 1e6)
    slowest = 2 * math.pi * 1e6 ** (62 / 64)
    assert slowest > 4e6 and cos.shape == (1, 1, 1, 32)
