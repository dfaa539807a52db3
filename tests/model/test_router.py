"""The router: who is chosen, with what weight, and that it can learn."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import ModelConfig
from minglm.kernels.router.eager import group_by_expert, route
from minglm.model.glm import GLM
from minglm.model.router import Router, combine_weights, replaced_choices, select_experts
from minglm.testing.model import check_router, normal, tiny_model
from minglm.testing.strategies import numbers, seeds


def ours(scores_TE, bias_E, config):
    """Join our two functions in one."""
    experts_TK = select_experts(
        scores_TE, bias_E, config.num_experts_per_tok, config.n_group, config.topk_group
    )
    return experts_TK, combine_weights(
        scores_TE, experts_TK, config.norm_topk_prob, config.routed_scaling_factor
    )


def test_router_keeps_the_contract():
    """Choice by biased score, ties to the lower index, weights from the scores alone, a gradient for every token."""
    check_router(ours)


def bias_in_the_weights(scores_TE, bias_E, config):
    """Broken: mix with the biased scores, so that balancing changes what the experts say."""
    experts_TK, _ = ours(scores_TE, bias_E, config)
    return experts_TK, combine_weights(
        scores_TE + bias_E, experts_TK, config.norm_topk_prob, config.routed_scaling_factor
    )


def last_of_equals(scores_TE, bias_E, config):
    """Broken: give ties to the higher index."""
    flipped, weights_TK = ours(scores_TE.flip(1), bias_E.flip(0), config)
    return scores_TE.shape[1] - 1 - flipped, weights_TK


def unbiased_choice(scores_TE, bias_E, config):
    """Broken: forget the bias, so that nothing is balanced."""
    return ours(scores_TE, torch.zeros_like(bias_E), config)


def zeros_for_other_groups(scores_TE, bias_E, config):
    """Broken: mask the groups that are out with 0, which beats a negative biased score."""
    biased_TE = scores_TE + bias_E
    grouped = biased_TE.unflatten(1, (config.n_group, -1))
    best = (
        grouped.topk(2, -1)
        .values.sum(-1)
        .sort(descending=True, stable=True)
        .indices[:, : config.topk_group]
    )
    out = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, False)
    masked_TE = grouped.masked_fill(out[..., None], 0.0).flatten(1)
    experts_TK = masked_TE.sort(descending=True, stable=True).indices[
        :, : config.num_experts_per_tok
    ]
    return experts_TK, combine_weights(
        scores_TE, experts_TK, config.norm_topk_prob, config.routed_scaling_factor
    )


def no_gradient(scores_TE, bias_E, config):
    """Broken: cut the weights from the graph, as when they are computed under no_grad with the choice."""
    experts_TK, weights_TK = ours(scores_TE.detach(), bias_E, config)
    return experts_TK, weights_TK + 0 * scores_TE.sum()


def forgets_the_factor(scores_TE, bias_E, config):
    """Broken: let the weights sum to one, right for GLM-4.5-Air and wrong for GLM-4.5."""
    return ours(scores_TE, bias_E, dataclasses.replace(config, routed_scaling_factor=1.0))


@pytest.mark.parametrize(
    "broken",
    [
        bias_in_the_weights,
        last_of_equals,
        unbiased_choice,
        zeros_for_other_groups,
        no_gradient,
        forgets_the_factor,
    ],
)
def test_contract_finds_broken_router(broken):
    """Each mistake others have made is found."""
    with pytest.raises(AssertionError):
        check_router(broken)


def router(seed, E=6, D=8, K=2):
    """Return a router with drawn weights and bias."""
    config = dataclasses.replace(
        ModelConfig(), hidden_size=D, n_routed_experts=E, num_experts_per_tok=K
    )
    module = Router(config)
    with torch.no_grad():
        module.weight.copy_(normal(seed, E, D))
        module.e_score_correction_bias.copy_(normal(seed + 1, E, scale=0.3))
    return module


@given(seed=seeds, T=st.integers(1, 6))
def test_module_is_its_equation(seed, T):
    """Scores are the sigmoid of a product in float32; the rest is `select_experts` and `combine_weights`."""
    module = router(seed)
    x_TD = normal(seed + 2, T, 8)
    experts_TK, weights_TK, scores_TE = module(x_TD)
    expected_TE = torch.sigmoid(x_TD.double() @ module.weight.double().T)
    # float32, 8 products.
    torch.testing.assert_close(scores_TE.double(), expected_TE, atol=1e-6, rtol=0)
    chosen_TK, mixed_TK = ours(scores_TE, module.e_score_correction_bias, module.config)
    assert torch.equal(experts_TK, chosen_TK) and torch.equal(weights_TK, mixed_TK)


@given(seed=seeds)
def test_bfloat16_activations_are_routed_in_float32(seed):
    """The scores, the bias and the weights are float32 whatever the activations are."""
    module = router(seed)
    x_TD = normal(seed + 2, 4, 8).bfloat16()
    experts_TK, weights_TK, scores_TE = module(x_TD)
    for tensor in (weights_TK, scores_TE, module.e_score_correction_bias):
        assert tensor.dtype == torch.float32
    assert torch.equal(scores_TE, module(x_TD.float())[2])


@given(seed=seeds, K=st.integers(2, 4))
def test_router_learns_and_its_bias_does_not(seed, K):
    """With two experts or more every row of the weight that was used gets a gradient; the bias is no parameter."""
    module = router(seed, K=K)
    x_TD = normal(seed + 2, 3, 8)
    experts_TK, weights_TK, _ = module(x_TD)
    (weights_TK * torch.arange(1.0, K + 1)).sum().backward()
    assert (module.weight.grad[experts_TK.unique()].abs().amax(1) > 0).any()
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert "e_score_correction_bias" in module.state_dict()


def test_training_with_one_normalised_expert_is_refused_with_the_reason():
    """With one expert a token its normalised weight is always 1: the router could not learn."""
    with pytest.raises(ValueError, match="router gets no gradient"):
        dataclasses.replace(ModelConfig(), num_experts_per_tok=1).check_trainable()
    scores_TE = torch.rand(3, 4, requires_grad=True)
    weights_TK = combine_weights(scores_TE, select_experts(scores_TE, torch.zeros(4), 1))
    # Why it is refused.
    assert not torch.autograd.grad(weights_TK.sum(), scores_TE)[0].abs().max() > 1e-6


@given(
    seed=seeds,
    T=st.integers(1, 9),
    E=st.integers(2, 6),
    K=st.integers(1, 3),
    multiple=st.sampled_from([1, 2, 5]),
)
def test_pairs_sorted_by_expert(seed, T, E, K, multiple):
    """Each expert has the pairs of its tokens in order, and as few rows of padding as fill it up; those name pair 0."""
    experts_TK = torch.rand(T, E, generator=numbers(seed)).argsort(1)[:, :K]
    order, inverse, ends_E = group_by_expert(experts_TK, E, multiple)
    pairs = experts_TK.flatten().tolist()
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        own = [pair for pair, expert in enumerate(pairs) if expert == e]
        padding = -len(own) % multiple
        assert order[start:end].tolist() == own + [0] * padding
        assert inverse[own].tolist() == list(range(start, start + len(own)))
        start = end
    assert start == len(order) and ends_E.dtype == torch.int32


CONVERSIONS = {
    "to": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "type": lambda model: model.type(torch.bfloat16),
    "there and back": lambda model: model.bfloat16().float(),
    "device and dtype": lambda model: model.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("way", CONVERSIONS)
def test_a_conversion_leaves_the_selection_bias_alone(way):
    """Every way to convert a module keeps the bias float32 with its very bits, and converts the weights.

    Steps of 0.001 at 7 are a thirtieth of what bfloat16 tells apart there.
    """
    model = tiny_model(3)
    routers = model.routers()
    biases = [6.8 + 0.001 * torch.arange(len(router.e_score_correction_bias)) for router in routers]
    for router, bias_E in zip(routers, biases, strict=True):
        router.e_score_correction_bias.copy_(bias_E)
    CONVERSIONS[way](model)
    for router, bias_E in zip(routers, biases, strict=True):
        assert router.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(router.e_score_correction_bias, bias_E)
        assert (router.weight.dtype == torch.float32) == (way == "there and back")


def test_a_model_on_the_meta_device_gets_its_bias_with_the_rest():
    """`to_empty` makes room for the bias as for every other tensor."""
    with torch.device("meta"):
        model = GLM(tiny_model(3).config)
    model.to_empty(device="cpu")
    assert all(router.e_score_correction_bias.device.type == "cpu" for router in model.routers())


@given(seed=seeds, tokens=st.integers(1, 5), free=st.integers(0, 2))
def test_imposed_experts_get_the_weights_of_their_own_scores(seed, tokens, free):
    """A row of imposed experts is taken as it stands and weighed by the router's scores; a row with -1 is left alone.

    The replaced choices are counted against sets, in plain Python.
    """
    config = tiny_model(3).config
    router = Router(config)
    torch.nn.init.normal_(router.weight, generator=numbers(seed))
    routes = router(normal(seed, tokens, config.hidden_size))
    K = config.num_experts_per_tok
    imposed_TK = normal(seed + 1, tokens, config.n_routed_experts).argsort(1)[:, :K]
    imposed_TK[:free, -1] = -1  # in one place of the row is enough
    found = router.impose(routes, imposed_TK)

    replaced = 0
    for t in range(tokens):
        own = routes.experts_TK[t].tolist()
        if t < free:
            assert found.experts_TK[t].tolist() == own
            torch.testing.assert_close(found.weights_TK[t], routes.weights_TK[t])
            replaced += len(set(imposed_TK[t, :-1].tolist()) - set(own))
            continue
        taken = imposed_TK[t].tolist()
        assert found.experts_TK[t].tolist() == taken
        scores_K = routes.scores_TE[t, taken]
        weights_K = scores_K / scores_K.sum() * config.routed_scaling_factor
        torch.testing.assert_close(found.weights_TK[t], weights_K)  # the order of a sum
        replaced += len(set(taken) - set(own))
    assert replaced_choices(routes.experts_TK, imposed_TK) == replaced


@given(seed=seeds)
def test_weights_are_shares_unless_something_else_is_said(seed):
    """Without further arguments the weights of a token add up to 1."""
    logits_TE = normal(seed, 4, 8)
    routes = route(logits_TE, torch.zeros(8), 3)
    torch.testing.assert_close(routes.weights_TK.sum(1), torch.ones(4))


@given(logits=st.lists(st.floats(-110, -30, width=32), min_size=4, max_size=4))
def test_weights_of_tiny_scores_are_no_less_than_zero(logits):
    """Scores that float32 hardly holds, and those that it holds as 0, still get weights from 0 to 1."""
    routes = route(torch.tensor([logits]), torch.zeros(4), top_k=2)
    assert (routes.weights_TK >= 0).all() and (routes.weights_TK <= 1).all()
