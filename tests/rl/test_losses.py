"""Policy losses: their definition, their clip, and what they amount to together; equal to trl's where it has them."""

import ast
import dataclasses
import importlib.util
import itertools
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.config.posttraining import Aggregation, LossType, PolicyLossConfig, RatioLevel
from minglm.rl.aggregation import aggregate, denominator
from minglm.rl.grpo import advantages, informative_groups
from minglm.rl.losses import PolicyLoss, policy_loss
from minglm.testing.rl import check_policy_loss, losses
from minglm.testing.strategies import numbers, seeds, shapes

SYMMETRIC = PolicyLossConfig(clip_low=0.2, clip_high=0.2)


def test_policy_loss_keeps_the_contract():
    """REINFORCE on policy, the clip on the right side, nothing read under the mask."""
    check_policy_loss(policy_loss)


def wrong_side(logprobs_BS, sampling_BS, advantages_B, config, mask_BS=None, **others):
    """Take the larger of the two objectives: the clip holds the policy where it should let it return."""
    negative = policy_loss(logprobs_BS, sampling_BS, -advantages_B, config, mask_BS, **others)
    right = policy_loss(logprobs_BS, sampling_BS, advantages_B, config, mask_BS, **others)
    return PolicyLoss(-negative.loss_BS, right.metrics)


def altered(**changes):
    """Return a loss that ignores some settings, and has these in their place."""

    def broken(logprobs_BS, sampling_BS, advantages_B, config, mask_BS=None, **others):
        config = dataclasses.replace(config, **changes)
        return policy_loss(logprobs_BS, sampling_BS, advantages_B, config, mask_BS, **others)

    return broken


def swapped_bounds(logprobs_BS, sampling_BS, advantages_B, config, mask_BS=None, **others):
    """Broken: use the upper range below and the lower one above."""
    config = dataclasses.replace(config, clip_low=config.clip_high, clip_high=config.clip_low)
    return policy_loss(logprobs_BS, sampling_BS, advantages_B, config, mask_BS, **others)


def mean_over_padding(logprobs_BS, sampling_BS, advantages_B, config, mask_BS=None, **others):
    """Broken: divide the log-ratio of a segment by the length of its row."""
    if config.importance_sampling_level == "sequence" and mask_BS is not None:
        mask_B1 = mask_BS.any(1, keepdim=True)
        sampling_BS = torch.where(mask_BS, sampling_BS, logprobs_BS.detach())
        mask_BS = mask_BS | mask_B1
    return policy_loss(logprobs_BS, sampling_BS, advantages_B, config, mask_BS, **others)


def clips_against_the_sampler(logprobs_BS, sampling_BS, advantages_B, config, mask_BS=None, **o):
    """Broken: with a cap, count the clip from the policy that sampled."""
    if config.importance_cap:
        o["proximal_logprobs_BS"] = sampling_BS
    return policy_loss(logprobs_BS, sampling_BS, advantages_B, config, mask_BS, **o)


def reads_masked(logprobs_BS, sampling_BS, advantages_B, config, mask_BS=None, **others):
    """Broken: mask after the exponential, an infinite ratio times zero."""
    loss_BS, metrics = policy_loss(logprobs_BS, sampling_BS, advantages_B, config, **others)
    return PolicyLoss(loss_BS * (1.0 if mask_BS is None else mask_BS), metrics)


def recomputed(logprobs_BS, sampling_BS, advantages_B, config, mask_BS=None, **others):
    """Broken: take the ratio against itself, always 1, so stale samples are never corrected or clipped."""
    return policy_loss(logprobs_BS, logprobs_BS.detach(), advantages_B, config, mask_BS, **others)


BROKEN = {
    "wrong side": wrong_side,
    "no clip": altered(clip_low=1.0, clip_high=1e9),
    "swapped bounds": swapped_bounds,
    "reads masked": reads_masked,
    "recomputed": recomputed,
    "no delta": altered(delta=0.0),
    "no cap": altered(importance_cap=1e9),
    "always by token": altered(importance_sampling_level=RatioLevel.TOKEN),
    "always clipped": altered(loss_type=LossType.CLIP),
    "no divergence": altered(beta=0.0),
    "mean over padding": mean_over_padding,
    "clips against the sampler": clips_against_the_sampler,
}


