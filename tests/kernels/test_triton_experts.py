"""The expert layer's Triton kernels against one token and one expert at a time in float64 (paper 2.1)."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minglm.kernels import dispatch
from minglm.kernels.experts import grouped_experts
from minglm.kernels.router.eager import group_by_expert
from minglm.kernels.toolchain.interpreter import in_new_process, switch_on, watched
from minglm.testing.model import normal
from minglm.testing.strategies import numbers, seeds

DEVICE = switch_on()
from minglm.kernels.experts import triton_layer as layer
from minglm.kernels.toolchain.tiles import Tiles

pytestmark = pytest.mark.usefixtures("poisoned")

NAMES = ("output", "gradient of x", "of the weights", "of gate", "of up", "of down")


def drawn(seed, T, E, K, D, F, crowd, dtype=torch.float32):
    """Draw choices and inputs; a crowd sends every token to the first K experts, so that the others have no rows."""
    scores_TE = torch.rand(T, E, generator=numbers(seed))
    if crowd:
        scores_TE = scores_TE - 2.0 * torch.arange(E)
    experts_TK = scores_TE.topk(K).indices
    inputs = [normal(seed + 1, T, D).to(dtype), torch.rand(T, K, generator=numbers(seed + 2))]
    for i, (rows, columns) in enumerate([(F, D), (F, D), (D, F)]):
        inputs.append(normal(seed + 3 + i, E, rows, columns, scale=columns**-0.5).to(dtype))
    return (
        experts_TK.to(DEVICE),
        [v.to(DEVICE) for v in inputs],
        normal(seed + 6, T, D).to(DEVICE, dtype),
    )


def results(function, experts_TK, inputs, gradient_TD):
    """Return output and gradients."""
    x, weights, *matrices = (v.detach().clone().requires_grad_() for v in inputs)
    y_TD = function(x, experts_TK, weights, *matrices)
    return [y_TD, *torch.autograd.grad(y_TD, [x, weights, *matrices], gradient_TD.to(y_TD.dtype))]


def exact(x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF):
    """Compute the loop over experts, as `experts_loop`, but in float64 to the end."""
    y_TD = torch.zeros_like(x_TD)
    for e in range(len(gate_EFD)):
        token, slot = (experts_TK == e).nonzero(as_tuple=True)
        gate = torch.nn.functional.silu(x_TD[token] @ gate_EFD[e].T)
        up = x_TD[token] @ up_EFD[e].T
        rows = (gate * up) @ down_EDF[e].T
        y_TD = y_TD.index_add(0, token, rows * weights_TK[token, slot, None])
    return y_TD


def compare(function, experts_TK, inputs, gradient_TD, tolerance):
    """Check every result to a tolerance of the largest number of the exact one; NaN, where a kernel left a hole, fails."""
    ours = results(function, experts_TK, inputs, gradient_TD)
    theirs = results(exact, experts_TK, [v.double() for v in inputs], gradient_TD)
    for name, a, b in zip(NAMES, ours, theirs):
        away = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3)
        assert away <= tolerance, f"{name}: off by {away:.1e} of the largest"


@settings(max_examples=6)
@given(
    seed=seeds,
    T=st.integers(1, 50),
    E=st.integers(1, 5),
    K=st.integers(1, 3),
    crowd=st.booleans(),
    widths=st.tuples(st.sampled_from([4, 13, 36]), st.sampled_from([1, 8, 40])),
)
@example(seed=0, T=3, E=5, K=1, crowd=True, widths=(36, 40))  # one expert has all the rows
# More row tiles than one, nothing aligned.
@example(seed=0, T=40, E=2, K=2, crowd=False, widths=(13, 1))
def test_equals_one_expert_at_a_time(seed, T, E, K, crowd, widths):
    """Output and all five gradients, for uneven loads, experts with no row or one, and widths that fit no tile."""
    experts_TK, inputs, gradient_TD = drawn(seed, T, E, min(K, E), *widths, crowd)
    # float32 sums of up to 100 products.
    compare(layer.experts_triton, experts_TK, inputs, gradient_TD, 1e-5)


@pytest.mark.parametrize(
    "tile, rows, D, F",
    [
        (Tiles(16, 64, 64, 4, 4, True), 40, 72, 136),
        (Tiles(16, 64, 64, 4, 4, True), 9, 71, 135),
        (Tiles(64, 128, 64, 4, 3), 150, 264, 72),
        (Tiles(64, 128, 64, 4, 3), 9, 71, 135),
        (Tiles(128, 128, 64, 8, 3), 150, 264, 72),
        (Tiles(128, 128, 64, 8, 3), 150, 71, 135),
    ],
)
def test_bfloat16_tiles(monkeypatch, tile, rows, D, F):
    """The tiles a GPU would take, both ways round, for widths that the copy engine can read and widths it cannot."""
    for table in ("UP", "DOWN") if tile.swap else ("UP", "DOWN", "PRODUCT"):
        monkeypatch.setattr(layer, table, {2**31: tile})
    experts_TK, inputs, gradient_TD = drawn(1, rows, 3, 2, D, F, False, torch.bfloat16)
    # five roundings of 2^-9 in a row, of which some meet numbers near the largest
    compare(layer.experts_triton, experts_TK, inputs, gradient_TD, 0.02)


def test_repeats_to_the_bit_whatever_the_number_of_programs(monkeypatch):
    """The same input gives the same bits, gradients included, and does not care who computed which tile."""
    case = drawn(3, 40, 4, 2, 36, 40, False)
    first = results(layer.experts_triton, *case)
    monkeypatch.setattr(layer, "programs", lambda x, each=1: 5)
    assert all(torch.equal(a, b) for a, b in zip(first, results(layer.experts_triton, *case)))


@pytest.mark.skipif(DEVICE == "cuda", reason="watches the interpreter")
def test_every_element_is_stored_once(monkeypatch):
    """No two programs of a launch share an element, which would be a race, and none is left out; uneven loads."""
    monkeypatch.setattr(layer, "programs", lambda x, each=1: 5)
    experts_TK, (x_TD, weights_TK, gate, up, down), _ = drawn(4, 40, 4, 2, 36, 70, False)
    order, _, ends_E = group_by_expert(experts_TK, 4)
    launches = (
        lambda: layer.up(x_TD, order, weights_TK, ends_E, gate, up, save=True),
        lambda: [layer.product([(x_TD, down)], order, ends_E, 2, pick=True, transposed=False)],
        lambda: [layer.outer(x_TD, x_TD.repeat(2, 1), order, ends_E, 2)],
        lambda: [layer.outer(x_TD, x_TD.repeat(2, 1), order, ends_E, 2, swap=True)],
        lambda: [layer.sum_choices(torch.ones(80, 36), 2)],
    )
    for launch in launches:
        with watched() as stores:
            results = launch()
        elements = torch.cat([torch.from_numpy(at[mask].astype("int64")) for _, at, mask in stores])
        assert len(elements) == len(elements.unique()) == sum(r.numel() for r in results)


def test_the_switch_chooses_these_kernels(monkeypatch):
    """`grouped_experts` runs them when asked, saving no row of x, and needs no kernel for no tokens."""
    experts_TK, inputs, gradient_TD = drawn(5, 6, 3, 2, 12, 8, False)
    monkeypatch.setattr(dispatch, "_chosen", "triton")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compare(grouped_experts, experts_TK, inputs, gradient_TD, 1e-5)
    x, weights, *matrices = inputs
    # x in the order of the experts would be this large.
    pairs = [t for t in saved[:9] if t.numel() == 12 * 12]
    assert not pairs and len(saved) >= 9
    empty = grouped_experts(x[:0], experts_TK[:0], weights[:0], *matrices)
    assert empty.shape == (0, 12)


def test_a_hole_in_the_gradients_is_found(monkeypatch):
    """The comparison fails for weight gradients that are not written for experts without rows."""
    case = drawn(0, 4, 5, 1, 12, 8, True)
    compare(layer.experts_triton, *case, 1e-5)
    whole = layer.outer

    def holed(a, b, order, ends_E, choices, **picks):
        out = whole(a, b, order, ends_E, choices, **picks)
        out[torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0] = torch.nan
        return out

    monkeypatch.setattr(layer, "outer", holed)
    with pytest.raises(AssertionError, match="of gate"):
        compare(layer.experts_triton, *case, 1e-5)


SETUP = """
import torch
from minglm.kernels.experts import triton_layer as layer
from minglm.kernels.toolchain.tiles import Tiles
layer.UP = layer.DOWN = layer.PRODUCT = {2**31: Tiles(16, 512, 512, 4, 1)}
layer.OUTER = {2**31: Tiles(512, 512, 16, 4, 1)}
E, D, F = 280, 5120, 1536
order, weights, ends = torch.zeros(1, dtype=torch.int64), torch.ones(1, 1), torch.zeros(E, dtype=torch.int32)
ends[-1] = 1
def check(found, expected):
    away = float((found.double() - expected).abs().max() / expected.abs().max())
    assert away < 0.01, away
