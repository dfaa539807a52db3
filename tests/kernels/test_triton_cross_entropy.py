"""The output head with its softmax in Triton: against float64, against its own memory, beyond 32-bit offsets."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minglm.kernels import dispatch
from minglm.kernels.cross_entropy import (
    chunked,
    linear_cross_entropy,
    token_log_probabilities,
)
from minglm.kernels.cross_entropy.eager import cross_entropy
from minglm.kernels.toolchain.interpreter import in_new_process, switch_on
from minglm.lesson import peak_bytes
from minglm.testing.strategies import numbers, seeds

DEVICE = switch_on()
from minglm.kernels.cross_entropy import triton_kernel as kernel
from minglm.kernels.toolchain.tiles import Tiles

pytestmark = pytest.mark.usefixtures("poisoned")

NAMES = ("log-probabilities", "entropies", "gradient of the states", "gradient of the head")


def problem(seed, T, D, V, dtype=torch.float32, scale=1.0):
    """Draw hidden states, head, targets, and the gradients that reach the log-probabilities, some of them equal."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    hidden_TD, head_VD, upstream_T = (
        torch.randn(*shape, generator=generator, device=DEVICE) for shape in ((T, D), (V, D), (T,))
    )
    targets_T = torch.randint(V, (T,), generator=generator, device=DEVICE)
    return [(scale * hidden_TD).to(dtype), head_VD.to(dtype), targets_T, upstream_T.clamp(min=-0.5)]


def results(function, hidden_TD, head_VD, targets_T, upstream_T, temperature):
    """Return both outputs and both gradients."""
    inputs = [x.detach().clone().requires_grad_() for x in (hidden_TD, head_VD)]
    logp_T, entropy_T = function(*inputs, targets_T, temperature)
    assert not entropy_T.requires_grad
    gradients = torch.autograd.grad(logp_T, inputs, upstream_T.to(logp_T.dtype))
    return (logp_T.detach(), entropy_T, *gradients)


def plain(hidden_TD, head_VD, targets_T, temperature):
    """Compute the equations in the dtype of the inputs."""
    logp_TV = (hidden_TD @ head_VD.T / temperature).log_softmax(1)
    logp_T = logp_TV.gather(1, targets_T[:, None])[:, 0]
    entropy_T = -(logp_TV.exp() * logp_TV).sum(1)
    return logp_T, entropy_T.detach()


def compare(values, temperature, tolerance):
    """Check every result to a tolerance of the largest number of the exact one, and of one."""
    ours = results(kernel.log_probabilities_triton, *values, temperature)
    exact = results(
        plain, *(v.double() if v.is_floating_point() else v for v in values), temperature
    )
    for name, a, b in zip(NAMES, ours, exact):
        away = float((a.double() - b).abs().max() / b.abs().max().clamp(min=1))
        assert away <= tolerance, f"{name}: off by {away:.1e}"
    return ours


@settings(max_examples=10)
@given(
    seed=seeds,
    T=st.integers(1, 40),
    D=st.sampled_from([1, 8, 45]),
    V=st.sampled_from([1, 16, 77, 300]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
)
# Two row tiles, splits with two tiles, one and none.
@example(seed=0, T=33, D=8, V=300, temperature=1.0)
def test_equals_float64(seed, T, D, V, temperature):
    """Log-probabilities, entropies and gradients, for sizes that fit no tile, one word, any temperature."""
    compare(problem(seed, T, D, V), temperature, 1e-5)  # float32, sums of up to 300 numbers


def test_every_chunk_of_the_vocabulary(monkeypatch):
    """A head that is worked on in three chunks gives the same gradients, and the same bits each time."""
    values = problem(1, 20, 16, 600)
    whole = compare(values, 1.0, 1e-5)
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 20 * 4 * 256)
    parts = compare(values, 1.0, 1e-5)
    assert torch.equal(whole[0], parts[0])
    again = results(kernel.log_probabilities_triton, *values, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(parts, again))