@pytest.mark.parametrize("name", BROKEN)
def test_contract_finds_broken_policy_loss(name):
    """Each mistake others have made is found."""
    with pytest.raises(AssertionError):
        check_policy_loss(BROKEN[name])


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
        loss_B1, _ = policy_loss(logprobs_B1, logprobs_B1.detach(), advantages_B, SYMMETRIC)
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
    config=losses,
    later=st.booleans(),
)
def test_any_log_ratio_has_a_finite_gradient(log_ratios, advantage, config, later):
    """Whatever the settings, and also where exp overflows: loss, gradient and metrics are finite."""
    log_ratio_BS = torch.tensor([log_ratios])
    logprobs_BS = torch.full_like(log_ratio_BS, -1.0).requires_grad_()
    old_BS = -1.0 - log_ratio_BS
    loss_BS, metrics = policy_loss(
        logprobs_BS,
        old_BS.clamp(-300, 300) if later else old_BS,
        torch.tensor([advantage]),
        config,
        proximal_logprobs_BS=old_BS if later else None,
        reference_logprobs_BS=old_BS.flip(1),
    )
    (gradient_BS,) = torch.autograd.grad(loss_BS.sum(), logprobs_BS)
    assert loss_BS.isfinite().all() and gradient_BS.isfinite().all()
    assert all(value.isfinite() for value in metrics)


@given(
    log_ratios=st.lists(off_policy, min_size=1, max_size=6),
    advantage=st.sampled_from([-2.0, -1.0, 0.0, 1.0]),
)
def test_the_gradient_of_any_log_ratio(log_ratios, advantage):
    """It is exactly 0 where the clip decides and beyond 20 nats, and elsewhere -ratio * advantage."""
    log_ratio_BS = torch.tensor([log_ratios])
    logprobs_BS = torch.full_like(log_ratio_BS, -1.0).requires_grad_()
    old_BS = -1.0 - log_ratio_BS
    loss_BS, _ = policy_loss(logprobs_BS, old_BS, torch.tensor([advantage]), PolicyLossConfig())
    (gradient_BS,) = torch.autograd.grad(loss_BS.sum(), logprobs_BS)
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
            logprobs_BS, torch.full((1, 1), -nats), torch.tensor([-1.0]), SYMMETRIC
        )
        loss_BS.sum().backward()
        assert float(logprobs_BS.grad) == pytest.approx(expected, rel=1e-4)  # float32 exp
        assert float(metrics.ratio_max) == pytest.approx(math.exp(min(nats, 20)), rel=1e-4)


@given(seed=seeds, shape=shapes)
def test_metrics_are_means_over_the_produced_tokens(seed, shape):
    """The largest ratio, the share that is clipped and mean(rho - 1 - log rho), of the tokens under the mask alone."""
    logprobs_BS = -2 * torch.rand(shape, generator=numbers(seed))
    sampling_BS = -2 * torch.rand(shape, generator=numbers(seed + 1))
    advantages_B = torch.randn(shape[0], generator=numbers(seed + 2))
    mask_BS = torch.rand(shape, generator=numbers(seed + 3)) < 0.6
    _, metrics = policy_loss(logprobs_BS, sampling_BS, advantages_B, PolicyLossConfig(), mask_BS)
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


@pytest.mark.parametrize("advantage, clipped", [(-1.0, 1), (0.0, 0), (1.0, 1)])
def test_nothing_is_clipped_of_an_advantage_of_zero(advantage, clipped):
    """No bound decides a loss that is 0 at any ratio, so such a token is not in the share."""
    sampling_BS = torch.tensor([[-4.0, -5.0]])
    config = PolicyLossConfig(delta=2.0)
    # a ratio of e^3, above both bounds
    _, metrics = policy_loss(sampling_BS + 3, sampling_BS, torch.tensor([advantage]), config)
    assert float(metrics.clip_share) == clipped


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


