"""Contracts of the reinforcement components: properties that any implementation must have (paper 3.2 to 3.4).

Each `check_*` takes a callable with the signature of ours, draws its own examples, and raises AssertionError
with the smallest counterexample that hypothesis finds. Hand it your own loss, controller or detector.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from minglm.config.posttraining import (
    Aggregation,
    DynamicTemperatureConfig,
    LossType,
    PolicyLossConfig,
    RatioLevel,
)
from minglm.model.glm import GLM, Output
from minglm.rl.gap import Gap
from minglm.rl.losses import PolicyLoss
from minglm.rl.temperature import Decision, TemperatureController
from minglm.testing.model import tiny_model
from minglm.testing.strategies import holds, numbers, seeds, shapes

Aggregate = Callable[[Tensor, Tensor, str, int], Tensor]
"""(loss_BS, mask_BS, mode, denominator) -> scalar."""
Advantages = Callable[[Tensor, bool, Tensor], Tensor]
"""(rewards_PG, normalize_std, valid_PG) -> advantages of axes P, G."""
Loss = Callable[..., PolicyLoss]
"""(logprobs_BS, sampling_logprobs_BS, advantages_B, config, mask_BS, proximal_logprobs_BS,
reference_logprobs_BS) -> PolicyLoss; the last two are left out where they are None."""
MeasureGap = Callable[[Tensor], Gap]
"""(log_ratios_T) -> Gap."""
Replay = Callable[[GLM, Tensor, Tensor | None], Output]
"""(model, tokens_BS, imposed_BSLK or None) -> Output."""
Detect = Callable[[str, str], Mapping[str, bool]]
"""(text, language) -> {fault: whether it is there}."""

LENGTH = 7  # bound on the tokens of a sample, for the aggregation `constant`


def check_aggregation(aggregate: Aggregate) -> None:
    """Check a function like `minglm.rl.aggregation.aggregate`.

    It computes the formula of each mode, and pieces of the batch add up to the whole. Masked losses are never
    read. A batch without any target gives zero and a zero gradient.
    """
    _check_formula_and_pieces(aggregate)
    _check_batch_without_targets(aggregate)


class _Expected(NamedTuple):
    """An aggregated loss by its definition."""

    value: float
    denominator: int


def _aggregated(loss_BS: Tensor, mask_BS: Tensor, mode: str) -> _Expected:
    """Compute an aggregated loss in plain Python."""
    rows = []
    for losses, mask in zip(loss_BS.tolist(), mask_BS.tolist(), strict=True):
        row = [loss for loss, counts in zip(losses, mask, strict=True) if counts]
        if row:
            rows.append(row)
    if mode == Aggregation.TOKEN:
        denominator = sum(map(len, rows))
    elif mode in (
        Aggregation.SEQUENCE,
        Aggregation.PROMPT,
    ):  # each row is a trajectory, and a prompt
        denominator = len(rows)
    else:
        denominator = LENGTH * len(rows)
    total = 0.0
    for row in rows:
        is_mean = mode in (Aggregation.SEQUENCE, Aggregation.PROMPT)
        total += sum(row) / len(row) if is_mean else sum(row)
    return _Expected(total / max(1, denominator), denominator)


def _check_formula_and_pieces(aggregate: Aggregate) -> None:
    @holds(seed=seeds, shape=shapes, mode=st.sampled_from(list(Aggregation)), cut=st.integers(0, 6))
    def formula_and_pieces(seed: int, shape: tuple[int, int], mode: str, cut: int) -> None:
        """Compare with the formula, for the whole batch and for the sum of two pieces of it."""
        loss_BS = torch.randn(shape, generator=numbers(seed))
        mask_BS = torch.rand(shape, generator=numbers(seed + 1)) < 0.6
        loss_BS[~mask_BS] = math.nan
        expected = _aggregated(loss_BS, mask_BS, mode)

        whole = float(aggregate(loss_BS, mask_BS, mode, expected.denominator))
        pieces = 0.0
        for rows in (slice(None, cut), slice(cut, None)):
            if len(mask_BS[rows]):
                piece = aggregate(loss_BS[rows], mask_BS[rows], mode, expected.denominator)
                pieces += float(piece)
        # float32 sums of at most 54 numbers of size 1
        assert math.isclose(whole, expected.value, abs_tol=1e-5)
        assert math.isclose(pieces, expected.value, abs_tol=1e-5), (
            f"the batch cut at row {cut} gives {pieces}, not {expected.value}"
        )


def _check_batch_without_targets(aggregate: Aggregate) -> None:
    @holds(shape=shapes, mode=st.sampled_from(list(Aggregation)))
    def batch_without_targets(shape: tuple[int, int], mode: str) -> None:
        """Mask everything: exactly zero, with zero gradient."""
        loss_BS = torch.ones(shape, requires_grad=True)
        value = aggregate(loss_BS * 2, torch.zeros(shape, dtype=torch.bool), mode, 0)
        (gradient_BS,) = torch.autograd.grad(value, loss_BS)
        assert value.item() == 0 and not gradient_BS.any()


def check_advantages(advantages: Advantages) -> None:
    """Check a function like `minglm.rl.grpo.advantages`.

    Its values sum to zero in each group, and ignore other groups and the level of the rewards. They are
    exactly zero in a group of equal rewards. A sample that is not valid has no influence.
    """
    _check_comparison_within_groups(advantages)
    _check_equal_rewards(advantages)


def _check_comparison_within_groups(advantages: Advantages) -> None:
    @holds(
        seed=seeds, shape=st.tuples(st.integers(1, 5), st.integers(2, 9)), normalize=st.booleans()
    )
    def comparison_within_groups(seed: int, shape: tuple[int, int], normalize: bool) -> None:
        """Check the sum, and that other groups, a constant, and (with the division) a factor do not matter."""
        rewards_PG = torch.rand(shape, generator=numbers(seed)).round(decimals=1)
        valid_PG = torch.rand(shape, generator=numbers(seed + 1)) < 0.8
        values_PG = advantages(rewards_PG, normalize, valid_PG)
        assert values_PG.shape == rewards_PG.shape
        # nine float32 numbers of size up to 3
        assert values_PG.sum(1).abs().max() < 1e-5, "advantages of a group must sum to zero"
        assert not values_PG[~valid_PG].any(), "a sample that is not valid must get zero"

        rescaled_PG = 3 * rewards_PG + 1 if normalize else rewards_PG + 1
        moved_PG = advantages(rescaled_PG, normalize, valid_PG)
        # epsilon against a deviation of 0.03
        torch.testing.assert_close(moved_PG, values_PG, atol=1e-4, rtol=0)
        for rewards_G, values_G, valid_G in zip(rewards_PG, values_PG, valid_PG, strict=True):
            if valid_G.any():
                _check_group_alone(advantages, rewards_G[valid_G], values_G[valid_G], normalize)


def _check_group_alone(
    advantages: Advantages, rewards_G: Tensor, values_G: Tensor, normalize: bool
) -> None:
    """Check that a group of valid samples gets the same float32 values (G) without the rest of the batch."""
    everything_1G = torch.ones_like(rewards_G, dtype=torch.bool)[None]
    alone_G = advantages(rewards_G[None], normalize, everything_1G)[0]
    torch.testing.assert_close(values_G, alone_G, atol=1e-5, rtol=0)
    if rewards_G.max() == rewards_G.min():
        return
    if normalize:
        deviation = float(alone_G.std())
        assert math.isclose(deviation, 1.0, abs_tol=1e-3), "normalised to deviation one"
    else:
        centred_G = rewards_G - rewards_G.mean()
        torch.testing.assert_close(alone_G, centred_G, atol=1e-6, rtol=0)


def _check_equal_rewards(advantages: Advantages) -> None:
    @holds(
        reward=st.floats(0, 1, width=32),
        shape=st.tuples(st.integers(1, 3), st.integers(1, 9)),
        normalize=st.booleans(),
    )
    def equal_rewards(reward: float, shape: tuple[int, int], normalize: bool) -> None:
        """Give every sample one reward: exactly zero, although the float mean may differ from the reward."""
        rewards_PG = torch.full(shape, reward)
        values_PG = advantages(rewards_PG, normalize, torch.ones(shape, dtype=torch.bool))
        assert not values_PG.any(), "a group of equal rewards must get exactly zero"


def check_policy_loss(policy_loss: Loss) -> None:
    """Check a function like `minglm.rl.losses.policy_loss`.

    Under any settings its values and gradients are those of the definition, in float64 and plain Python. On
    policy its gradient is REINFORCE's, the ratio is exactly 1 and the divergence 0. The clip removes the
    gradient exactly where the policy has already gone too far in the direction of the advantage. Masked
    tokens never matter.
    """
    _check_definition(policy_loss)
    _check_reinforce(policy_loss)
    _check_clip(policy_loss)
    _check_dual_clip(policy_loss)
    _check_masked_tokens(policy_loss)


losses = st.builds(
    PolicyLossConfig,
    loss_type=st.sampled_from(LossType),
    importance_sampling_level=st.sampled_from(RatioLevel),
    clip_low=st.floats(0.01, 0.5),
    clip_high=st.floats(0.01, 0.5),
    importance_cap=st.sampled_from([0.0, 0.8, 2.0]),
    beta=st.sampled_from([0.0, 0.04, 1.0]),
)
"""Settings of a policy loss; `delta` is drawn by the checks that use it, because it excludes some of them."""


class _TokenLosses(NamedTuple):
    """Losses of the tokens of a segment and the gradient of their sum, by the definition."""

    values: list[float]
    gradient: list[float]
    at_an_edge: bool
    """Whether a ratio lies so close to a bound that rounding decides."""


def _defined(
    logprobs: list[float],
    sampled: list[float],
    proximal: list[float] | None,
    reference: list[float],
    advantage: float,
    config: PolicyLossConfig,
) -> _TokenLosses:
    """Compute the losses of one segment, all of whose tokens count, in plain Python."""
    old = sampled
    if config.importance_cap:
        old = logprobs if proximal is None else proximal
    logs = [new - before for new, before in zip(logprobs, old, strict=True)]
    by_segment = config.importance_sampling_level == RatioLevel.SEQUENCE
    if by_segment:
        logs = [sum(logs) / len(logs)] * len(logs)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    values = []
    through_ratio = []  # d loss / d log rho, for each token
    gradient = [0.0] * len(logs)
    bounds = {low, high, config.delta}
    at_an_edge = False
    for t, log in enumerate(logs):
        ratio = math.exp(log)
        weight = 1.0
        if config.importance_cap:
            correction = math.exp(old[t] - sampled[t])
            weight = min(correction, config.importance_cap)
        at_an_edge |= any(abs(ratio - bound) < 1e-4 for bound in bounds)
        if config.loss_type == LossType.CISPO:
            factor = min(max(ratio, low), high) * advantage * weight
            values.append(-factor * logprobs[t])
            through_ratio.append(0.0)
            gradient[t] -= factor
        else:
            stopped = ratio > high if advantage > 0 else ratio < low
            stopped |= bool(config.delta) and advantage < 0 and ratio > config.delta
            loss = -min(ratio * advantage, min(max(ratio, low), high) * advantage)
            if config.delta and advantage < 0:
                loss = min(loss, -config.delta * advantage)
            values.append(loss * weight)
            through_ratio.append(0.0 if stopped else -ratio * advantage * weight)
        if config.beta:
            gap = reference[t] - logprobs[t]
            values[t] += config.beta * (math.exp(gap) - 1 - gap)
            gradient[t] += config.beta * (1 - math.exp(gap))
    if by_segment:  # the ratio depends on every token, by 1 / their number
        through_ratio = [sum(through_ratio) / len(logs)] * len(logs)
    gradient = [direct + by_ratio for direct, by_ratio in zip(gradient, through_ratio, strict=True)]
    return _TokenLosses(values, gradient, at_an_edge)


def _check_definition(policy_loss: Loss) -> None:
    @holds(
        shrink=False,
        seed=seeds,
        shape=shapes,
        config=losses,
        delta=st.sampled_from([0.0, 1.6, 2.0]),
        later=st.booleans(),
    )
    def definition(
        seed: int, shape: tuple[int, int], config: PolicyLossConfig, delta: float, later: bool
    ) -> None:
        """Compare every token's loss, and the gradient of their sum, with the definition."""
        if config.loss_type == LossType.CLIP:
            config = dataclasses.replace(config, delta=delta)
        generator = numbers(seed)
        logprobs_BS = -2 * torch.rand(shape, generator=generator)
        near = [logprobs_BS + 0.5 * torch.randn(shape, generator=generator) for _ in range(3)]
        sampling_BS, proximal_BS, reference_BS = near
        advantages_B = torch.randn(shape[0], generator=generator)
        mask_BS = torch.rand(shape, generator=generator) < 0.7
        logprobs_BS.requires_grad_()
        loss_BS, metrics = policy_loss(
            logprobs_BS,
            sampling_BS,
            advantages_B,
            config,
            mask_BS,
            proximal_logprobs_BS=proximal_BS if later else None,
            reference_logprobs_BS=reference_BS if config.beta else None,
        )
        (gradient_BS,) = torch.autograd.grad(loss_BS.sum(), logprobs_BS)
        assert int(metrics.tokens) == int(mask_BS.sum())
        for b in range(shape[0]):
            mask_S = mask_BS[b]
            parts = [part[b][mask_S].tolist() for part in (logprobs_BS.detach(), *near)]
            if not parts[0]:
                continue
            new, sampled, proximal, reference = parts
            expected = _defined(
                new,
                sampled,
                proximal if later else None,
                reference,
                float(advantages_B[b]),
                config,
            )
            if expected.at_an_edge:
                continue
            # float32 exponentials of numbers up to 3, times advantages up to 4
            for found_BS, wanted in (
                (loss_BS, expected.values),
                (gradient_BS, expected.gradient),
            ):
                torch.testing.assert_close(
                    found_BS[b][mask_S].detach(), torch.tensor(wanted), atol=1e-4, rtol=1e-4
                )


