"""Contracts of the reinforcement components: properties that any implementation must have (paper 3.2 to 3.4).

Each `check_*` takes a callable with the signature of ours, draws its own examples, and raises AssertionError with the
smallest counterexample that hypothesis finds. Hand it your own loss, controller or detector.
"""

import itertools
import math

import torch
from hypothesis import strategies as st

from minglm.testing.strategies import holds, numbers, seeds, shapes


def check_aggregation(aggregate):
    """`aggregate(loss_BS, mask_BS, mode, denominator)` like `minglm.rl.aggregation.aggregate`.

    It computes the formula of each mode; pieces of the batch add up to the whole; masked losses are never read; no
    target at all gives zero and a zero gradient.
    """

    def whole(loss_BS, mask_BS, mode):
        """(value, denominator) by the definition, in plain Python."""
        rows = [[x for x, m in zip(*pair) if m] for pair in zip(loss_BS.tolist(), mask_BS.tolist())]
        rows = [row for row in rows if row]
        count = {"token": sum(map(len, rows)), "sequence": len(rows), "constant": 7 * len(rows)}[
            mode
        ]
        total = sum(sum(row) / (len(row) if mode == "sequence" else 1) for row in rows)
        return total / max(1, count), count

    @holds(
        seed=seeds,
        shape=shapes,
        mode=st.sampled_from(["token", "sequence", "constant"]),
        cut=st.integers(0, 6),
    )
    def formula_and_pieces(seed, shape, mode, cut):
        """The value is the formula's, for the whole batch and for the sum of two pieces of different padding."""
        loss_BS = torch.randn(shape, generator=numbers(seed))
        mask_BS = torch.rand(shape, generator=numbers(seed + 1)) < 0.6
        loss_BS[~mask_BS] = math.nan
        expected, count = whole(loss_BS, mask_BS, mode)
        pieces = [(loss_BS[:cut], mask_BS[:cut]), (loss_BS[cut:], mask_BS[cut:])]
        total = sum(float(aggregate(loss, mask, mode, count)) for loss, mask in pieces if len(mask))
        # float32 sums of at most 54 numbers of size 1
        assert math.isclose(float(aggregate(loss_BS, mask_BS, mode, count)), expected, abs_tol=1e-5)
        assert math.isclose(total, expected, abs_tol=1e-5), (
            f"the batch cut at row {cut} gives {total}, not {expected}"
        )

    @holds(shape=shapes, mode=st.sampled_from(["token", "sequence", "constant"]))
    def nothing_to_learn(shape, mode):
        """All masked: exactly zero, with zero gradient."""
        loss_BS = torch.ones(shape, requires_grad=True)
        value = aggregate(loss_BS * 2, torch.zeros(shape, dtype=torch.bool), mode, 0)
        (gradient_BS,) = torch.autograd.grad(value, loss_BS)
        assert value.item() == 0 and not gradient_BS.any()


def check_advantages(advantages):
    """`advantages(rewards_PG, normalize_std, valid_PG)` like `minglm.rl.grpo.advantages`.

    They sum to zero in each group, ignore other groups and the level of the rewards, are exactly zero in a group of
    equal rewards, and a sample that is not valid might as well not exist.
    """

    @holds(
        seed=seeds, shape=st.tuples(st.integers(1, 5), st.integers(2, 9)), normalize=st.booleans()
    )
    def compare_within_groups(seed, shape, normalize):
        """Sum, independence of other groups, of a constant, and (with the division) of a factor."""
        rewards_PG = torch.rand(shape, generator=numbers(seed)).round(decimals=1)
        valid_PG = torch.rand(shape, generator=numbers(seed + 1)) < 0.8
        values_PG = advantages(rewards_PG, normalize, valid_PG)
        assert values_PG.shape == rewards_PG.shape
        # nine float32 numbers of size up to 3
        assert values_PG.sum(1).abs().max() < 1e-5, "advantages of a group must sum to zero"
        assert not values_PG[~valid_PG].any(), "a sample that is not valid must get zero"
        moved_PG = advantages(
            3 * rewards_PG + 1 if normalize else rewards_PG + 1, normalize, valid_PG
        )
        torch.testing.assert_close(
            moved_PG, values_PG, atol=1e-4, rtol=0
        )  # epsilon against a deviation of 0.03
        for p in range(shape[0]):
            alone_1G = rewards_PG[p][valid_PG[p]][None]
            if alone_1G.numel():
                expected_1G = advantages(
                    alone_1G, normalize, torch.ones_like(alone_1G, dtype=torch.bool)
                )
                torch.testing.assert_close(
                    values_PG[p][valid_PG[p]][None], expected_1G, atol=1e-5, rtol=0
                )
                if not normalize and alone_1G.max() > alone_1G.min():
                    torch.testing.assert_close(
                        expected_1G, alone_1G - alone_1G.mean(), atol=1e-6, rtol=0
                    )
                elif alone_1G.max() > alone_1G.min():
                    assert math.isclose(float(expected_1G.std()), 1.0, abs_tol=1e-3), (
                        "normalised to deviation one"
                    )

    @holds(
        reward=st.floats(0, 1, width=32),
        shape=st.tuples(st.integers(1, 3), st.integers(1, 9)),
        normalize=st.booleans(),
    )
    def silence(reward, shape, normalize):
        """Equal rewards, whatever their level: exactly zero, although their float mean may differ from them."""
        values_PG = advantages(
            torch.full(shape, reward), normalize, torch.ones(shape, dtype=torch.bool)
        )
        assert not values_PG.any(), "a group of equal rewards must get exactly zero"