"""
READ = """
w, tile = last_tile(E, F, D, tile=(F, D))
x = torch.randn(1, D).bfloat16()
for layer.bulk_readable in (lambda *t: True), (lambda *t: False):
    h, g, u = layer.up(x, order, weights, ends, w, w, save=True)
    check(g, x.double() @ tile.double().T)
    y = layer.product([(g, w)], order, ends, 1, pick=False, transposed=False)
    check(y, g.double() @ tile.double())
"""
WRITE = """
a, b = torch.randn(1, F).bfloat16(), torch.randn(1, D).bfloat16()
pin_program_id(E * (F // 512) * (D // 512) - 1)
check(layer.outer(a, b, order, ends, 1)[-1, -512:, -512:], (a.double().T @ b.double())[-512:, -512:])
"""
ROWS = """
T = 450_000
x, row = last_tile(T, D, tile=(1, D))
w, v = torch.randn(1, 512, D).bfloat16(), torch.randn(1, D, 512).bfloat16()
order, ends = torch.arange(T), torch.tensor([T], dtype=torch.int32)
pin_program_id(T // 16 - 1)
y = layer.product([(x, w)], order, ends, 1, pick=True, transposed=True)
check(y[-1:], row.double() @ w[0].double().T)
pin_program_id(T // 16 * (D // 512) - 1)
z = layer.product([(y, v)], order, ends, 1, pick=False, transposed=True)
check(z[-1:, -512:], y[-1:].double() @ v[0, -512:].double().T)
"""


@pytest.mark.ci
@pytest.mark.parametrize("program", [READ, WRITE, ROWS], ids=["read", "write", "rows"])
def test_offsets_beyond_32_bits(program):
    """The last of 280 of GLM-4.5's experts, and the last of 450,000 rows, lie past 2^31 elements; they are found."""
    done = in_new_process(SETUP + program)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 8, 100, 1000, 4096])
@pytest.mark.parametrize("crowd", [False, True], ids=["even", "crowd"])
def test_real_shapes(T, crowd):
    """GLM-4.5's widths, an eighth of its experts: every table entry, and 12 experts without a row in a crowd."""
    case = drawn(T, T, 20, 8, 5120, 1536, crowd, torch.bfloat16)
    compare(layer.experts_triton, *case, 0.02)  # as above; longer sums are in float32
    first = results(layer.experts_triton, *case)
    assert all(torch.equal(a, b) for a, b in zip(first, results(layer.experts_triton, *case)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_compiled(dtype):
    """float32 is exact, not rounded to TF32, and float16 as near as its 11 bits; widths that fit no tile."""
    compare(
        layer.experts_triton,
        *drawn(0, 70, 5, 2, 71, 135, False, dtype),
        1e-5 if dtype == torch.float32 else 4e-3,
    )


@pytest.mark.gpu
def test_the_host_never_waits():
    """Forward and backward pass without a synchronisation: PyTorch raises at one."""
    experts_TK, inputs, gradient_TD = drawn(0, 64, 20, 8, 512, 256, False, torch.bfloat16)
    results(layer.experts_triton, experts_TK, inputs, gradient_TD)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(layer.experts_triton, experts_TK, inputs, gradient_TD)
    finally:
        torch.cuda.set_sync_debug_mode("default")