@pytest.mark.parametrize("D, V", [(72, 640), (71, 300)])
def test_bfloat16_tiles(monkeypatch, D, V):
    """A GPU's tiles, for widths that the copy engine can read and widths that it cannot."""
    monkeypatch.setattr(kernel, "PRODUCT", {2**31: Tiles(64, 128, 64, 4, 3)})
    values = problem(2, 70, D, V, torch.bfloat16, D**-0.5)
    ours = compare(values, 1.0, 2**-7)  # gradients are rounded to 8 bits, twice
    assert ours[0].dtype == ours[1].dtype == torch.float32
    exact = results(plain, *(v.double() if v.is_floating_point() else v for v in values), 1.0)
    # The logits themselves are never rounded to bfloat16.
    assert (ours[0] - exact[0]).abs().max() < 1e-5


@pytest.mark.parametrize("size", [100.0, 1e4])
def test_extreme_logits(size):
    """Logits far beyond what exp can hold: finite, and those of float64."""
    values = problem(3, 12, 4, 50, scale=size)
    compare(values, 1.0, 1e-5)


def test_gradient_is_that_of_finite_differences():
    """What autograd gets is the slope of what the forward pass computes."""
    hidden_TD, head_VD, targets_T, upstream_T = problem(4, 3, 5, 7)
    function = kernel.log_probabilities_triton
    _, _, dhidden_TD, dhead_VD = results(function, hidden_TD, head_VD, targets_T, upstream_T, 0.8)
    for x, gradient in ((hidden_TD, dhidden_TD), (head_VD, dhead_VD)):
        for at in ((0, 0), (2, 3)):
            ends = []
            for step in (1e-2, -1e-2):
                x[at] += step
                logp_T, _ = function(hidden_TD, head_VD, targets_T, 0.8)
                ends.append(float((logp_T * upstream_T).sum()))
                x[at] -= step
            # Step squared, float32.
            assert float(gradient[at]) == pytest.approx((ends[0] - ends[1]) / 2e-2, abs=2e-3)


def test_the_switch_and_the_mask(monkeypatch):
    """The loss is that of the plain form, without a look at tokens of weight zero; without any token it is zero."""
    monkeypatch.setattr(dispatch, "_chosen", "triton")
    hidden_TD, head_VD, targets_T, _ = problem(5, 9, 6, 20)
    weights_T = torch.tensor([0.5, 0, 1, 2, 0, 0, 1, 0.1, 1], device=DEVICE)
    exact = cross_entropy(hidden_TD.double(), head_VD.double(), targets_T, weights_T.double())
    hidden_TD[weights_T == 0] = torch.nan
    targets_T[weights_T == 0] = -100
    hidden_TD.requires_grad_()
    loss = linear_cross_entropy(hidden_TD, head_VD, targets_T, weights_T)
    assert loss.item() == pytest.approx(float(exact), rel=1e-5)
    loss.backward()
    assert hidden_TD.grad.isfinite().all()
    assert not hidden_TD.grad[weights_T == 0].any()
    assert float(linear_cross_entropy(hidden_TD, head_VD, targets_T, 0 * weights_T)) == 0
    logp_T, _ = token_log_probabilities(hidden_TD[:0], head_VD, targets_T[:0])
    assert logp_T.shape == (0,)


