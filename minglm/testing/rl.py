"""Contracts of the reinforcement components: properties that any implementation must have (paper 3.2 to 3.4).

Each `check_*` takes a callable with the signature of ours, draws its own examples, and raises AssertionError with the
smallest counterexample that hypothesis finds. Hand it your own loss, controller or detector.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from minglm.config.posttraining import Aggregation
from minglm.rl.grpo import PolicyLoss
from minglm.rl.temperature import TemperatureController
from minglm.testing.strategies import holds, numbers, seeds, shapes

Aggregate = Callable[[Tensor, Tensor, str, int], Tensor]
"""(loss_BS, mask_BS, mode, denominator) -> scalar."""
Advantages = Callable[[Tensor, bool, Tensor], Tensor]
"""(rewards_PG, normalize_std, valid_PG) -> advantages of axes P, G."""
Loss = Callable[[Tensor, Tensor, Tensor, float, float, Tensor | None], PolicyLoss]
"""(logprobs_BS, sampling_logprobs_BS, advantages_B, clip_low, clip_high, mask_BS) -> PolicyLoss."""
Detect = Callable[[str, str], Mapping[str, bool]]
"""(text, language) -> {fault: whether it is there}."""

LENGTH = 7  # bound on the tokens of a sample, for the aggregation `constant`


def check_aggregation(aggregate: Aggregate) -> None:
    """Check a function like `minglm.rl.aggregation.aggregate`.

    It computes the formula of each mode, and pieces of the batch add up to the whole. Masked losses are never read. A
    batch without any target gives zero and a zero gradient.
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
    elif mode == Aggregation.SEQUENCE:
        denominator = len(rows)
    else:
        denominator = LENGTH * len(rows)
    total = 0.0
    for row in rows:
        total += sum(row) / len(row) if mode == Aggregation.SEQUENCE else sum(row)
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

    Its values sum to zero in each group, and ignore other groups and the level of the rewards. They are exactly zero in
    a group of equal rewards. A sample that is not valid has no influence.
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
    """Check a function like `minglm.rl.grpo.policy_loss`.

    On policy its gradient is REINFORCE's, the ratio is exactly 1 and the divergence 0. The clip removes the gradient
    exactly where the policy has already gone too far in the direction of the advantage. Masked tokens never matter.
    """
    _check_reinforce(policy_loss)
    _check_clip(policy_loss)
    _check_masked_tokens(policy_loss)


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
            logprobs_B1, logprobs_B1.detach(), rewards_V - baseline, 0.2, 0.28, None
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
        logprobs_BS = torch.tensor([[shift - 2.0]], requires_grad=True)
        loss_BS, metrics = policy_loss(
            logprobs_BS, torch.tensor([[-2.0]]), torch.tensor([advantage]), low, high, None
        )
        (gradient_BS,) = torch.autograd.grad(loss_BS.sum(), logprobs_BS)
        stopped = ratio > 1 + high if advantage > 0 else ratio < 1 - low
        expected = 0.0 if stopped else -ratio * advantage
        assert math.isclose(float(gradient_BS), expected, abs_tol=1e-5), (
            f"ratio {ratio}, advantage {advantage}"
        )
        assert float(metrics.clip_share) == stopped


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
            loss_BS, metrics = policy_loss(filled_BS, sampling_BS, advantages_B, 0.2, 0.28, mask_BS)
            loss = loss_BS[mask_BS].sum() + 0 * loss_BS[~mask_BS].sum()
            (gradient_BS,) = torch.autograd.grad(loss, filled_BS)
            assert not gradient_BS[~mask_BS].any(), "a masked token has a gradient"
            scalars = torch.stack([metrics.ratio_max, metrics.clip_share, metrics.kl])
            results.append((loss_BS[mask_BS], gradient_BS, scalars))
        torch.testing.assert_close(results[1], results[0], atol=0, rtol=0)


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


def check_temperature(controller: Callable[..., TemperatureController]) -> None:
    """Check a constructor like `TemperatureController`, with the arguments temperature, grid, window, gain, drop, relative.

    While the reward climbs nothing changes and nothing is probed. On a plateau the next temperature is the highest one
    whose score is within the drop of the best. A controller that is restored from its JSON state decides alike.
    """

    @holds(
        seed=seeds,
        window=st.integers(1, 5),
        relative=st.booleans(),
        drop=st.floats(0, 0.3),
        size=st.integers(1, 6),
    )
    def rule(seed: int, window: int, relative: bool, drop: float, size: int) -> None:
        """Climb, then stay on a plateau, with a drawn table of scores."""
        grid = [0.5 + 0.25 * i for i in range(size)]
        scores = torch.rand(size + 1, generator=numbers(seed)).tolist()
        table = dict(zip([*grid, 1.1], scores, strict=True))
        probes = []

        def probe(temperature: float) -> float:
            probes.append(temperature)
            return table[temperature]

        def make() -> TemperatureController:
            return controller(
                temperature=1.1, grid=grid, window=window, gain=0.01, drop=drop, relative=relative
            )

        subject = make()
        for step in range(3 * window):
            assert subject.observe(0.1 * step, probe) == 1.1, "changed while climbing"
        assert not probes, "probed while the reward still climbed"

        chosen = 1.1
        for _ in range(2 * window + 1):
            if chosen == 1.1:
                restored = make()
                restored.load_state_dict(json.loads(json.dumps(subject.state_dict())))
                again = restored.observe(1.0, table.__getitem__)
                chosen = subject.observe(1.0, probe)
                assert again == chosen, "a restored controller decides otherwise"
        assert set(probes) == set(table), (
            "a plateau must probe the grid and the present temperature"
        )
        best = max(table.values())
        bound = best * (1 - drop) if relative else best - drop
        allowed = [temperature for temperature, score in table.items() if score >= bound]
        assert chosen == max(allowed), f"chose {chosen} from {table}"


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