def _check_reinforce(policy_loss: Loss) -> None:
    @holds(seed=seeds, arms=st.integers(2, 6), baseline=st.floats(-1, 1))
    def reinforce(seed: int, arms: int, baseline: float) -> None:
        """Sum over the arms of a small bandit, weighted by probability: the gradient of minus the reward."""
        scores_V = torch.randn(arms, generator=numbers(seed)).double().requires_grad_()
        rewards_V = torch.rand(arms, generator=numbers(seed + 1)).double()
        logprobs_V = scores_V.log_softmax(0)
        # Each arm is a sequence of one token.
        logprobs_B1 = logprobs_V[:, None]
        loss_B1, metrics = policy_loss(
            logprobs_B1, logprobs_B1.detach(), rewards_V - baseline, PolicyLossConfig(), None
        )
        expected_loss = (loss_B1[:, 0] * logprobs_V.detach().exp()).sum()
        (gradient_V,) = torch.autograd.grad(expected_loss, scores_V, retain_graph=True)
        expected_reward = (rewards_V * logprobs_V.exp()).sum()
        (true_V,) = torch.autograd.grad(-expected_reward, scores_V)
        torch.testing.assert_close(gradient_V, true_V, atol=1e-6, rtol=1e-5)  # the loss is float32
        assert float(metrics.ratio_max) == 1
        assert float(metrics.kl) == 0
        assert float(metrics.clip_share) == 0


