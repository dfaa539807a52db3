"""GRPO: advantages within groups, the clipped surrogate, and what they amount to together."""

import ast
import importlib.util
import itertools
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.config.posttraining import Aggregation
from minglm.rl.aggregation import aggregate, denominator
from minglm.rl.grpo import (
    PolicyLoss,
    TruncatedImportanceSampling,
    advantages,
    informative_groups,
    policy_loss,
)
from minglm.testing.rl import check_advantages, check_policy_loss
from minglm.testing.strategies import numbers, seeds, shapes


def test_advantages_keep_the_contract():
    """Zero sum, independence of other groups and of the level, exact silence of equal rewards."""
    check_advantages(advantages)


def test_policy_loss_keeps_the_contract():
    """REINFORCE on policy, the clip on the right side, nothing read under the mask."""
    check_policy_loss(policy_loss)


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


def wrong_side(logprobs_BS, sampling_BS, advantages_B, low, high, mask_BS):
    """Take the larger of the two objectives: the clip holds the policy where it should let it return."""
    negative = policy_loss(logprobs_BS, sampling_BS, -advantages_B, low, high, mask_BS)
    right = policy_loss(logprobs_BS, sampling_BS, advantages_B, low, high, mask_BS)
    return PolicyLoss(-negative.loss_BS, right.metrics)


def no_clip(logprobs_BS, sampling_BS, advantages_B, low, high, mask_BS):
    """Broken: never stop."""
    return policy_loss(logprobs_BS, sampling_BS, advantages_B, 1.0, 1e9, mask_BS)


def swapped_bounds(logprobs_BS, sampling_BS, advantages_B, low, high, mask_BS):
    """Broken: use the upper range below and the lower one above."""
    return policy_loss(logprobs_BS, sampling_BS, advantages_B, high, low, mask_BS)


def reads_masked(logprobs_BS, sampling_BS, advantages_B, low, high, mask_BS):
    """Broken: mask after the exponential, an infinite ratio times zero."""
    loss_BS, metrics = policy_loss(logprobs_BS, sampling_BS, advantages_B, low, high)
    return PolicyLoss(loss_BS * (1.0 if mask_BS is None else mask_BS), metrics)


def recomputed(logprobs_BS, sampling_BS, advantages_B, low, high, mask_BS):
    """Broken: take the ratio against itself, always 1, so stale samples are never corrected or clipped."""
    return policy_loss(logprobs_BS, logprobs_BS.detach(), advantages_B, low, high, mask_BS)


@pytest.mark.parametrize("broken", [wrong_side, no_clip, swapped_bounds, reads_masked, recomputed])
def test_contract_finds_broken_policy_loss(broken):
    """Each mistake others have made is found."""
    with pytest.raises(AssertionError):
        check_policy_loss(broken)


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


@given(seed=seeds, arms=st.integers(2, 4), samples=st.integers(2, 4))
def test_expected_group_gradient_is_the_policy_gradient(seed, arms, samples):
    """Over every group that a small bandit can draw, the agentic form's gradient is (G-1)/G of the true one.

    The factor is that of a group mean which contains the sample itself; it only rescales the step.
    """
    scores_V = torch.randn(arms, generator=numbers(seed)).requires_grad_()
    rewards_V = torch.rand(arms, generator=numbers(seed + 1))
    logprobs_V = scores_V.log_softmax(0)
    expected = 0.0
    for drawn in itertools.product(range(arms), repeat=samples):
        chosen_B = torch.tensor(drawn)
        logprobs_B1 = logprobs_V[chosen_B][:, None]
        advantages_B = advantages(rewards_V[chosen_B][None], normalize_std=False)[0]
        loss_B1, _ = policy_loss(logprobs_B1, logprobs_B1.detach(), advantages_B, 0.2, 0.2)
        expected += logprobs_B1.detach().sum().exp() * aggregate(
            loss_B1, torch.ones_like(loss_B1).bool(), "token"
        )
    (found_V,) = torch.autograd.grad(expected, scores_V, retain_graph=True)
    (true_V,) = torch.autograd.grad(-(rewards_V * logprobs_V.exp()).sum(), scores_V)
    # Sum of 256 float32.
    torch.testing.assert_close(found_V, true_V * (samples - 1) / samples, atol=1e-5, rtol=1e-4)


off_policy = st.floats(-200, 200) | st.sampled_from(
    [-20.0, 20.0, 20.5, -20.5, 100.0, -100.0, math.inf, -math.inf]
)


