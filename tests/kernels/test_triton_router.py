"""The router's choice and the sort by expert in Triton against their plain forms, and the router's contract (2.1)."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minglm.kernels.router.eager import group_by_expert, route
from minglm.kernels.toolchain.interpreter import in_new_process, switch_on
from minglm.testing.model import normal
from minglm.testing.strategies import numbers, seeds

DEVICE = switch_on()
from minglm.kernels.router import triton_kernel as kernel
from minglm.kernels.router.triton_kernel import group_by_expert_triton, route_triton

pytestmark = pytest.mark.usefixtures("poisoned")


def compare(T, E, K, normalize, coarse, seed):
    """Check choice, weights, scores and the gradient of the logits against those of the plain form in float64."""
    logits = normal(seed, T, E)
    bias = normal(seed + 1, E, scale=0.2)
    if coarse:  # many equal scores, also after the bias; some experts are out of the question
        logits = logits.round()
        bias = torch.where(bias > 0, float("-inf"), 0.0)
    upstream = normal(seed + 2, T, K), normal(seed + 3, T, E)

    def run(function, kind):
        x = logits.to(DEVICE, kind).requires_grad_()
        experts, weights, scores = function(x, bias.to(DEVICE), K, normalize, 2.5)
        loss = (weights * upstream[0].to(weights)).sum()
        loss = loss + (scores * upstream[1].to(weights)).sum()
        return experts, weights, scores, torch.autograd.grad(loss, x)[0]

    chosen, *ours = run(route_triton, torch.float32)
    # The same bits each time.
    assert all(map(torch.equal, (chosen, *ours), run(route_triton, torch.float32)))
    assert torch.equal(chosen, route(logits.to(DEVICE), bias.to(DEVICE), K, normalize, 2.5)[0])
    for found, exact in zip(ours, run(route, torch.float64)[1:]):
        # float32 sums of up to K terms.
        torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)


@settings(max_examples=10)
@given(
    T=st.integers(0, 6),
    E=st.sampled_from([1, 5, 16]),
    K=st.integers(1, 5),
    normalize=st.booleans(),
    coarse=st.booleans(),
    seed=seeds,
)
# All experts, those of bias minus infinity too.
@example(T=3, E=5, K=5, normalize=True, coarse=True, seed=0)
def test_choice_and_gradients_equal_the_plain_form(T, E, K, normalize, coarse, seed):
    """Any shape; equal scores go to the lower expert, and an expert of bias minus infinity is taken last and once."""
    compare(T, E, min(K, E), normalize, coarse, seed)


def test_nan_gives_experts():
    """Logits that are not numbers still give different experts that exist: no kernel after it reads elsewhere."""
    experts, *_ = route_triton(
        torch.full((2, 5), float("nan"), device=DEVICE), torch.zeros(5, device=DEVICE), 3
    )
    assert all(
        sorted(set(row)) == sorted(row) and set(row) <= set(range(5)) for row in experts.tolist()
    )


def compare_sort(T, K, E, skew, seed):
    """Check order, its inverse and each expert's end; with a skew most pairs go to the first expert."""
    experts_TK = (torch.rand(T, K, generator=numbers(seed)) ** skew * E).long().to(DEVICE)
    for found, exact in zip(group_by_expert_triton(experts_TK, E), group_by_expert(experts_TK, E)):
        assert found.dtype == exact.dtype and torch.equal(found, exact)


@settings(max_examples=8)
@given(
    T=st.integers(0, 80),
    K=st.integers(1, 4),
    E=st.sampled_from([1, 3, 8]),
    skew=st.sampled_from([1, 8]),
    seed=seeds,
)
def test_sort_in_one_launch(T, K, E, skew, seed):
    """A few pairs are sorted by one launch, whose programs compare each pair with every other."""
    compare_sort(T, K, E, skew, seed)


@pytest.mark.parametrize(("T", "E", "skew"), [(100, 8, 1), (129, 3, 8), (1, 1, 1)])
def test_sort_in_blocks(monkeypatch, T, E, skew):
    """More pairs are sorted by their counts in blocks: here up to three blocks, some counts more than a step each."""
    for name, value in {"MAX_RANKED": 0, "BLOCK": 256, "LOWER": 4, "OWN": 2}.items():
        monkeypatch.setattr(kernel, name, value)
    compare_sort(T, 5, E, skew, 0)


@pytest.mark.ci
def test_scores_beyond_32_bits():
    """With 14 million tokens the last token's 160 scores lie past 2^31; it is still the one that is routed."""
    program = (
        "import torch; from minglm.kernels.router.triton_kernel import TOKENS, _choose, _choice_constants\n"
        "x, tile = last_tile(14_000_000, 160, tile=(1, 160), dtype=torch.float32); pin_program_id(len(x) // TOKENS - 1)\n"
        "experts, weights = torch.empty(len(x), 8, dtype=torch.int64), torch.empty(len(x), 8)\n"
        "_choose[(1,)](x, torch.zeros(160), experts, weights, torch.empty_like(x), len(x), 160, 1.0, NORMALIZE=True,\n"
        "              **_choice_constants(160, 8))\n"
        "assert torch.equal(experts[-1], tile[0].topk(8).indices), experts[-1]"
    )
    done = in_new_process(program)
    assert done.returncode == 0, done.stderr


def test_other_dtypes_are_refused():
    """The router is float32, whatever the model computes in."""
    with pytest.raises(ValueError, match="float32"):
        route_triton(torch.zeros(1, 4, dtype=torch.bfloat16), torch.zeros(4), 2)


@pytest.mark.gpu
def test_real_shapes():
    """GLM-4.5's 160 experts, eight of them a token."""
    compare(4099, 160, 8, True, False, 0)
    for T in (4099, 64):
        compare_sort(T, 8, 160, 1, 0)