def check_policy_loss(policy_loss):
    """`policy_loss(logprobs_BS, sampling_BS, advantages_B, clip_low, clip_high, mask_BS)` like `minglm.rl.grpo`'s.

    On policy its gradient is REINFORCE's, the ratio is exactly 1 and the divergence 0; the clip removes the gradient
    exactly where the policy has already gone too far in the direction of the advantage; masked tokens never matter.
    """

    @holds(seed=seeds, arms=st.integers(2, 6), baseline=st.floats(-1, 1))
    def bandit(seed, arms, baseline):
        """Summed over the arms of a small bandit, weighted by probability: the gradient of minus the reward."""
        scores_V = torch.randn(arms, generator=numbers(seed)).double().requires_grad_()
        rewards_V = torch.rand(arms, generator=numbers(seed + 1)).double()
        logprobs_V = scores_V.log_softmax(0)
        loss_B1, metrics = policy_loss(
            logprobs_V[:, None], logprobs_V.detach()[:, None], rewards_V - baseline, 0.2, 0.28, None
        )
        (found_V,) = torch.autograd.grad(
            (loss_B1[:, 0] * logprobs_V.detach().exp()).sum(), scores_V, retain_graph=True
        )
        (true_V,) = torch.autograd.grad(-(rewards_V * logprobs_V.exp()).sum(), scores_V)
        torch.testing.assert_close(found_V, true_V, atol=1e-6, rtol=1e-5)  # the loss is float32
        assert (
            float(metrics.ratio_max) == 1
            and float(metrics.kl) == 0
            and float(metrics.clip_share) == 0
        )

    @holds(
        shift=st.floats(-1, 1),
        advantage=st.floats(-2, 2),
        low=st.floats(0.05, 0.4),
        high=st.floats(0.05, 0.4),
    )
    def clip(shift, advantage, low, high):
        """The gradient is -ratio * advantage, or zero beyond the clip on the side the advantage pushes to."""
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

    @holds(
        seed=seeds, shape=shapes, junk=st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1e30])
    )
    def masked(seed, shape, junk):
        """Whatever stands at masked positions: same loss, gradient and metrics, and no gradient there."""
        generator = numbers(seed)
        logprobs_BS = -torch.rand(shape, generator=generator)
        sampling_BS = -torch.rand(shape, generator=generator)
        advantages_B = torch.randn(shape[0], generator=generator)
        mask_BS = torch.rand(shape, generator=generator) < 0.5
        results = []
        for value in (-0.5, junk):
            clone_BS = logprobs_BS.masked_fill(~mask_BS, value).requires_grad_()
            loss_BS, metrics = policy_loss(
                clone_BS,
                sampling_BS.masked_fill(~mask_BS, value),
                advantages_B,
                0.2,
                0.28,
                mask_BS,
            )
            (gradient_BS,) = torch.autograd.grad(
                loss_BS[mask_BS].sum() + 0 * loss_BS[~mask_BS].sum(), clone_BS
            )
            assert not gradient_BS[~mask_BS].any(), "a masked token has a gradient"
            results.append(
                (
                    loss_BS[mask_BS],
                    gradient_BS,
                    *(
                        float(value)
                        for value in (metrics.ratio_max, metrics.clip_share, metrics.kl)
                    ),
                )
            )
        torch.testing.assert_close(results[1], results[0], atol=0, rtol=0)