def check_loss(seed, T, D, V, most, dtype, factor=1.0, tolerance=1e-5):
    """Check that loss and gradients, by chunks of at most `most` tokens, are float64's; twice the same bits.

    tolerance: of the largest number, in float32. In bfloat16 a logit of up to 4 is rounded by 2^-7, and its gradient
    with it; the head's is also rounded after every chunk.
    """
    hidden_TD, head_VD, targets_T, _ = problem(seed, T, D, V, dtype, D**-0.5)
    weights_T = torch.rand(T, generator=numbers(seed)).to(DEVICE) + 0.1
    values = [x.requires_grad_() for x in (hidden_TD, head_VD)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_chosen", "triton")
        patch.setattr(chunked, "GPU_CHUNK_BYTES", most * V * dtype.itemsize)
        loss, again = (linear_cross_entropy(*values, targets_T, weights_T) for _ in range(2))
        alone = linear_cross_entropy(*(x.detach() for x in values), targets_T, weights_T)
    ours = [loss, *torch.autograd.grad(factor * loss, values)]
    twice = [again, *torch.autograd.grad(factor * again, values, retain_graph=True)]
    assert all(map(torch.equal, ours, twice))
    inputs = [x.detach().double().requires_grad_() for x in values]
    loss = cross_entropy(*inputs, targets_T, weights_T.double())
    exact = [loss, *torch.autograd.grad(factor * loss, inputs)]
    tolerance = tolerance if dtype == torch.float32 else 2**-6
    for name, a, b in zip(("loss", *NAMES[2:]), ours, exact):
        error = (a.detach().double() - b.detach()).abs().max()
        away = float(error / b.detach().abs().max())
        assert away <= tolerance, f"{name}: off by {away:.1e}"
    assert alone.item() == pytest.approx(loss.item(), rel=tolerance)
    return again, values


@settings(max_examples=10)
@given(
    seed=seeds,
    T=st.integers(1, 20),
    D=st.sampled_from([1, 8, 45]),
    V=st.sampled_from([2, 16, 77, 300]),
    most=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    factor=st.sampled_from([1, -0.3]),
)
# Three chunks, three pieces of each row.
@example(seed=0, T=20, D=8, V=300, most=7, dtype=torch.float32, factor=1)
def test_loss_and_its_gradients(seed, T, D, V, most, dtype, factor):
    """The loss whose logits are in memory a chunk of tokens at a time, for sizes that fit no chunk and no piece."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "WIDTH", 128)
        check_loss(seed, T, D, V, most, dtype, factor)


def test_a_second_backward_pass_is_refused():
    """Gradients that were scaled in place are not handed out again."""
    loss, values = check_loss(0, 5, 8, 16, 7, torch.float32, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(0.5 * loss, values)


def test_a_target_that_is_off_is_found(monkeypatch):
    """The comparison fails where the kernel takes the target's neighbour."""
    right = kernel.softmax_gradient_triton
    monkeypatch.setattr(
        kernel, "softmax_gradient_triton", lambda logits, targets, w: right(logits, targets ^ 1, w)
    )
    with pytest.raises(AssertionError, match="off by"):
        check_loss(0, 5, 8, 16, 7, torch.float32)


def test_memory_is_that_of_a_chunk(monkeypatch):
    """Beyond its results a call holds twice CHUNK_BYTES, 4 T D, and a few numbers a token; the plain form, T V."""
    monkeypatch.setattr(dispatch, "_chosen", "triton")
    torch.use_deterministic_algorithms(False)
    T, D, V = 64, 16, 8192
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 4 * T * 512)
    monkeypatch.setattr(kernel, "PRODUCT", {2**31: Tiles(64, 512, 16, 4, 3)})
    monkeypatch.setattr(kernel, "tiles_for", lambda table, x, rows: table[2**31])
    hidden_TD, head_VD, targets_T, upstream_T = problem(6, T, D, V)

    def ours():
        results(kernel.log_probabilities_triton, hidden_TD, head_VD, targets_T, upstream_T, 1.0)

    def theirs():
        results(plain, hidden_TD, head_VD, targets_T, upstream_T, 1.0)

    inputs = 2 * 4 * (T * D + V * D)  # `results` copies them; the gradients are as large
    allowed = inputs + 2 * kernel.CHUNK_BYTES + 2 * 4 * T * D + 100 * T * kernel.SPLITS
    assert peak_bytes(ours) < allowed < 4 * T * V + inputs < peak_bytes(theirs)