def _check_clip(policy_loss: Loss) -> None:
    @holds(
        shift=st.floats(-1, 1),
        advantage=st.floats(-2, 2),
        low=st.floats(0.05, 0.4),
        high=st.floats(0.05, 0.4),
    )
    def clip(shift: float, advantage: float, low: float, high: float) -> None:
        """Expect -ratio * advantage, or zero beyond the clip on the side that the advantage pushes to."""
        ratio = math.exp(shift)
        if min(abs(ratio - 1 - high), abs(ratio - 1 + low), abs(advantage)) < 1e-3:
            return  # at the edge, rounding decides
        config = PolicyLossConfig(clip_low=low, clip_high=high)
        logprobs_BS = torch.tensor([[shift - 2.0]], requires_grad=True)
        loss_BS, metrics = policy_loss(
            logprobs_BS, torch.tensor([[-2.0]]), torch.tensor([advantage]), config, None
        )
        (gradient_BS,) = torch.autograd.grad(loss_BS.sum(), logprobs_BS)
        stopped = ratio > 1 + high if advantage > 0 else ratio < 1 - low
        expected = 0.0 if stopped else -ratio * advantage
        assert math.isclose(float(gradient_BS), expected, abs_tol=1e-5), (
            f"ratio {ratio}, advantage {advantage}"
        )
        assert float(metrics.clip_share) == stopped