class TRLMode(NamedTuple):
    """A loss of trl, and the settings of ours that mean the same."""

    loss_type: str
    config: PolicyLossConfig
    epsilon_high: float
    """In trl the bound itself for CISPO, the distance from 1 for the others."""
    level: str = "token"
    delta: float | None = None
    beta: float = 0.0


def trl_modes():
    """Return every loss that trl and this package both have."""
    config = PolicyLossConfig(clip_low=0.15, clip_high=0.3)

    def clipped(loss_type, level="token", delta=None, beta=0.0, **changes):
        ours = dataclasses.replace(
            config,
            importance_sampling_level=RatioLevel(level),
            delta=delta or 0.0,
            beta=beta,
            **changes,
        )
        return TRLMode(loss_type, ours, 0.3, level, delta, beta)

    cispo = dataclasses.replace(config, loss_type=LossType.CISPO, clip_low=1.0)
    return {
        "grpo": clipped("grpo", aggregation=Aggregation.SEQUENCE),
        "bnpo": clipped("bnpo"),
        "dr_grpo": clipped("dr_grpo", aggregation=Aggregation.CONSTANT),
        "dapo": clipped("dapo"),
        "cispo": TRLMode("cispo", cispo, 1.3),
        "cispo with beta": TRLMode("cispo", dataclasses.replace(cispo, beta=0.1), 1.3, beta=0.1),
        "gspo": clipped("grpo", "sequence", aggregation=Aggregation.SEQUENCE),
        "gspo, token mean": clipped("dapo", "sequence"),
        "two-sided": clipped("grpo", delta=1.5, aggregation=Aggregation.SEQUENCE),
        "two-sided gspo": clipped("grpo", "sequence", delta=1.4, aggregation=Aggregation.SEQUENCE),
        "with beta": clipped("grpo", beta=0.04, aggregation=Aggregation.SEQUENCE),
        "dr_grpo with beta": clipped("dr_grpo", beta=0.04, aggregation=Aggregation.CONSTANT),
    }


TRL_MODES = trl_modes()


def trl_trainer(logprobs_BS, mode, length, weighted):
    """Return what trl's method reads of its trainer, with log-probabilities in place of a model."""
    return SimpleNamespace(
        aux_loss_enabled=False,
        use_vllm=weighted,
        vllm_importance_sampling_correction=weighted,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            logprobs_BS,
            torch.zeros_like(logprobs_BS),
            None,
        ),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=mode.level,
        beta=mode.beta,
        loss_type=mode.loss_type,
        epsilon_low=mode.config.clip_low,
        epsilon_high=mode.epsilon_high,
        max_completion_length=length,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(
            delta=mode.delta, use_bias_correction_kl=False, steps_per_generation=1
        ),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            gather=lambda tensor: tensor,
            reduce=lambda tensor, reduction: tensor,
            num_processes=1,
        ),
        _metrics={"train": defaultdict(list)},
    )


