"""The mixture-of-experts layer: the expert kernel, the shared expert, and what the layer reports of its routing."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import ModelConfig
from minglm.kernels.experts import grouped_experts
from minglm.kernels.experts.eager import experts_loop
from minglm.model.balance import sequence_loss, tokens_per_expert
from minglm.model.moe import LocalDispatcher, MoE
from minglm.testing.model import (
    check_dispatcher,
    check_experts,
    normal,
    plain_experts,
    sorted_dispatch,
)
from minglm.testing.strategies import numbers, seeds

SMALL = dataclasses.replace(
    ModelConfig(), hidden_size=6, moe_intermediate_size=5, n_routed_experts=4, num_experts_per_tok=2
)


@pytest.mark.parametrize("dispatch", [experts_loop, grouped_experts])
def test_experts_keep_the_contract(dispatch):
    """Both forms equal one token and one expert at a time, with every gradient, for any load."""
    check_experts(dispatch)


def drops_an_overflow(x_TD, experts_TK, weights_TK, *matrices):
    """Broken: give each expert room for its share of the tokens and drop what overflows, as in older systems."""
    kept_TK = torch.ones_like(weights_TK)
    for e in range(len(matrices[0])):
        token, slot = (experts_TK == e).nonzero(as_tuple=True)
        most = -(-len(x_TD) * experts_TK.shape[1] // len(matrices[0]))
        kept_TK[token[most:], slot[most:]] = 0
    return experts_loop(x_TD, experts_TK, weights_TK * kept_TK, *matrices)


def weight_before_the_nonlinearity(x_TD, experts_TK, weights_TK, *matrices):
    """Broken: scale the expert's input and not its output."""
    y_TD = torch.zeros_like(x_TD)
    for k in range(experts_TK.shape[1]):
        scaled_TD = x_TD * weights_TK[:, k, None]
        ones_T1 = torch.ones_like(weights_TK[:, :1])
        y_TD = y_TD + experts_loop(scaled_TD, experts_TK[:, k, None], ones_T1, *matrices)
    return y_TD


def forgets_the_router(x_TD, experts_TK, weights_TK, *matrices):
    """Broken: detach the weights, so that the router gets no gradient."""
    return experts_loop(x_TD, experts_TK, weights_TK.detach(), *matrices)


def returns_sorted_rows(x_TD, experts_TK, weights_TK, *matrices):
    """Broken: leave the rows in the order of the experts."""
    y_TD = experts_loop(x_TD, experts_TK, weights_TK, *matrices)
    return y_TD[experts_TK[:, 0].argsort(stable=True)]


@pytest.mark.parametrize(
    "broken",
    [drops_an_overflow, weight_before_the_nonlinearity, forgets_the_router, returns_sorted_rows],
)
def test_contract_finds_broken_experts(broken):
    """Each mistake others have made is found."""
    with pytest.raises(AssertionError):
        check_experts(broken)


@pytest.mark.parametrize("dispatcher", [LocalDispatcher(), sorted_dispatch])
def test_dispatchers_keep_the_contract(dispatcher):
    """The fused operation, and rows that are sorted first and computed by `Experts.forward`, are the same layer."""
    check_dispatcher(dispatcher)


def weights_stay_behind(x_TD, experts_TK, weights_TK, experts):
    """Broken: return the rows without the weights of their tokens."""
    return sorted_dispatch(x_TD, experts_TK, torch.ones_like(weights_TK), experts)


def expert_of_the_neighbour(x_TD, experts_TK, weights_TK, experts):
    """Broken: compute each row by the expert after its own."""

    def shifted(x_RD, expert_R):
        return experts(x_RD, (expert_R + 1) % len(experts.gate_EFD))

    return sorted_dispatch(x_TD, experts_TK, weights_TK, shifted)


def rows_in_the_order_of_arrival(x_TD, experts_TK, weights_TK, experts):
    """Broken: return the results to the tokens in the order of the experts."""
    y_TD = sorted_dispatch(x_TD, experts_TK, weights_TK, experts)
    return y_TD[experts_TK[:, 0].argsort(stable=True)]