@given(
    log_ratios=st.lists(off_policy, min_size=1, max_size=6),
    advantage=st.sampled_from([-2.0, -1.0, 0.0, 1.0]),
    proximal=st.booleans(),
)
def test_any_log_ratio_has_a_finite_gradient(log_ratios, advantage, proximal):
    """Loss, gradient and metrics are finite, also where exp overflows; the gradient is exactly 0 where the clip decides.

    Elsewhere it is -ratio * advantage, and 0 beyond 20 nats.
    """
    log_ratio_BS = torch.tensor([log_ratios])
    logprobs_BS = torch.full_like(log_ratio_BS, -1.0).requires_grad_()
    old_BS = -1.0 - log_ratio_BS
    importance = TruncatedImportanceSampling(2.0, old_BS) if proximal else None
    advantages_B = torch.tensor([advantage])
    sampling_BS = old_BS.clamp(-300, 300) if proximal else old_BS
    loss_BS, metrics = policy_loss(
        logprobs_BS, sampling_BS, advantages_B, 0.2, 0.28, importance=importance
    )
    (gradient_BS,) = torch.autograd.grad(loss_BS.sum(), logprobs_BS)
    assert loss_BS.isfinite().all() and gradient_BS.isfinite().all()
    assert all(value.isfinite() for value in metrics)
    for seen, found in zip((-1.0 - old_BS[0]).tolist(), gradient_BS[0].tolist(), strict=True):
        if abs(seen) > 20:
            assert found == 0
        elif advantage and (seen > math.log(1.28) if advantage > 0 else seen < math.log(0.8)):
            assert found == 0 or seen == pytest.approx(math.log(1.28), abs=1e-6)
        else:
            assert found == pytest.approx(-math.exp(seen) * advantage, rel=1e-4)  # float32 exp


def test_the_bound_on_the_log_ratio():
    """A token 20 nats off still has its gradient, one slightly further has none; the loss stays that of 20 nats."""
    for nats, expected in ((19.5, math.exp(19.5)), (20.5, 0.0)):
        logprobs_BS = torch.zeros(1, 1, requires_grad=True)
        loss_BS, metrics = policy_loss(
            logprobs_BS, torch.full((1, 1), -nats), torch.tensor([-1.0]), 0.2, 0.2
        )
        loss_BS.sum().backward()
        assert float(logprobs_BS.grad) == pytest.approx(expected, rel=1e-4)  # float32 exp
        assert float(metrics.ratio_max) == pytest.approx(math.exp(min(nats, 20)), rel=1e-4)


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


@given(seed=seeds, shape=shapes)
def test_metrics_are_means_over_the_produced_tokens(seed, shape):
    """The largest ratio, the share that is clipped and mean(rho - 1 - log rho), of the tokens under the mask alone."""
    logprobs_BS = -2 * torch.rand(shape, generator=numbers(seed))
    sampling_BS = -2 * torch.rand(shape, generator=numbers(seed + 1))
    advantages_B = torch.randn(shape[0], generator=numbers(seed + 2))
    mask_BS = torch.rand(shape, generator=numbers(seed + 3)) < 0.6
    _, metrics = policy_loss(logprobs_BS, sampling_BS, advantages_B, 0.2, 0.28, mask_BS)
    rhos = []
    clipped = 0
    for b, s in mask_BS.nonzero().tolist():
        rhos.append(math.exp(logprobs_BS[b, s] - sampling_BS[b, s]))
        clipped += rhos[-1] > 1.28 if advantages_B[b] > 0 else rhos[-1] < 0.8
    count = max(1, len(rhos))
    divergence = sum(rho - 1 - math.log(rho) for rho in rhos) / count
    assert metrics.tokens == len(rhos)
    assert float(metrics.ratio_max) == pytest.approx(max(rhos, default=0), rel=1e-5)
    assert float(metrics.clip_share) == pytest.approx(clipped / count, abs=1e-6)
    assert float(metrics.kl) == pytest.approx(divergence, rel=1e-4, abs=1e-6)  # float32


@pytest.fixture(scope="module")
def compute_loss_of_trl():
    """GRPOTrainer._compute_loss of the installed trl package; compiled alone, since importing its module takes seconds."""
    folder = Path(importlib.util.find_spec("trl").submodule_search_locations[0])
    source = (folder / "trainer" / "grpo_trainer.py").read_text(encoding="utf-8")
    (method,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "_compute_loss"
    )
    names = {
        "torch": torch,
        "nanmin": torch.amin,
        "nanmax": torch.amax,
    }  # these two are only logged
    exec(compile(ast.Module([method], []), "grpo_trainer.py", "exec"), names)
    return names["_compute_loss"]


LOSS_TYPES = {
    Aggregation.TOKEN: "bnpo",
    Aggregation.SEQUENCE: "grpo",
    Aggregation.CONSTANT: "dr_grpo",
}


def trl_trainer(logprobs_BS, mode, clip_low, clip_high, length):
    """Return what trl's method reads of its trainer, with log-probabilities in place of a model."""
    off = {"aux_loss_enabled": False, "use_vllm": False, "_entropy_bonus_enabled": False}
    return SimpleNamespace(
        **off,
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            logprobs_BS,
            torch.zeros_like(logprobs_BS),
            None,
        ),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        loss_type=LOSS_TYPES[mode],
        epsilon_low=clip_low,
        epsilon_high=clip_high,
        max_completion_length=length,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            gather=lambda tensor: tensor, reduce=lambda tensor, reduction: tensor
        ),
        _metrics={"train": defaultdict(list)},
    )


