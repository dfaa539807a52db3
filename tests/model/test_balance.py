"""Balance: the step of the selection bias, the count it is taken from, and the loss per sequence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.model.balance import sequence_loss, tokens_per_expert, update_expert_bias
from minglm.model.router import select_experts
from minglm.testing.model import check_balance
from minglm.testing.strategies import numbers, seeds

# Sequences, positions, experts.
counts = st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(2, 9))


def test_step_keeps_the_contract():
    """Up below the mean load, down above it, by the rate, whatever the number of tokens."""
    check_balance(update_expert_bias)


def test_centred_step_keeps_the_contract():
    """Subtracting the mean of the step, as some systems do, changes no choice and is accepted."""

    def centred(bias_E, load_E, rate):
        step_E = rate * torch.sign(load_E.mean() - load_E)
        bias_E += step_E - step_E.mean()

    check_balance(centred)


def wrong_sign(bias_E, load_E, rate):
    """Broken: raise the bias of busy experts and lower that of idle ones."""
    update_expert_bias(bias_E, load_E, -rate)


def compares_a_count_with_a_share(bias_E, load_E, rate):
    """Broken: compare each expert's count with the mean share of the load."""
    bias_E += rate * torch.sign(1 / len(load_E) - load_E)


def proportional(bias_E, load_E, rate):
    """Broken: step in proportion to the error, so that the step's size depends on the number of tokens."""
    bias_E += rate * (load_E.mean() - load_E)


def not_in_place(bias_E, load_E, rate):
    """Broken: compute a new bias and lose it."""
    bias_E = bias_E + rate * torch.sign(load_E.mean() - load_E)


def median(bias_E, load_E, rate):
    """Broken: compare with the median load instead of the mean."""
    bias_E += rate * torch.sign(load_E.median() - load_E)


@pytest.mark.parametrize(
    "broken", [wrong_sign, compares_a_count_with_a_share, proportional, not_in_place, median]
)
def test_contract_finds_broken_steps(broken):
    """Each mistake others have made is found."""
    with pytest.raises(AssertionError):
        check_balance(broken)


def routed(seed, B, S, E, K):
    """Draw scores of B * S tokens and their K best experts."""
    scores_TE = torch.rand(B * S, E, generator=numbers(seed))
    return scores_TE, select_experts(scores_TE, torch.zeros(E), K)


@given(seed=seeds, shape=counts, cut=st.integers(0, 30))
def test_loads_add_up_over_micro_batches(seed, shape, cut):
    """The count of a batch is the sum over its pieces, K per token; tokens that are not valid are left out."""
    B, S, E = shape
    _, experts_TK = routed(seed, *shape, min(2, E))
    valid_T = torch.rand(B * S, generator=numbers(seed + 1)) < 0.7
    whole_E = tokens_per_expert(experts_TK, E, valid_T)
    parts = [
        tokens_per_expert(experts_TK[part], E, valid_T[part])
        for part in (slice(0, cut), slice(cut, None))
    ]
    assert torch.equal(whole_E, parts[0] + parts[1])
    assert whole_E.sum() == 2 * valid_T.sum()
    assert torch.equal(
        tokens_per_expert(experts_TK, E), torch.bincount(experts_TK.flatten(), minlength=E).float()
    )


@given(seed=seeds, shape=counts)
def test_sequence_loss_is_its_equation(seed, shape):
    """E * sum of f and P per sequence, in plain numbers, averaged over the sequences; padding does not count."""
    B, S, E = shape
    K = min(2, E)
    scores_TE, experts_TK = routed(seed, B, S, E, K)
    valid_T = torch.rand(B * S, generator=numbers(seed + 1)) < 0.7
    total = 0.0
    for b in range(B):
        tokens = [t for t in range(b * S, (b + 1) * S) if valid_T[t]]
        for e in range(E):
            choices = sum(e in experts_TK[t].tolist() for t in tokens)
            shares = sum(scores_TE[t, e].item() / scores_TE[t].sum().item() for t in tokens)
            f = choices / (K * max(1, len(tokens)))
            P = shares / max(1, len(tokens))
            total += E * f * P / B
    found = sequence_loss(scores_TE, experts_TK, B, valid_T).item()
    assert abs(found - total) < 1e-5 * max(1, E)  # float32 sums of at most 72 shares


@given(rounds=st.integers(1, 4), E=st.integers(2, 9), K=st.integers(1, 3), level=st.floats(0.01, 1))
def test_perfect_balance_costs_exactly_the_coefficient(rounds, E, K, level):
    """Equal scores and equal counts give 1, so the weighted loss equals its weight alpha."""
    K = min(K, E)
    first_T1 = torch.arange(rounds * E)[:, None]
    experts_TK = (first_T1 + torch.arange(K)) % E  # token t goes to experts t, t + 1, ...
    loss = sequence_loss(torch.full((rounds * E, E), level), experts_TK, 1)
    assert abs(loss.item() - 1) < 1e-5  # float32


@given(seed=seeds, S=st.integers(2, 8), E=st.integers(3, 8))
def test_sequence_loss_pushes_down_the_busy(seed, S, E):
    """Where one expert gets every token, the gradient lowers its scores and raises those of the idle; no NaN."""
    scores_TE = (0.2 + 0.6 * torch.rand(S, E, generator=numbers(seed))).requires_grad_()
    experts_TK = torch.zeros(S, 1, dtype=torch.long)
    (gradient_TE,) = torch.autograd.grad(sequence_loss(scores_TE, experts_TK, 1), scores_TE)
    assert (gradient_TE[:, 0] > 0).all()
    assert (gradient_TE[:, 1:] < 0).all()
    nothing = sequence_loss(scores_TE, experts_TK, 1, torch.zeros(S, dtype=torch.bool))
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, scores_TE)[0].any()


@given(logits=st.lists(st.floats(-110, -30, width=32), min_size=4, max_size=4))
def test_tiny_scores_cost_no_less_than_zero(logits):
    """Scores that float32 hardly holds, and those that it holds as 0, have shares from 0 to 1."""
    scores_TE = torch.tensor([logits]).sigmoid()
    experts_TK = select_experts(scores_TE, torch.zeros(4), 2)
    assert 0 <= sequence_loss(scores_TE, experts_TK, 1) <= 2  # E / K


def test_the_bias_balances_a_router_that_prefers_one_expert():
    """Scores that would send every token to two of eight experts: a few hundred steps spread the load evenly."""
    E = 8
    bias_E = torch.zeros(8)
    for step in range(600):
        scores_TE = (
            torch.rand(256, E, generator=numbers(step)) * 0.2 + torch.tensor([0.7, 0.6, *[0.2] * 6])
        ).clamp(0, 1)
        load_E = tokens_per_expert(select_experts(scores_TE, bias_E, 2), E)
        if step == 0:
            assert load_E.max() == 256  # without the bias the first expert is everyone's choice
        update_expert_bias(bias_E, load_E, 0.001)
    # 64 choices per expert are expected, with a deviation of about 7 from sampling and one step of the bias
    assert load_E.max() / load_E.mean() < 1.4 and load_E.min() > 35