def _check_dual_clip(policy_loss: Loss) -> None:
    @holds(shift=st.floats(-1, 2), advantage=st.floats(-2, 2), delta=st.floats(1.5, 3))
    def dual_clip(shift: float, advantage: float, delta: float) -> None:
        """Expect a loss of at most -delta * advantage where that is positive, and no gradient beyond."""
        ratio = math.exp(shift)
        if abs(ratio - delta) < 1e-3 or abs(advantage) < 1e-3:
            return  # at the edge, rounding decides
        config = PolicyLossConfig(delta=delta)
        logprobs_BS = torch.tensor([[shift - 2.0]], requires_grad=True)
        arguments = (torch.tensor([[-2.0]]), torch.tensor([advantage]))
        loss_BS, metrics = policy_loss(logprobs_BS, *arguments, config, None)
        plain_BS, _ = policy_loss(logprobs_BS, *arguments, PolicyLossConfig(), None)
        bound = -delta * advantage if advantage < 0 else math.inf
        expected = min(float(plain_BS.detach()), bound)
        assert math.isclose(float(loss_BS.detach()), expected, abs_tol=1e-5), f"ratio {ratio}"
        if advantage < 0 and ratio > delta:
            (gradient_BS,) = torch.autograd.grad(loss_BS.sum(), logprobs_BS)
            assert not gradient_BS.any(), "a token beyond delta has a gradient"
            assert float(metrics.clip_share) == 1


