"""The fused residual addition and RMSNorm in Triton against the plain form in float64 (paper 2.1)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.kernels.norm.eager import norm
from minglm.kernels.toolchain.interpreter import in_new_process, switch_on
from minglm.testing.model import normal
from minglm.testing.strategies import seeds

DEVICE = switch_on()
from minglm.kernels.norm import triton_kernel
from minglm.kernels.norm.triton_kernel import add_norm_triton

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 1e-5


def compare(rows, width, added, later, dtype, seed, tolerance):
    """Check outputs and gradients of the kernel against the plain form in float64, from the same rounded inputs."""
    inputs = [normal(seed, rows, width, scale=2).to(dtype), 1 + normal(seed + 1, width)]
    if added:
        inputs.append(normal(seed + 2, rows, width).to(dtype))
    upstream = normal(seed + 3, rows, width).to(dtype), normal(seed + 4, rows, width).to(dtype)

    def run(function, kind):
        x, weight, *change = [t.to(DEVICE, kind or t.dtype).requires_grad_() for t in inputs]
        out, r = function(x, weight, EPS, *change)
        loss = (out * upstream[0].to(out)).sum()
        loss = loss + later * (r * upstream[1].to(r)).sum()
        return [out, r, *torch.autograd.grad(loss, [x, weight, *change])]

    results = run(add_norm_triton, None)
    assert all(map(torch.equal, results, run(add_norm_triton, None)))  # the same bits each time
    for ours, exact in zip(results, run(norm, torch.float64)):
        # A gradient may cancel to 0, its terms do not.
        scale = max(1.0, *exact.detach().abs().flatten().tolist(), 0.0)
        torch.testing.assert_close(ours.double(), exact, atol=tolerance * scale, rtol=0)


@settings(max_examples=8)
@given(
    rows=st.integers(0, 5),
    width=st.sampled_from([1, 7, 16, 33]),
    added=st.booleans(),
    later=st.booleans(),
    seed=seeds,
)
def test_equals_the_plain_form(rows, width, added, later, seed):
    """Any number of rows and columns, with and without an addition, and with and without a gradient to the stream."""
    # float32 sums over up to 33 numbers.
    compare(rows, width, added, later, torch.float32, seed, 1e-5)


def test_bfloat16_is_rounded_where_the_plain_form_rounds():
    """The stream is rounded once, after the addition, and the norm once before the weight; so does the plain form."""
    # Two roundings of the output, half a unit of 2^-8 each.
    compare(3, 48, True, True, torch.bfloat16, 0, 2**-7)


def test_more_rows_than_programs(monkeypatch):
    """Programs of the backward pass walk over several rows each, and their parts of dweight add up."""
    monkeypatch.setattr(triton_kernel, "PROGRAMS", 3)
    monkeypatch.setattr(triton_kernel, "PARTS", 2)
    compare(5, 19, True, True, torch.float32, 1, 1e-5)


def test_only_the_stream_is_used():
    """A gradient that reaches the residual stream alone passes through unchanged."""
    x, change = (normal(s, 2, 8).to(DEVICE).requires_grad_() for s in (0, 1))
    _, r = add_norm_triton(x, torch.ones(8, device=DEVICE), EPS, change)
    assert all(
        torch.equal(g, torch.ones_like(g)) for g in torch.autograd.grad(r.sum(), [x, change])
    )


@pytest.mark.ci
def test_rows_beyond_32_bits():
    """At 450,000 tokens of GLM-4.5's width the last row lies past 2^31 elements, and is still the one normed."""
    program = (
        "import torch; from minglm.kernels.norm.triton_kernel import add_norm_triton\n"
        "x, tile = last_tile(450_000, 5120, tile=(1, 5120)); pin_program_id(449_999)\n"
        "out, _ = add_norm_triton(x, torch.ones(5120), 1e-5)\n"
        "expected = torch.nn.functional.rms_norm(tile.float(), (5120,), eps=1e-5).bfloat16()\n"
        "assert torch.equal(out[-1:], expected), (out[-1:] - expected).abs().max()"
    )
    done = in_new_process(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_shapes(dtype):
    """GLM-4.5's width, more rows than programs."""
    compare(1000, 5120, True, True, dtype, 0, 1e-5 if dtype == torch.float32 else 2**-7)