SETUP = """
import torch; from minglm.kernels.cross_entropy import triton_kernel as kernel
from minglm.kernels.toolchain.tiles import Tiles
tile = Tiles(16, 256, 1024, 4, 1); kernel.PRODUCT = {2**31: tile}
"""
HEAD = """
V, D = 450_000, 5120
w, words = last_tile(V, D, tile=(208, D))
x = torch.randn(1, D).bfloat16()
for kernel.bulk_readable in (lambda *t: True), (lambda *t: False):
    pin_program_id(V // 256)
    _, x_, w_, common = kernel._launch(x, w)
    outputs = torch.zeros(4, V // 256 + 1, 1)
    kernel.statistics_kernel[(1,)](x_, w_, torch.tensor([V - 1]), *outputs, 1, V, D, 1.0, V // 256 + 1, **common)
    exact = (x.double() @ words.double().T)[0]
    assert abs(outputs[0, -1, 0] - exact.max()) < 1e-2 and abs(outputs[3, -1, 0] - exact[-1]) < 1e-2, outputs[:, -1]
"""
GRADIENT = """
T, V, D = 20_000, 151_552, 16
x, w, out = torch.randn(T, D).bfloat16(), torch.randn(V, D).bfloat16(), torch.empty(T, V, dtype=torch.bfloat16)
kernel.PRODUCT = {2**31: Tiles(16, 256, 16, 4, 1, band=1)}
_, x_, w_, common = kernel._launch(x, w)
pin_program_id(T // 16 * (V // 256) - 1)
zeros = torch.zeros(T)
kernel.gradient_kernel[(1,)](x_, w_, zeros.long(), zeros + 5, zeros + 1, out, T, V, D, 1.0, **common)
exact = -(x[-16:].double() @ w[-256:].double().T - 5).exp()
assert (out[-16:, -256:] - exact).abs().max() < 0.01 * exact.abs().max()
"""


@pytest.mark.ci
@pytest.mark.parametrize("program", [HEAD, GRADIENT], ids=["head", "gradient"])
def test_offsets_beyond_32_bits(program):
    """A head of 450,000 words of 5,120, and the gradient of 20,000 tokens by GLM-4.5's 151,552 words, pass 2^31."""
    done = in_new_process(SETUP + program)
    assert done.returncode == 0, done.stderr


def test_a_sum_that_is_off_is_found(monkeypatch):
    """The comparison fails where the parts of the splits are joined one part in a hundred off."""
    monkeypatch.setattr(torch.Tensor, "log", lambda x, log=torch.Tensor.log: log(1.01 * x))
    with pytest.raises(AssertionError, match="log-probabilities"):
        compare(problem(0, 3, 4, 40), 1.0, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 700])
def test_real_shapes(dtype, T):
    """GLM-4.5's head, in one chunk of the vocabulary and in several; twice the same bits."""
    values = problem(0, T, 5120, 151_552, dtype, 5120**-0.5)
    kept = kernel.CHUNK_BYTES
    kernel.CHUNK_BYTES = 2**26
    try:
        ours = compare(values, 1.0, 1e-4 if dtype == torch.float32 else 2**-7)
        assert all(
            torch.equal(a, b)
            for a, b in zip(ours, results(kernel.log_probabilities_triton, *values, 1.0))
        )
    finally:
        kernel.CHUNK_BYTES = kept


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_at_real_shapes(dtype):
    """GLM-4.5's head under the loss, in three chunks of tokens."""
    check_loss(0, 700, 5120, 151_552, 300, dtype, 0.5, 1e-4)  # sums of 151,552 numbers


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["loss", "log-probabilities"])
def test_memory_at_real_size(name):
    """At 16,384 tokens forward and backward need less than 0.7 GB beyond the head's and the states' gradients."""
    values = problem(0, 16_384, 5120, 151_552, torch.bfloat16, 5120**-0.5)
    inputs, targets_T, upstream_T = [x.requires_grad_() for x in values[:2]], *values[2:]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    if name == "loss":
        gradients = torch.autograd.grad(
            linear_cross_entropy(*inputs, targets_T, upstream_T + 1), inputs
        )
    else:
        logp_T, _ = kernel.log_probabilities_triton(*inputs, targets_T, 1.0)
        gradients = torch.autograd.grad(logp_T, inputs, upstream_T)
    extra = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in gradients)
    assert extra < 0.7e9
