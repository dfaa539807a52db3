"""Advantages: what a group of answers to one prompt says of each, and when it says nothing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.rl.grpo import EQUAL_WITHIN, advantages, informative_groups
from minglm.testing.rl import check_advantages
from minglm.testing.strategies import numbers, seeds


def test_advantages_keep_the_contract():
    """Zero sum, independence of other groups and of the level, exact silence of equal rewards."""
    check_advantages(advantages)


def global_mean(rewards_PG, normalize_std, valid_PG):
    """Broken: compare with the mean of the whole batch."""
    rewards_PG = torch.where(valid_PG, rewards_PG, 0.0)
    return torch.where(valid_PG, rewards_PG - rewards_PG.sum() / valid_PG.sum().clamp(min=1), 0.0)


def counts_failures(rewards_PG, normalize_std, valid_PG):
    """Broken: let infrastructure failures into the statistics as zeros."""
    return torch.where(
        valid_PG, advantages(torch.where(valid_PG, rewards_PG, 0.0), normalize_std), 0.0
    )


def divides_noise(rewards_PG, normalize_std, valid_PG):
    """Broken: divide by the deviation plus a tiny epsilon without asking whether anything differs."""
    centred_PG = torch.where(
        valid_PG, rewards_PG - (rewards_PG * valid_PG).sum(1, True) / valid_PG.sum(1, True), 0.0
    )
    return centred_PG / (centred_PG.std(1, keepdim=True, correction=0) + 1e-12)


@pytest.mark.parametrize("broken", [global_mean, counts_failures, divides_noise])
def test_contract_finds_broken_advantages(broken):
    """Each mistake others have made is found."""
    with pytest.raises(AssertionError):
        check_advantages(broken)


@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    level=st.floats(0, 1, width=32),
)
def test_informative_groups_are_those_with_an_advantage(seed, shape, level):
    """A group is informative exactly when it has a non-zero advantage; NaN rewards of failed samples are not looked at."""
    rewards_PG = torch.where(torch.rand(shape, generator=numbers(seed)) < 0.3, 1.0, level)
    valid_PG = torch.rand(shape, generator=numbers(seed + 1)) < 0.7
    rewards_PG[~valid_PG] = torch.nan
    informative_P = informative_groups(rewards_PG, valid_PG)
    for normalize in (True, False):
        assert torch.equal(
            informative_P, advantages(rewards_PG, normalize, valid_PG).abs().amax(1) > 0
        )


@pytest.mark.parametrize("apart, informative", [(1, False), (2, True)])
def test_rewards_this_near_are_equal(apart, informative):
    """A spread of EQUAL_WITHIN is none."""
    rewards_PG = torch.tensor([[0.0, apart * EQUAL_WITHIN]])
    assert informative_groups(rewards_PG).tolist() == [informative]


@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 3), st.integers(2, 5)),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    normalize=st.booleans(),
)
def test_a_valid_reward_must_be_finite(seed, shape, bad, normalize):
    """One NaN silences a group and one infinity makes it NaN, so both are refused; not valid, they are not looked at."""
    rewards_PG = torch.rand(shape, generator=numbers(seed))
    valid_PG = torch.ones(shape, dtype=torch.bool)
    p = seed % shape[0]
    rewards_PG[p, 1] = bad
    for judge in (informative_groups, lambda r, v: advantages(r, normalize, v)):
        with pytest.raises(ValueError, match=f"sample 1 of prompt {p} is {bad}"):
            judge(rewards_PG, valid_PG)
    valid_PG[p, 1] = False
    assert advantages(rewards_PG, normalize, valid_PG).isfinite().all()