def _check_masked_tokens(policy_loss: Loss) -> None:
    garbage = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1e30])

    @holds(seed=seeds, shape=shapes, value=garbage)
    def masked_tokens(seed: int, shape: tuple[int, int], value: float) -> None:
        """Put garbage at masked positions: bit-equal loss, gradient and metrics, and no gradient there."""
        generator = numbers(seed)
        logprobs_BS = -torch.rand(shape, generator=generator)
        sampling_logprobs_BS = -torch.rand(shape, generator=generator)
        advantages_B = torch.randn(shape[0], generator=generator)
        mask_BS = torch.rand(shape, generator=generator) < 0.5
        results = []
        for fill in (-0.5, value):
            filled_BS = logprobs_BS.masked_fill(~mask_BS, fill).requires_grad_()
            sampling_BS = sampling_logprobs_BS.masked_fill(~mask_BS, fill)
            loss_BS, metrics = policy_loss(
                filled_BS, sampling_BS, advantages_B, PolicyLossConfig(), mask_BS
            )
            loss = loss_BS[mask_BS].sum() + 0 * loss_BS[~mask_BS].sum()
            (gradient_BS,) = torch.autograd.grad(loss, filled_BS)
            assert not gradient_BS[~mask_BS].any(), "a masked token has a gradient"
            scalars = torch.stack([metrics.ratio_max, metrics.clip_share, metrics.kl])
            results.append((loss_BS[mask_BS], gradient_BS, scalars))
        torch.testing.assert_close(results[1], results[0], atol=0, rtol=0)


def check_gap(measure_gap: MeasureGap) -> None:
    """Check a function like `minglm.rl.gap.measure_gap`: its definition in plain Python, and no number that is negative."""

    @holds(
        log_ratios=st.lists(st.floats(-2, 2, width=32), max_size=300),
        scale=st.sampled_from([1.0, 1e-3, 1e-6]),
    )
    def definition(log_ratios: list[float], scale: float) -> None:
        """Compute each number from a sorted list."""
        d_T = torch.tensor(log_ratios) * scale
        found = measure_gap(d_T)
        values = d_T.double().tolist()
        sizes = sorted(abs(value) for value in values) or [0.0]
        kl = math.fsum(math.expm1(value) - value for value in values) / max(1, len(values))
        expected = Gap(
            mean=math.fsum(sizes) / len(sizes),
            p99=next(x for n, x in enumerate(sizes, 1) if 100 * n >= 99 * len(sizes)),
            worst=sizes[-1],
            kl=kl,
        )
        # Sums of float64 numbers in another order; the KL of tiny differences is a difference of nearly equal numbers.
        for name, one, other in zip(Gap._fields, found, expected, strict=True):
            assert math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-15), f"{name}: {one}, {other}"


