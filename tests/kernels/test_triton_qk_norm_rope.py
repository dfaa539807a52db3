"""QK-norm with rotary embedding in Triton against the plain form in float64, and that against the model's (2.1)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.kernels.qk_norm_rope.eager import qk_norm_rope
from minglm.kernels.toolchain.interpreter import in_new_process, switch_on
from minglm.model.layers import RMSNorm
from minglm.model.rope import angles, rotate
from minglm.testing.model import normal
from minglm.testing.strategies import numbers, seeds

DEVICE = switch_on()
from minglm.kernels.qk_norm_rope import triton_kernel as kernel

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 1e-5


def problem(shape, R, shared, normed, seed):
    """Draw queries, keys, weights and angles; `shared` positions are the same in each row of the batch."""
    B, S, N, M, A = shape
    positions = torch.randint(0, 1000, (1 if shared else B, S), generator=numbers(seed))
    weights = [1 + normal(seed + i, A) for i in (1, 2)] if normed else [None, None]
    return (
        normal(seed + 3, B, S, N, A),
        normal(seed + 4, B, S, M, A),
        *weights,
        *angles(positions, R, 1e4),
    )


def run(function, inputs, upstream, kind):
    """Return results and the gradients of queries, keys and weights."""
    # Only the angles keep their dtype.
    values = [t if t is None else t.to(DEVICE, kind) for t in inputs[:4]]
    cos_and_sin = [t.to(DEVICE) for t in inputs[4:]]
    leaves = [t.requires_grad_() for t in values if t is not None]
    q, k = function(*values, *cos_and_sin, EPS)
    loss = sum((t * dt.to(t)).sum() for t, dt in zip((q, k), upstream))
    return q, k, *torch.autograd.grad(loss, leaves)


def compare(shape, R, shared, normed, kind, seed, tolerance):
    """Check the kernel against the plain form in float64, from the same rounded inputs and upstream gradients."""
    values = problem(shape, R, shared, normed, seed)
    inputs = [t if t is None else t.to(kind).float() for t in values[:4]]
    inputs += values[4:]
    upstream = [normal(seed + 5 + i, *t.shape).to(kind) for i, t in enumerate(values[:2])]
    results = run(kernel.qk_norm_rope_triton, inputs, upstream, kind)
    again = run(kernel.qk_norm_rope_triton, inputs, upstream, kind)
    assert all(map(torch.equal, results, again))  # the same bits each time
    for found, exact in zip(results, run(qk_norm_rope, inputs, upstream, torch.float64)):
        scale = max(1.0, *exact.detach().abs().flatten().tolist(), 0.0)
        torch.testing.assert_close(found.double(), exact, atol=tolerance * scale, rtol=0)


@settings(max_examples=8)
@given(
    B=st.integers(0, 2),
    S=st.integers(1, 4),
    heads=st.sampled_from([(4, 2), (3, 1), (1, 1)]),
    width=st.sampled_from([(8, 4), (12, 6), (6, 6), (16, 2), (7, 2)]),
    shared=st.booleans(),
    normed=st.booleans(),
    seed=seeds,
)
def test_equals_the_plain_form(B, S, heads, width, shared, normed, seed):
    """Any number of heads and of rotating dimensions, with and without the norm."""
    A, R = width
    # float32 sums over up to 16 numbers.
    compare((B, S, *heads, A), R, shared, normed, torch.float32, seed, 1e-5)


def test_bfloat16_is_rounded_once():
    """A result has one rounding: half a unit of its last place, and of a number from 2^e on that unit is 2^(e - 7)."""
    compare((1, 5, 4, 2, 16), 8, True, True, torch.bfloat16, 0, 2**-8)


def test_more_tiles_than_programs(monkeypatch):
    """Programs of the backward pass take several tiles each, and their parts of the weights' gradients add up."""
    monkeypatch.setattr(kernel, "PROGRAMS", 2)
    compare((2, 9, 4, 2, 8), 4, False, True, torch.float32, 1, 1e-5)


@given(seed=seeds, normed=st.booleans())
def test_plain_form_is_the_model(seed, normed):
    """The oracle above is the model's own RMSNorm and rotation, to the last bit."""
    q, k, q_weight, k_weight, cos, sin = problem((2, 3, 4, 2, 8), 4, False, normed, seed)
    found = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, EPS)
    for x, weight, ours in zip((q, k), (q_weight, k_weight), found):
        if normed:
            norm = RMSNorm(8, EPS)
            norm.weight.data = weight
            x = norm(x).detach()
        # Order of two products.
        torch.testing.assert_close(ours, rotate(x, cos, sin), atol=1e-6, rtol=1e-6)


@pytest.mark.ci
def test_rows_beyond_32_bits():
    """At 176,000 tokens of 96 heads the last head lies past 2^31 elements, and is still the one that is turned."""
    program = (
        "import torch; from minglm.kernels.qk_norm_rope.triton_kernel import _pair_block, _forward, ROWS\n"
        "T = 176_000; q, tile = last_tile(T * 96, 128, tile=(1, 128)); pin_program_id(T * 96 // ROWS - 1)\n"
        "cos, sin, out = torch.zeros(T, 32), torch.ones(T, 32), torch.empty_like(q)\n"
        "k = q[:1]; _forward[(1,)](q, k, None, None, cos, sin, out, k.clone(), T, 96, 8, T, 1e-5, NORM=False, A=128,\n"
        "                          HALF=32, BLOCK=_pair_block(128), ROWS=ROWS)\n"
        "expected = torch.cat([-tile[0, 32:64], tile[0, :32], tile[0, 64:]])\n"
        "assert torch.equal(out[-1], expected), out[-1]"
    )
    done = in_new_process(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_real_shapes(kind):
    """GLM-4.5's heads."""
    compare((2, 300, 96, 8, 128), 64, True, True, kind, 0, 1e-5 if kind == torch.float32 else 2**-8)