def check_pass_at_k(pass_at_k):
    """`pass_at_k(n, c, k)`: the share of k-subsets of n answers, c of them right, that hold a right one."""

    @holds(n=st.integers(1, 9), c=st.integers(0, 9), k=st.integers(1, 9))
    def enumeration(n, c, k):
        """Equal to the enumeration of all subsets."""
        c, k = min(c, n), min(k, n)
        subsets = list(itertools.combinations(range(n), k))
        share = sum(min(subset) < c for subset in subsets) / len(subsets)
        assert math.isclose(pass_at_k(n, c, k), share, abs_tol=1e-12), (
            f"pass@{k} of {c} right among {n}"
        )


def check_temperature(controller):
    """`controller(temperature, grid, window, gain, drop, relative)` builds one like `TemperatureController`.

    While the reward climbs nothing changes and nothing is probed. On a plateau the next temperature is the highest one
    whose score is within the drop of the best. A controller restored from its JSON state goes on in the same way.
    """
    import json

    @holds(
        seed=seeds,
        window=st.integers(1, 5),
        relative=st.booleans(),
        drop=st.floats(0, 0.3),
        size=st.integers(1, 6),
    )
    def rule(seed, window, relative, drop, size):
        """Climb, then stand still, with a drawn table of scores."""
        grid = [0.5 + 0.25 * i for i in range(size)]
        table = dict(zip([*grid, 1.1], torch.rand(size + 1, generator=numbers(seed)).tolist()))
        probes = []

        def make():
            return controller(
                temperature=1.1, grid=grid, window=window, gain=0.01, drop=drop, relative=relative
            )

        subject = make()
        for step in range(3 * window):
            assert subject.observe(0.1 * step, lambda t: probes.append(t) or table[t]) == 1.1, (
                "changed while climbing"
            )
        assert not probes, "probed while the reward still climbed"
        chosen = 1.1
        for _ in range(2 * window + 1):
            if chosen == 1.1:
                revived = make()
                revived.load_state_dict(json.loads(json.dumps(subject.state_dict())))
                again = revived.observe(1.0, table.get)
                chosen = subject.observe(1.0, lambda t: probes.append(t) or table[t])
                assert again == chosen, "a restored controller decides otherwise"
        assert set(probes) == set(table), (
            "a plateau must probe the grid and the present temperature"
        )
        best = max(table.values())
        allowed = [
            t
            for t, score in table.items()
            if score >= (best * (1 - drop) if relative else best - drop)
        ]
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


def check_detectors(detect):
    """`detect(text, language)` like `minglm.rewards.pathology.detect`: nothing on clean turns, and every inserted fault."""

    def turn(sentences, thinks, calls):
        """A clean assistant turn of the GLM-4.5 template."""
        half = len(sentences) // 2 if thinks else 0
        text = f"\n<think>{'. '.join(sentences[:half])}</think>\n" + ". ".join(sentences[half:])
        for name, value in calls:
            text += f"\n<tool_call>{name}\n<arg_key>text</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"
        return text + ("<|observation|>" if calls else "<|user|>")

    calls = st.lists(
        st.tuples(
            st.sampled_from(["search", "get_order"]), st.sampled_from(["Москва", "北京", "a1"])
        ),
        max_size=2,
    )
    drawn = {
        "shrink": False,  # any counterexample can be read, and a detector may be slow
        "language": st.sampled_from(["en", "zh"]),
        "order": st.sets(st.integers(0, 7), min_size=2).map(sorted),
        "thinks": st.booleans(),
        "calls": calls,
    }

    @holds(**drawn)
    def clean(language, order, thinks, calls):
        """No false alarm."""
        sentences = [_SENTENCES[language][i] for i in order]
        text = turn(sentences, thinks, calls)
        assert not any(detect(text, language).values()), (text, detect(text, language))

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

    @holds(**drawn, at=st.integers(0, 8), tag=tags, copies=st.integers(12, 60))
    def faults(language, order, thinks, calls, at, tag, copies):
        """Foreign words, a loop, and a stray tag, each put between two sentences."""
        sentences = [_SENTENCES[language][i] for i in order]
        at = min(at, len(order))
        inserted = {
            "language_mixing": _FOREIGN[language],
            "repetition": _LOOP[language] * copies,
            "format": tag,
        }
        for fault, text in inserted.items():
            faulty = turn(sentences[:at] + [text] + sentences[at:], thinks, calls)
            assert detect(faulty, language)[fault], f"{fault} not found in {faulty!r}"