@given(
    seed=seeds,
    shape=shapes,
    mode=st.sampled_from(list(Aggregation)),
    clip_low=st.floats(0.05, 0.4),
    clip_high=st.floats(0.05, 0.4),
)
def test_loss_and_gradient_are_those_of_trl(
    compute_loss_of_trl, seed, shape, mode, clip_low, clip_high
):
    """In each aggregation, with rewards of groups of two: loss, gradient, and the share that is clipped."""
    B, S = 2 * shape[0], shape[1]
    logprobs_BS = -2 * torch.rand(B, S, generator=numbers(seed))
    sampling_BS = logprobs_BS + 0.4 * torch.randn(B, S, generator=numbers(seed + 1))
    advantages_B = advantages(torch.rand(shape[0], 2, generator=numbers(seed + 2))).flatten()
    mask_BS = torch.rand(B, S, generator=numbers(seed + 3)) < 0.6
    mask_BS[:, 0] = True  # trl counts a row without a token as a sample
    length = S + 3

    ours_BS = logprobs_BS.clone().requires_grad_()
    loss_BS, metrics = policy_loss(ours_BS, sampling_BS, advantages_B, clip_low, clip_high, mask_BS)
    loss = aggregate(loss_BS, mask_BS, mode, denominator(mask_BS, mode, length))
    loss.backward()

    theirs_BS = logprobs_BS.clone().requires_grad_()
    trainer = trl_trainer(theirs_BS, mode, clip_low, clip_high, length)
    no_prompt = torch.zeros(B, 0, dtype=torch.int64)
    inputs = {
        "prompt_ids": no_prompt,
        "prompt_mask": no_prompt,
        "completion_ids": torch.zeros(B, S, dtype=torch.int64),
        "completion_mask": mask_BS.long(),
        "advantages": advantages_B,
        "old_per_token_logps": sampling_BS,
    }
    expected = compute_loss_of_trl(trainer, None, inputs)
    expected.backward()
    # float32 sums of at most 108 numbers of size 1
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours_BS.grad, theirs_BS.grad, atol=1e-6, rtol=1e-4)
    (clipped,) = trainer._metrics["train"]["clip_ratio/region_mean"]
    assert float(metrics.clip_share) == pytest.approx(clipped, abs=1e-6)


@given(seed=seeds, shape=shapes)
def test_uninformative_batch_leaves_no_gradient(seed, shape):
    """When every group has equal rewards, the gradient is exactly zero, so the step can be skipped."""
    rewards_PG = torch.full((shape[0], 4), 0.1)
    logprobs_BS = -torch.rand(shape[0] * 4, shape[1], generator=numbers(seed))
    logprobs_BS.requires_grad_()
    loss_BS, _ = policy_loss(
        logprobs_BS, logprobs_BS.detach() - 0.1, advantages(rewards_PG).flatten(), 0.2, 0.2
    )
    aggregate(loss_BS, torch.ones_like(loss_BS).bool(), "sequence").backward()
    assert not informative_groups(rewards_PG).any() and not logprobs_BS.grad.any()


@given(seed=seeds, shape=shapes, cap=st.floats(0.5, 3))
def test_truncated_importance_sampling_bounds_the_weight(seed, shape, cap):
    """With a cap the first gradient is -min(pi / mu, cap) * advantage: corrected, and never above the cap."""
    logprobs_BS = -torch.rand(shape, generator=numbers(seed)).requires_grad_()
    sampling_BS = -2 * torch.rand(shape, generator=numbers(seed + 1))
    advantages_B = torch.randn(shape[0], generator=numbers(seed + 2))
    loss_BS, _ = policy_loss(
        logprobs_BS,
        sampling_BS,
        advantages_B,
        0.2,
        0.2,
        importance=TruncatedImportanceSampling(cap),
    )
    (gradient_BS,) = torch.autograd.grad(loss_BS.sum(), logprobs_BS)
    weight_BS = (logprobs_BS.detach() - sampling_BS).exp().clamp(max=cap)
    torch.testing.assert_close(gradient_BS, -weight_BS * advantages_B[:, None])


@given(seed=seeds, shape=shapes)
def test_later_updates_clip_against_the_trainer(seed, shape):
    """With a cap and the proximal log-probabilities the clip counts from them, not from the rollout's."""
    proximal_BS = -torch.rand(shape, generator=numbers(seed))
    # The rollout thought these tokens far less likely: weight e, cut to 2.
    sampling_BS = proximal_BS - 1.0
    logprobs_BS = (proximal_BS + 0.1).requires_grad_()
    loss_BS, _ = policy_loss(
        logprobs_BS,
        sampling_BS,
        torch.ones(shape[0]),
        0.2,
        0.2,
        importance=TruncatedImportanceSampling(2.0, proximal_BS),
    )
    # E^0.1 is inside the clip.
    torch.testing.assert_close(loss_BS, torch.full(shape, -2 * 1.1051709), atol=1e-5, rtol=0)