def check_routing_replay(hidden: Replay) -> None:
    """Check a forward pass with imposed experts, like `GLM.hidden` of tokens (B, S) with int experts (B, S, L, K).

    A model's own choices, imposed, change no bit of its states. Experts that another choice would take are
    computed with the weights that the model's own scores give them, and the router learns from them. Rows of
    -1 leave the choice free.
    """

    @holds(seed=seeds, B=st.integers(1, 3), S=st.integers(2, 7), known=st.integers(0, 7))
    def own_choices(seed: int, B: int, S: int, known: int) -> None:
        """Impose what the model chose, at the first `known` positions."""
        model = tiny_model(seed)
        tokens_BS = torch.randint(0, 24, (B, S), generator=numbers(seed))
        free = hidden(model, tokens_BS, None)
        chosen_BSLK = _choices(free, B)
        imposed_BSLK = chosen_BSLK.clone()
        imposed_BSLK[:, known:] = -1
        replayed = hidden(model, tokens_BS, imposed_BSLK)
        assert torch.equal(replayed.hidden_BSD, free.hidden_BSD), "the model's own choices"
        assert torch.equal(_choices(replayed, B), chosen_BSLK)
        assert _replaced(replayed) == 0

    @holds(seed=seeds, B=st.integers(1, 3), S=st.integers(1, 6))
    def other_choices(seed: int, B: int, S: int) -> None:
        """Impose on every token what a selection bias would force it to choose."""
        model = tiny_model(seed)
        config = model.config
        layers = config.num_hidden_layers - config.first_k_dense_replace
        tokens_BS = torch.randint(0, 24, (B, S), generator=numbers(seed))
        orders = torch.rand(layers, config.n_routed_experts, generator=numbers(seed + 1)).argsort(1)
        imposed_LK = orders[:, : config.num_experts_per_tok]
        imposed_BSLK = imposed_LK.expand(B, S, -1, -1).to(torch.int16)
        out = hidden(model, tokens_BS, imposed_BSLK)
        out.hidden_BSD.sum().backward()
        found = [router.weight.grad for router in model.routers()[:layers]]

        model.zero_grad()
        for router, order_E in zip(model.routers(), orders, strict=False):
            with torch.no_grad():  # scores lie between 0 and 1
                router.e_score_correction_bias[order_E] = -10.0 * torch.arange(len(order_E))
        forced = hidden(model, tokens_BS, None)
        forced.hidden_BSD.sum().backward()
        assert torch.equal(out.hidden_BSD, forced.hidden_BSD), "the imposed experts and weights"
        for gradient, router in zip(found, model.routers(), strict=False):
            assert gradient is not None and router.weight.grad is not None
            assert torch.equal(gradient, router.weight.grad), "the router's gradient"
        assert 0 <= _replaced(out) <= imposed_BSLK.numel()


def _choices(out: Output, batch: int) -> Tensor:
    """Return what the routers of a pass chose: int16 of axes B, S, L, K."""
    chosen_TLK = torch.stack([routing.experts_TK for routing in out.routing], 1)
    return chosen_TLK.unflatten(0, (batch, -1)).to(torch.int16)


def _replaced(out: Output) -> int:
    """Count the choices that imposed ones replaced."""
    counts = [routing.replaced for routing in out.routing]
    return sum(int(count) for count in counts if count is not None)


def check_pass_at_k(pass_at_k: Callable[[int, int, int], float]) -> None:
    """Check a function (n, c, k) -> share of the k-subsets of n answers, c of them right, that hold a right one."""

    @holds(n=st.integers(1, 9), c=st.integers(0, 9), k=st.integers(1, 9))
    def enumeration(n: int, c: int, k: int) -> None:
        """Compare with the enumeration of all subsets."""
        c = min(c, n)
        k = min(k, n)
        subsets = list(itertools.combinations(range(n), k))
        share = sum(min(subset) < c for subset in subsets) / len(subsets)
        assert math.isclose(pass_at_k(n, c, k), share, abs_tol=1e-12), (
            f"pass@{k} of {c} right among {n}"
        )


Choose = Callable[[Mapping[float, Sequence[float]], float, DynamicTemperatureConfig], Decision]
"""(scores of each problem at each temperature, present temperature, config) -> Decision."""

PROBES = 120
"""Simulated probes of each curve. A chance of 5% shows in more than 14 of them in one of 1,000 tests."""


def _probe(
    levels: Mapping[float, float], problems: int, answers: int, generator: torch.Generator
) -> dict[float, list[float]]:
    """Draw what a probe would see: problems of all difficulties, each answered a few times at each temperature.

    levels: the logit of a problem of middle difficulty, at each temperature.
    """
    difficulty_P = 2 * torch.randn(problems, generator=generator)
    scores = {}
    for temperature, level in levels.items():
        chance_P = torch.sigmoid(level - difficulty_P)
        right_P = torch.zeros(problems)
        for _ in range(answers):
            right_P += (torch.rand(problems, generator=generator) < chance_P).float()
        scores[temperature] = (right_P / answers).tolist()
    return scores