@pytest.mark.parametrize("name", TRL_MODES)
@settings(max_examples=25)
@given(seed=seeds, shape=shapes, cap=st.sampled_from([0.0, 0.9, 2.0]))
def test_loss_and_gradient_are_those_of_trl(compute_loss_of_trl, name, seed, shape, cap):
    """In each mode, with and without truncated importance sampling: loss, gradient, and the share that is clipped."""
    mode = TRL_MODES[name]
    config = dataclasses.replace(mode.config, importance_cap=cap)
    B, S = 2 * shape[0], shape[1]
    logprobs_BS = -2 * torch.rand(B, S, generator=numbers(seed))
    old_BS = logprobs_BS + 0.4 * torch.randn(B, S, generator=numbers(seed + 1))
    sampling_BS = old_BS
    if cap:
        sampling_BS = old_BS + 0.4 * torch.randn(B, S, generator=numbers(seed + 5))
    reference_BS = logprobs_BS + 0.4 * torch.randn(B, S, generator=numbers(seed + 4))
    advantages_B = advantages(torch.rand(shape[0], 2, generator=numbers(seed + 2))).flatten()
    mask_BS = torch.rand(B, S, generator=numbers(seed + 3)) < 0.6
    mask_BS[:, 0] = True  # trl counts a row without a token as a sample
    length = S + 3

    ours_BS = logprobs_BS.clone().requires_grad_()
    loss_BS, metrics = policy_loss(
        ours_BS, sampling_BS, advantages_B, config, mask_BS, old_BS, reference_BS
    )
    total = denominator(mask_BS, config.aggregation, length)
    loss = aggregate(loss_BS, mask_BS, config.aggregation, total)
    loss.backward()

    theirs_BS = logprobs_BS.clone().requires_grad_()
    trainer = trl_trainer(theirs_BS, mode, length, bool(cap))
    no_prompt = torch.zeros(B, 0, dtype=torch.int64)
    inputs = {
        "prompt_ids": no_prompt,
        "prompt_mask": no_prompt,
        "completion_ids": torch.zeros(B, S, dtype=torch.int64),
        "completion_mask": mask_BS.long(),
        "advantages": advantages_B,
        "old_per_token_logps": old_BS,
        "ref_per_token_logps": reference_BS,
        "num_items_in_batch": mask_BS.sum(),
        "importance_sampling_ratio": (old_BS - sampling_BS).exp().clamp(max=cap),
    }
    expected = compute_loss_of_trl(trainer, None, inputs)
    expected.backward()
    # float32 sums of at most 108 numbers of size 1
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours_BS.grad, theirs_BS.grad, atol=1e-6, rtol=1e-4)
    if mode.beta:
        (divergence,) = trainer._metrics["train"]["kl"]
        assert float(metrics.reference_kl) == pytest.approx(divergence, rel=1e-4, abs=1e-6)
    if mode.level == "token" and mode.loss_type != "cispo" and not mode.delta:
        # of CISPO trl counts only positive advantages, of segments it weighs each alike
        (clipped,) = trainer._metrics["train"]["clip_ratio/region_mean"]
        assert float(metrics.clip_share) == pytest.approx(clipped, abs=1e-6)


@given(seed=seeds, shape=shapes, config=losses)
def test_a_split_by_rows_changes_nothing(seed, shape, config):
    """Each row alone, as micro-batches and workers get them: the losses and gradients of the whole batch, bit for bit."""
    generator = numbers(seed)
    parts = [-2 * torch.rand(shape, generator=generator) for _ in range(4)]
    advantages_B = torch.randn(shape[0], generator=generator)
    mask_BS = torch.rand(shape, generator=generator) < 0.7

    def computed(rows):
        new_BS, sampling_BS, proximal_BS, reference_BS = (part[rows] for part in parts)
        new_BS = new_BS.clone().requires_grad_()
        loss_BS, _ = policy_loss(
            new_BS,
            sampling_BS,
            advantages_B[rows],
            config,
            mask_BS[rows],
            proximal_BS,
            reference_BS,
        )
        (gradient_BS,) = torch.autograd.grad(loss_BS.sum(), new_BS)
        return torch.stack([loss_BS.detach(), gradient_BS])

    whole = computed(slice(None))
    rows = torch.cat([computed(slice(b, b + 1)) for b in range(shape[0])], 1)
    assert torch.equal(whole, rows)


@given(seed=seeds, shape=shapes)
def test_uninformative_batch_leaves_no_gradient(seed, shape):
    """When every group has equal rewards, the gradient is exactly zero, so the step can be skipped."""
    rewards_PG = torch.full((shape[0], 4), 0.1)
    logprobs_BS = -torch.rand(shape[0] * 4, shape[1], generator=numbers(seed))
    logprobs_BS.requires_grad_()
    loss_BS, _ = policy_loss(
        logprobs_BS, logprobs_BS.detach() - 0.1, advantages(rewards_PG).flatten(), SYMMETRIC
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
        dataclasses.replace(SYMMETRIC, importance_cap=cap),
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
        dataclasses.replace(SYMMETRIC, importance_cap=2.0),
        proximal_logprobs_BS=proximal_BS,
    )
    # E^0.1 is inside the clip.
    torch.testing.assert_close(loss_BS, torch.full(shape, -2 * 1.1051709), atol=1e-5, rtol=0)
