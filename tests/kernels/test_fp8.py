"""Float8 in blocks: exact scales, bounded error, one large entry costs only its own block."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.kernels.fp8 import ACTIVATION_BLOCK, WEIGHT_BLOCK, dequantize, quantize
from minglm.testing.model import normal
from minglm.testing.strategies import seeds

blocks = st.sampled_from([WEIGHT_BLOCK, ACTIVATION_BLOCK, (2, 3)])
shapes = st.sampled_from([(1, 1), (3, 5), (128, 128), (130, 257), (2, 5, 129)])


@given(seeds, shapes, blocks, st.sampled_from([1e-6, 1.0, 1e6]))
def test_each_block_has_its_own_scale(seed, shape, block, size):
    """Block by block, by hand: the largest entry becomes 448, and no entry is off by more than its rounding."""
    x = normal(seed, *shape, scale=size)
    q, scale = quantize(x, block)
    back = dequantize(q, scale, block=block)
    assert q.dtype == torch.float8_e4m3fn and q.shape == x.shape and scale.dtype == torch.float32
    for row in range(0, shape[-2], block[0]):
        for column in range(0, shape[-1], block[1]):
            at = (..., slice(row, row + block[0]), slice(column, column + block[1]))
            largest = x[at].abs().amax((-2, -1))
            torch.testing.assert_close(
                scale[..., row // block[0], column // block[1]], largest / 448
            )
            torch.testing.assert_close(back[at].abs().amax((-2, -1)), largest)
            # three bits of mantissa: half a step is 1/16; below 2^-6 steps are constant, 2^-9 of a unit
            smallest_step = 2**-10 * 1.01 * largest[..., None, None] / 448
            bound = (x[at].abs() / 16).maximum(smallest_step)
            error = (back[at] - x[at]).abs()
            assert (error <= bound * 1.001).all()


def test_an_outlier_costs_only_its_own_block():
    """With one scale for all, a large entry would round the others to nothing."""
    x = torch.full((256, 256), 1e-4)
    x[0, 0] = 1e4
    back = dequantize(*quantize(x))
    assert (back[:128, :128].flatten()[1:] == 0).all()
    assert torch.allclose(back[128:, 128:], x[128:, 128:], rtol=1e-3)


def test_zeros_and_what_is_refused():
    """A block of zeros stays zero; what has no blocks, or no scale, is refused."""
    q, scale = quantize(torch.zeros(4, 300))
    assert not q.float().any()
    assert (scale == 1).all()
    assert not dequantize(q, scale).any()
    with pytest.raises(ValueError, match="needs matrices"):
        quantize(torch.zeros(3))
    for bad in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="infinite or not a number"):
            quantize(torch.tensor([[1.0, bad]]))


@given(seeds, shapes)
def test_quantising_again_changes_nothing(seed, shape):
    """What has been through float8 comes back as the same numbers."""
    q, scale = quantize(normal(seed, *shape))
    again, same = quantize(dequantize(q, scale))
    assert torch.equal(again.float(), q.float())
    torch.testing.assert_close(same, scale)