@pytest.mark.parametrize(
    "broken", [weights_stay_behind, expert_of_the_neighbour, rows_in_the_order_of_arrival]
)
def test_contract_finds_broken_dispatcher(broken):
    """Each mistake of an exchange of tokens is found."""
    with pytest.raises(AssertionError):
        check_dispatcher(broken)


@given(seed=seeds, T=st.integers(1, 40))
def test_grouped_experts_are_repeatable(seed, T):
    """No atomic additions: the same input gives the same bits, gradients included."""
    x_TD = normal(seed, T, 6)
    experts_TK = torch.rand(T, 4, generator=numbers(seed + 1)).topk(2).indices
    matrices = [normal(seed + 3 + i, 4, *shape) for i, shape in enumerate([(5, 6), (5, 6), (6, 5)])]
    weights_TK = torch.rand(T, 2, generator=numbers(seed + 2))

    def run():
        inputs = [v.clone().requires_grad_() for v in (x_TD, weights_TK, *matrices)]
        y_TD = grouped_experts(inputs[0], experts_TK, *inputs[1:])
        return [y_TD, *torch.autograd.grad(y_TD.square().sum(), inputs)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


@given(seed=seeds, T=st.integers(1, 20))
def test_bfloat16_experts_are_close(seed, T):
    """Activations and matrices in bfloat16, weights in float32: as near to the exact sum as 8 bits allow."""
    x_TD = normal(seed, T, 6).bfloat16()
    experts_TK = torch.rand(T, 4, generator=numbers(seed + 1)).topk(2).indices
    weights_TK = torch.rand(T, 2, generator=numbers(seed + 2))
    matrices = [
        normal(seed + 3 + i, 4, *s, scale=0.4).bfloat16()
        for i, s in enumerate([(5, 6), (5, 6), (6, 5)])
    ]
    y_TD = grouped_experts(x_TD, experts_TK, weights_TK, *matrices)
    exact_TD = plain_experts(x_TD, experts_TK, weights_TK, *matrices)
    assert y_TD.dtype == torch.bfloat16
    # five roundings of 2^-9 in a row, on numbers of the size of the largest
    error = (y_TD.double() - exact_TD).abs().max()
    assert error < 0.04 * max(1.0, exact_TD.abs().max())


def layer(seed, config=SMALL):
    """Return a layer with drawn values and selection bias."""
    module = MoE(config)
    with torch.no_grad():
        for i, tensor in enumerate([*module.parameters(), *module.buffers()]):
            tensor.copy_(normal(seed + i, *tensor.shape, scale=0.5))
    return module


@given(
    seed=seeds,
    B=st.integers(1, 3),
    S=st.integers(1, 6),
    shared=st.integers(0, 2),
    factor=st.sampled_from([1.0, 2.5]),
)
def test_layer_is_routed_plus_shared(seed, B, S, shared, factor):
    """The routed sum carries the scaling factor; the shared expert is added as it is, ungated, or absent."""
    config = dataclasses.replace(SMALL, n_shared_experts=shared, routed_scaling_factor=factor)
    module = layer(seed, config)
    x_BSD = normal(seed + 20, B, S, 6)
    y_BSD, routing = module(x_BSD)
    x_TD = x_BSD.flatten(0, 1)
    e = module.experts
    experts_TK, weights_TK, scores_TE = module.gate(x_TD)
    torch.testing.assert_close(weights_TK.sum(1), torch.full((B * S,), factor))
    expected_TD = plain_experts(x_TD, experts_TK, weights_TK, e.gate_EFD, e.up_EFD, e.down_EDF)
    if shared:
        assert module.shared_experts.up_proj.weight.shape == (5 * shared, 6)
        expected_TD = expected_TD + module.shared_experts(x_TD)
    # float32.
    torch.testing.assert_close(y_BSD, expected_TD.view(B, S, 6).float(), atol=1e-4, rtol=1e-4)
    assert torch.equal(routing.tokens_per_expert_E, tokens_per_expert(experts_TK, 4))
    assert torch.equal(routing.balance_loss, sequence_loss(scores_TE, experts_TK, B))


@given(seed=seeds, B=st.integers(2, 4), S=st.integers(1, 5))
def test_order_of_sequences_does_not_matter(seed, B, S):
    """Sequences in another order: the same results in that order, the same load, the same loss."""
    module = layer(seed)
    x_BSD = normal(seed + 20, B, S, 6)
    order_B = torch.randperm(B, generator=numbers(seed + 30))
    y_BSD, routing = module(x_BSD)
    moved_BSD, same = module(x_BSD[order_B])
    # Other rows share each product.
    torch.testing.assert_close(moved_BSD, y_BSD[order_B], atol=1e-5, rtol=1e-5)
    assert torch.equal(routing.tokens_per_expert_E, same.tokens_per_expert_E)
    torch.testing.assert_close(routing.balance_loss, same.balance_loss)


@given(seed=seeds)
def test_renaming_the_experts_commutes(seed):
    """Experts, router rows and biases in another order: the layer computes the same, its load is renamed."""
    module = layer(seed)
    renamed = layer(seed)
    x_BSD = normal(seed + 20, 2, 5, 6)
    order_E = torch.randperm(4, generator=numbers(seed + 30))
    with torch.no_grad():
        for tensor in (
            renamed.gate.weight,
            renamed.gate.e_score_correction_bias,
            *renamed.experts.parameters(),
        ):
            tensor.copy_(tensor[order_E])
    y_BSD, routing = module(x_BSD)
    same_BSD, other = renamed(x_BSD)
    torch.testing.assert_close(same_BSD, y_BSD, atol=1e-5, rtol=1e-5)  # float32
    assert torch.equal(other.tokens_per_expert_E, routing.tokens_per_expert_E[order_E])


@given(seed=seeds, S=st.integers(2, 6))
def test_padding_is_computed_and_not_counted(seed, S):
    """Positions that are not valid change neither the load nor the balance loss, whatever they hold."""
    module = layer(seed)
    x_BSD = normal(seed + 20, 2, S, 6)
    valid_BS = torch.arange(S) < torch.tensor([[S], [1]])
    _, routing = module(x_BSD, valid_BS)
    other_BSD = torch.where(valid_BS[..., None], x_BSD, normal(seed + 21, 2, S, 6))
    _, same = module(other_BSD, valid_BS)
    assert torch.equal(routing.tokens_per_expert_E, same.tokens_per_expert_E)
    assert routing.tokens_per_expert_E.sum() == 2 * (S + 1)
    torch.testing.assert_close(routing.balance_loss, same.balance_loss)


@given(seed=seeds)
def test_every_weight_learns(seed):
    """A loss on the output reaches the router, the chosen experts and the shared expert, and no idle expert."""
    module = layer(seed)
    x_BSD = normal(seed + 20, 1, 2, 6)
    y_BSD, routing = module(x_BSD)
    y_BSD.square().sum().backward()
    used_E = routing.tokens_per_expert_E > 0
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 0, f"{name} gets no gradient"
    for matrix in module.experts.parameters():
        assert torch.equal(matrix.grad.flatten(1).abs().amax(1) > 0, used_E)


def test_generation_computes_the_same():
    """Without gradients the layer computes the same, in another order of sums, and reports the same choice."""
    module = layer(1)
    x_BSD = normal(2, 1, 3, 6)
    with torch.no_grad():
        y_BSD, routing = module(x_BSD)
    assert torch.equal(routing.experts_TK, module.gate(x_BSD.flatten(0, 1)).experts_TK)
    torch.testing.assert_close(y_BSD, module(x_BSD)[0], atol=1e-6, rtol=1e-5)  # float32
