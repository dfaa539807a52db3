"""Float8 in blocks in Triton: the same bits as the plain form, and the error that three bits of mantissa make."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minglm.kernels import dispatch
from minglm.kernels.fp8 import (
    ACTIVATION_BLOCK,
    WEIGHT_BLOCK,
    dequantize,
    quantize,
    scaled_product,
)
from minglm.kernels.toolchain.interpreter import in_new_process, switch_on
from minglm.testing.model import normal
from minglm.testing.strategies import numbers, seeds

DEVICE = switch_on()
from minglm.kernels.fp8 import triton_kernel as kernel
from minglm.kernels.fp8.triton_kernel import quantize_triton, scaled_product_triton

pytestmark = pytest.mark.usefixtures("poisoned")

ROUNDING = 2**-4 / math.sqrt(3) * math.sqrt(2 / 3 * math.log(2))
"""Relative error, root mean square, of numbers with three bits of mantissa: an error anywhere within half a step, 1/16
of the power of two below the number, whose own mean square, spread evenly over octaves, is 3 / (2 ln 2)."""


def check_quantization(x):
    """Check both kinds of blocks: numbers and scales of the plain form, bit for bit."""
    for block in (WEIGHT_BLOCK, ACTIVATION_BLOCK):
        q, scale = quantize_triton(x.to(DEVICE), block)
        exact, exact_scale = quantize(x, block)
        assert torch.equal(q.cpu().view(torch.uint8), exact.view(torch.uint8))
        assert torch.equal(scale.cpu(), exact_scale)


@settings(max_examples=8)
@given(
    seed=seeds,
    shape=st.sampled_from([(1, 1), (3, 5), (129, 130), (2, 40, 257)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_quantised_to_the_same_bits(seed, shape, dtype, size):
    """Any shape, stacks too, any size of number, and a block of zeros in between."""
    x = normal(seed, *shape).mul(size).to(dtype)
    x[..., :1, 128:256] = 0
    check_quantization(x)


def test_what_no_scale_fits_shows():
    """A number that is not finite makes itself or its block not a number, and its neighbours stay as they are."""
    x = torch.ones(2, 256, device=DEVICE)
    x[0, 3] = torch.nan
    x[1, 200] = torch.inf
    q, scale = quantize_triton(x, ACTIVATION_BLOCK)
    back = dequantize(q, scale, block=ACTIVATION_BLOCK)
    assert back[0, 3].isnan() and back[1, 128:].isnan().any()
    assert back[1, :128].eq(1).all() and back[0, 128:].eq(1).all()


def drawn(seed, loads, K, F, D):
    """Draw rows of x picked by a random order, matrices, and each expert's end."""
    rows = sum(loads)
    T = max(1, -(-sum(loads) // K))
    x_TD = normal(seed, T, D)
    w_EFD = normal(seed + 1, len(loads), F, D)
    w_EFD[:, :1] *= 30  # rows that need a scale of their own
    order = torch.randperm(T * K, generator=numbers(seed + 2))[:rows]
    return x_TD, w_EFD, torch.tensor(loads).cumsum(0).to(torch.int32), order


def compare(seed, loads, K, F, D, pick, dtype=torch.float32):
    """Check the kernel against the plain form in float64, from the same float8 numbers; return the kernel's result."""
    x_TD, w_EFD, ends_E, order = drawn(seed, loads, K, F, D)
    if not pick:
        x_TD = x_TD[order // K]
        order = None
    x, xs, w, ws = (*quantize(x_TD, ACTIVATION_BLOCK), *quantize(w_EFD))
    given_ = [v if v is None else v.to(DEVICE) for v in (x, xs, w, ws, ends_E, order)]
    found = scaled_product_triton(*given_, K if pick else 1, dtype)
    rows = dequantize(x, xs, block=ACTIVATION_BLOCK).double()
    rows = rows if order is None else rows[order // K]
    parts = zip(rows.split(loads), dequantize(w, ws).double())
    exact = torch.cat([part @ matrix.T for part, matrix in parts]).to(DEVICE)
    # a float8 product is exact in float32; on a GPU 128 of them are added with 14 bits or more
    tolerance = (1e-6 if DEVICE == "cpu" else 2**-11) if dtype == torch.float32 else 2**-8
    assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max()
    assert torch.equal(found, scaled_product_triton(*given_, K if pick else 1, dtype))
    return found


@settings(max_examples=8)
@given(
    seed=seeds,
    loads=st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(sum),
    K=st.integers(1, 3),
    sizes=st.sampled_from([(1, 1), (128, 128), (130, 272), (47, 129)]),
    pick=st.booleans(),
)
@example(seed=0, loads=[0, 37, 0, 1], K=2, sizes=(47, 129), pick=True)
def test_product_equals_float64(seed, loads, K, sizes, pick):
    """Uneven loads, experts without rows, shapes that 128 does not divide, rows picked or as they are."""
    compare(seed, loads, K, *sizes, pick)


@pytest.mark.parametrize("pick", [True, False], ids=["picked", "sorted"])
def test_large_tiles(monkeypatch, pick):
    """The tiles for many rows an expert."""
    monkeypatch.setattr(kernel, "PRODUCT", {2**31: kernel.PRODUCT[2**31]})
    compare(1, [130, 20], 2, 144, 272, pick, torch.bfloat16)


def test_error_is_that_of_three_bits(monkeypatch):
    """Rounding both operands moves a product by sqrt(2) times one operand's error, however long the sum is."""
    monkeypatch.setattr(dispatch, "_chosen", "triton")
    for D in (128, 1000):
        x = normal(0, 64, D).to(DEVICE)
        w = normal(1, 1, 128, D).to(DEVICE)
        ends = torch.tensor([64], device=DEVICE)
        found = scaled_product(
            *quantize(x, ACTIVATION_BLOCK), *quantize(w), ends.int(), dtype=torch.float32
        )
        exact = x.double() @ w[0].double().T
        measured = float((found - exact).norm() / exact.norm())
        # 8,192 products; the octaves are not even.
        assert measured == pytest.approx(math.sqrt(2) * ROUNDING, rel=0.1)


def test_the_switch_takes_both_forms(monkeypatch):
    """One call, the same result whether torch or Triton does it; no rows are no rows."""
    x_TD, w_EFD, ends_E, order = (v.to(DEVICE) for v in drawn(3, [3, 0, 9], 2, 20, 130))
    results = []
    for chosen in ("torch", "triton"):
        monkeypatch.setattr(dispatch, "_chosen", chosen)
        blocks = *quantize(x_TD, ACTIVATION_BLOCK), *quantize(w_EFD)
        results.append(scaled_product(*blocks, ends_E, order, 2).float())
        assert scaled_product(*blocks, 0 * ends_E, order[:0], 2).shape == (0, 20)
    torch.testing.assert_close(*results, rtol=2**-7, atol=1e-3)  # one rounding to bfloat16


def test_a_scale_of_the_wrong_block_is_found(monkeypatch):
    """The comparison fails where the scales of the weights are those of the next block."""
    whole = kernel.scaled_product_triton

    def shifted(x, xs, w, ws, *rest):
        return whole(x, xs, w, ws.roll(1, -1), *rest)

    monkeypatch.setitem(globals(), "scaled_product_triton", shifted)
    with pytest.raises(AssertionError):
        compare(0, [5], 1, 20, 256, False)


SETUP = """
import torch; from minglm.kernels.fp8 import triton_kernel as kernel
from minglm.kernels.fp8.eager import quantize
def check(found, exact):
    assert (found.double() - exact).abs().max() < 0.01 * exact.abs().max(), (found, exact)
"""
MATRIX = """
E, F, D = 280, 1536, 5120
w, tile = last_tile(E, F, D, tile=(F, D), dtype=torch.float8_e4m3fn)
x = torch.randn(1, D).to(torch.float8_e4m3fn)
ends = torch.zeros(E, dtype=torch.int32); ends[-1] = 1
scales = torch.ones(1, 40), torch.ones(E, 12, 40)
kernel.PRODUCT = {2**31: kernel.Tiles(16, 128, 128, 4, 1)}; pin_program_id(11)
for kernel.bulk_readable in (lambda *t: True), (lambda *t: False):
    y = kernel.scaled_product_triton(x, scales[0], w, scales[1], ends, None, 1, torch.float32)
    check(y[:, -128:], (x.double() @ tile.double().T)[:, -128:])
"""
ROWS = """
T, D = 450_000, 5120
x, row = last_tile(T, D, tile=(1, D)); pin_program_id(39, T // 32, 0)
q, scale = kernel.quantize_triton(x, (1, 128))
exact, exact_scale = quantize(row[:, -128:], (1, 128))
assert torch.equal(q[-1, -128:].float(), exact[0].float()) and scale[-1, -1] == exact_scale[0, 0]
"""


@pytest.mark.ci
@pytest.mark.parametrize("program", [MATRIX, ROWS], ids=["matrix", "rows"])
def test_offsets_beyond_32_bits(program):
    """The last of 280 of GLM-4.5's experts, and the last of 450,000 rows, lie past 2^31 elements."""
    done = in_new_process(SETUP + program)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 100, 800])
@pytest.mark.parametrize("sizes", [(3072, 5120), (5120, 1536)])
def test_real_shapes(rows, sizes):
    """GLM-4.5's experts, an eighth of them; decoding and prefill."""
    compare(0, [rows] * 18 + [0, 2 * rows], 8, *sizes, True, torch.bfloat16)
    compare(0, [rows] * 18 + [0, 2 * rows], 8, *sizes, False, torch.bfloat16)
    check_quantization(normal(0, rows, sizes[1], scale=3).bfloat16())
