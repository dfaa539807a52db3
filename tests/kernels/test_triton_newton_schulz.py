"""Symmetric products in Triton against float64, and Newton-Schulz with them against the standard iteration (2.4)."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minglm.kernels import dispatch
from minglm.kernels.newton_schulz import orthogonalize, polar_express
from minglm.kernels.toolchain.interpreter import in_new_process, switch_on, watched
from minglm.testing.model import normal
from minglm.testing.strategies import seeds

DEVICE = switch_on()
from minglm.kernels.newton_schulz import triton_kernel as kernel
from minglm.kernels.toolchain.tiles import Tiles

pytestmark = pytest.mark.usefixtures("poisoned")

# Of the largest number.
ROUNDING = {
    torch.float32: 1e-5,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}


def compare(seed, matrices, rows, depth, dtype, add):
    """Check a product of two commuting symmetric matrices, or a Gram matrix, with or without the other terms."""
    x = normal(seed, matrices, rows, depth, scale=depth**-0.5).to(DEVICE, dtype)
    terms = (x, x)
    exact = x.double() @ x.double().mT
    if add:
        gram = kernel.symmetric_product_triton(x, x)
        terms = (gram, gram, 0.7, gram, -0.4, 1.5)
        exact = 0.7 * gram.double() @ gram.double() - 0.4 * gram.double()
        exact.diagonal(dim1=1, dim2=2).add_(1.5)
    found = kernel.symmetric_product_triton(*terms)
    assert found.dtype == dtype and torch.equal(found, found.mT)
    torch.testing.assert_close(
        found.double(), exact, atol=ROUNDING[dtype] * exact.abs().max().item(), rtol=0
    )
    assert torch.equal(found, kernel.symmetric_product_triton(*terms))


@settings(max_examples=12)
@given(
    seed=seeds,
    matrices=st.integers(1, 3),
    rows=st.sampled_from([1, 7, 33, 70]),
    depth=st.sampled_from([1, 8, 45]),
    dtype=st.sampled_from(list(ROUNDING)),
    add=st.booleans(),
)
# Ten tiles of a triangle.
@example(seed=0, matrices=2, rows=100, depth=40, dtype=torch.float32, add=True)
def test_equals_float64(seed, matrices, rows, depth, dtype, add):
    """Every entry, both halves, to one rounding; symmetric and repeatable to the last bit."""
    compare(seed, matrices, rows, depth, dtype, add)


@pytest.mark.parametrize("rows, depth", [(264, 136), (257, 131)])
def test_large_tiles(monkeypatch, rows, depth):
    """The tiles of large matrices, for sides that the copy engine can read, and sides that it cannot."""
    monkeypatch.setattr(kernel, "SYMMETRIC", {2**31: Tiles(128, 256, 64, 8, 4)})
    compare(0, 1, rows, depth, torch.bfloat16, True)


@pytest.mark.skipif(DEVICE == "cuda", reason="watches the interpreter")
@pytest.mark.parametrize("rows", [1, 40, 150])
def test_every_element_is_stored_once(monkeypatch, rows):
    """No element of a result is stored by two programs, which would be a race, and none is left out."""
    monkeypatch.setattr(kernel, "SYMMETRIC", {2**31: Tiles(32, 64, 64, 4, 1)})
    x = normal(0, 2, rows, 16).half()
    with watched() as stores:
        found = kernel.symmetric_product_triton(x, x)
    by = {}
    for program, at, mask in stores:
        for address in at[mask].tolist():
            assert by.setdefault(address, program) == program
    assert len(by) == found.numel()


@pytest.mark.parametrize("gram", [False, True], ids=["standard", "gram"])
@pytest.mark.parametrize("shape", [(2, 20, 40), (36, 24), (33, 33), (0, 4, 5), (2, 1, 1)])
def test_newton_schulz_with_these_products(monkeypatch, shape, gram):
    """Wide, tall, square, many, none: the result is that of the standard iteration in float64."""
    monkeypatch.setattr(dispatch, "_chosen", "triton")
    matrices = normal(1, *shape)
    coefficients = polar_express(5) if shape[-1] == 24 else None
    exact = orthogonalize(matrices.double(), 5, torch.float64, coefficients)
    # float32 as computed; float16 has 11 bits, and small singular values are multiplied by several hundred
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 0.1)):
        found = orthogonalize(matrices.to(DEVICE), 5, dtype, coefficients, gram)
        assert (found.cpu().double() - exact).norm() <= tolerance * exact.norm()


def test_a_tile_that_is_not_mirrored_is_found(monkeypatch):
    """The comparison fails for a kernel that leaves the upper half unwritten."""
    whole = kernel.symmetric_product_triton

    def lower(*terms):
        return whole(*terms).tril() + torch.full_like(whole(*terms), torch.nan).triu(1)

    monkeypatch.setattr(kernel, "symmetric_product_triton", lower)
    with pytest.raises(AssertionError):
        compare(0, 1, 33, 8, torch.float32, False)


@pytest.mark.ci
def test_offsets_beyond_32_bits():
    """The last of 280 matrices of 1536 x 5120 lies past 2^31 elements, and so does the last of 1,000 results."""
    program = (
        "import torch; from minglm.kernels.newton_schulz import triton_kernel as kernel\n"
        "from minglm.kernels.toolchain.tiles import Tiles\n"
        "kernel.SYMMETRIC = {2**31: Tiles(512, 1024, 1024, 8, 1)}\n"
        "def check(count, depth):\n"
        "    x, tile = last_tile(count, 1536, depth, tile=(1536, depth)); pin_program_id(4, count - 1)\n"
        "    found, exact = kernel.symmetric_product_triton(x, x), (tile[1024:].double() @ tile[512:1024].double().T)\n"
        "    for part in found[-1, 1024:, 512:1024], found[-1, 512:1024, 1024:].T:\n"
        "        assert (part - exact).abs().max() < 0.01 * exact.abs().max()\n"
        "for kernel.bulk_readable in (lambda *t: True), (lambda *t: False):\n"
        "    check(280, 5120); check(1000, 16)"
    )
    done = in_new_process(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("shape", [(8, 1536, 5120), (1, 5120, 5120), (1, 5120, 12288)])
def test_real_shapes(dtype, shape):
    """GLM-4.5's matrices: experts, and the largest of attention."""
    compare(0, *shape, dtype, False)
    compare(0, *shape, dtype, True)


@pytest.mark.gpu
@pytest.mark.parametrize("gram", [False, True], ids=["standard", "gram"])
def test_newton_schulz_at_real_size(gram):
    """A wave and a half of experts: every singular value ends near one, as in float64."""
    matrices = normal(1, 12, 1536, 5120).to(DEVICE)
    found = orthogonalize(matrices, gram=gram)
    exact = orthogonalize(matrices.double(), dtype=torch.float64)
    assert (found - exact).norm() < 0.1 * exact.norm()