def _true_score(level: float) -> float:
    """Return the mean score over all problems that `_probe` draws from."""
    return float(torch.sigmoid(level - 2 * torch.linspace(-5, 5, 2001)).mul(_NORMAL).sum())


_NORMAL = torch.exp(-torch.linspace(-5, 5, 2001).square() / 2)
_NORMAL = _NORMAL / _NORMAL.sum()


def check_temperature_choice(choose: Choose) -> None:
    """Check a function like `minglm.rl.temperature.choose` on simulated probes, seeded, with noise as real ones have.

    Whatever the curve, a rise that truly costs more than the drop has a chance of at most `risk`, and so has
    a fall where the present temperature costs nothing. With answers enough a flat curve is climbed, a
    temperature that costs far too much is left, and no hole is jumped over. Where nothing is ever solved,
    nothing changes.
    """
    risky = DynamicTemperatureConfig(window=2, drop=0.05, risk=0.05)
    most = 14  # of PROBES, see there
    for costs in (0.055, 0.07, 0.15):
        # one step up costs slightly more than is allowed: where a wrong rise is likeliest
        levels = {1.0: 1.0, 1.1: 1.0 - 5.2 * costs, 1.2: 0.0}
        assert 1 - _true_score(levels[1.1]) / _true_score(1.0) > risky.drop
        found = _simulate(choose, levels, risky, problems=300, answers=2)
        wrong = sum(temperature > 1.0 for temperature in found)
        assert wrong <= most, f"{wrong} of {PROBES} probes choose what costs more than the drop"

    flat = dict.fromkeys((0.8, 0.9, 1.0, 1.1, 1.2), 1.0)
    for answers in (1, 4):
        found = _simulate(choose, flat, risky, problems=100, answers=answers)
        lowered = sum(temperature < 1.0 for temperature in found)
        assert lowered <= most, (
            f"{lowered} of {PROBES} probes lower a temperature that costs nothing"
        )
    found = _simulate(choose, flat, risky, problems=600, answers=8)
    assert sum(temperature == 1.2 for temperature in found) > 0.8 * PROBES, (
        "a flat curve is climbed"
    )

    hole = flat | {1.1: -1.0}
    found = _simulate(choose, hole, risky, problems=600, answers=8)
    assert max(found) <= 1.0, "a hole in the curve is jumped over"
    cliff = flat | {1.0: -1.0, 1.1: -1.0, 1.2: -1.0}
    found = _simulate(choose, cliff, risky, problems=600, answers=8)
    assert sum(temperature == 0.9 for temperature in found) > 0.8 * PROBES, "a bad one is left"
    zero = dict.fromkeys(flat, -50.0)
    found = _simulate(choose, zero, risky, problems=300, answers=2)
    assert set(found) == {1.0}, "nothing is solved, and the temperature changes"


def _simulate(
    choose: Choose,
    levels: Mapping[float, float],
    config: DynamicTemperatureConfig,
    problems: int,
    answers: int,
) -> list[float]:
    """Return what many probes of one curve lead to, from temperature 1."""
    generator = numbers(0)
    return [
        choose(_probe(levels, problems, answers, generator), 1.0, config).temperature
        for _ in range(PROBES)
    ]


def check_plateau(controller: Callable[..., TemperatureController]) -> None:
    """Check a constructor like `TemperatureController`, with the arguments temperature and config.

    No probe is due while the reward climbs or falls, however slowly it falls. One is due as soon as two
    windows stand still, and after a decision both are filled anew. A controller restored from its JSON state
    behaves alike.
    """

    @holds(
        window=st.integers(2, 8),
        slope=st.sampled_from([-0.05, -0.01, -0.003, 0.0, 0.003, 0.05]),
        gain=st.sampled_from([0.005, 0.02]),
    )
    def plateau(window: int, slope: float, gain: float) -> None:
        """Go up or down by `slope` a step, twice, with a decision that changes nothing between the two."""
        config = DynamicTemperatureConfig(window=window, gain=gain)
        subject = controller(1.0, config)
        restored = controller(1.0, config)
        rises = slope * window > gain
        falls = slope < 0
        for _ in range(2):
            for step in range(4 * window):
                restored.load_state_dict(json.loads(json.dumps(subject.state_dict())))
                due = subject.observe(0.5 + slope * step)
                assert restored.observe(0.5 + slope * step) == due, "a restored one differs"
                full = step >= 2 * window - 1
                assert due == (full and not rises and not falls), f"step {step} of {window}"
            scores = {temperature: [0.0] for temperature in subject.grid}
            assert subject.decide(scores).temperature == subject.value == 1.0


_SENTENCES = {
    "en": """The sum of both numbers is nine
First we add three and four
So the answer is B
Let me look at the second order
It costs 12.50 and ships on Monday
def add(a, b): return a + b
Then x² grows faster than π does
1, 2, 3, 5, 8, 13""".splitlines(),
    "zh": """这两个数的和是九
首先我们把三和四相加
所以答案是 B
让我看一下第二个订单
它的价格是 12.50 元
然后我们用 Python 继续计算这个问题
最后检查结果
他住在上海附近""".splitlines(),
}
_FOREIGN = {
    "en": "然后我们继续计算",
    "zh": """and then we simply continue to compute what remains to be done here, step by step, as we did above,
    until every part of it has been found, checked twice against the numbers that were given, and written down again""",
}
_LOOP = {"en": "so we go on ", "zh": "我们继续算"}


Call = tuple[str, str]
"""Name of a function, and the value of its argument."""


def check_detectors(detect: Detect) -> None:
    """Check a function like `minglm.rewards.pathology.detect`: silent on clean turns, sure of every inserted fault."""
    _check_clean_turns(detect)
    _check_inserted_faults(detect)


def _turn(sentences: Sequence[str], thinks: bool, calls: Sequence[Call]) -> str:
    """Return a clean assistant turn of the GLM-4.5 template."""
    half = len(sentences) // 2 if thinks else 0
    reasoning = ". ".join(sentences[:half])
    content = ". ".join(sentences[half:])
    text = f"\n<think>{reasoning}</think>\n{content}"
    for name, value in calls:
        argument = f"<arg_key>text</arg_key>\n<arg_value>{value}</arg_value>"
        text += f"\n<tool_call>{name}\n{argument}\n</tool_call>"
    return text + ("<|observation|>" if calls else "<|user|>")


def _drawn_turns() -> dict[str, st.SearchStrategy[Any]]:
    """Return the strategies that a turn is drawn from."""
    names = st.sampled_from(["search", "get_order"])
    values = st.sampled_from(["Москва", "北京", "a1"])
    return {
        "language": st.sampled_from(["en", "zh"]),
        "order": st.sets(st.integers(0, 7), min_size=2).map(sorted),
        "thinks": st.booleans(),
        "calls": st.lists(st.tuples(names, values), max_size=2),
    }


def _check_clean_turns(detect: Detect) -> None:
    # Any counterexample can be read, and a detector may be slow, hence no shrinking.
    @holds(shrink=False, **_drawn_turns())
    def clean_turns(language: str, order: list[int], thinks: bool, calls: list[Call]) -> None:
        """Raise no false alarm."""
        sentences = [_SENTENCES[language][i] for i in order]
        text = _turn(sentences, thinks, calls)
        flags = detect(text, language)
        assert not any(flags.values()), (text, flags)


def _check_inserted_faults(detect: Detect) -> None:
    tags = st.sampled_from(
        [
            "<think>",
            "</think>",
            "<tool_call>",
            "</arg_value>",
            "<|assistant|>",
            "<tool_response>",
            "[gMASK]",
        ]
    )

    @holds(
        shrink=False,
        **_drawn_turns(),
        place=st.integers(0, 8),
        tag=tags,
        copies=st.integers(12, 60),
    )
    def inserted_faults(
        language: str,
        order: list[int],
        thinks: bool,
        calls: list[Call],
        place: int,
        tag: str,
        copies: int,
    ) -> None:
        """Put foreign words, a loop, and a stray tag, one at a time, between two sentences."""
        sentences = [_SENTENCES[language][i] for i in order]
        place = min(place, len(order))
        inserted = {
            "language_mixing": _FOREIGN[language],
            "repetition": _LOOP[language] * copies,
            "format": tag,
        }
        for fault, text in inserted.items():
            broken = [*sentences[:place], text, *sentences[place:]]
            turn = _turn(broken, thinks, calls)
            assert detect(turn, language)[fault], f"{fault} not found in {turn!r}"
