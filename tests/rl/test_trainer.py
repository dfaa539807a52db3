"""The trainer and the loop of RL: what was sampled is trained, equal rewards teach nothing, a stopped run resumes."""

import copy
import dataclasses
import itertools
import json
import math
import shutil
import signal
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers.scripted import ScriptedGenerator, byte_tokenizer, said
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minglm.common.files import read_jsonl
from minglm.common.log import Log
from minglm.common.signals import Stopped
from minglm.config import (
    Aggregation,
    CurriculumConfig,
    DynamicTemperatureConfig,
    OptimizerConfig,
    RLConfig,
)
from minglm.envs import ENVIRONMENTS
from minglm.envs.base import Environment, Episode, Score, Task, assistant, user
from minglm.inference import Engine
from minglm.inference.client import EngineGenerator
from minglm.inference.pages import decoder_for
from minglm.model.embedding import LMHead
from minglm.model.glm import GLM, Output
from minglm.optim.muon import Muon
from minglm.parallel import Replicas
from minglm.report.records import RLRecord, parse
from minglm.rl import loop, trainer
from minglm.rl.batch import (
    MOST_COPIES,
    Row,
    Sample,
    by_prompt,
    collate,
    sampled_log_probabilities,
    sharing_microbatches,
)
from minglm.rl.curriculum import Curriculum, Problem, Tier
from minglm.rl.episode import Player, SamplingSettings, Segment, Trajectory
from minglm.rl.gap import Gap
from minglm.rl.loop import draw_groups, reinforce, summarize
from minglm.rl.rollout import rollout
from minglm.rl.schedule import TaskSchedule
from minglm.rl.trainer import PolicyTrainer
from minglm.testing.model import tiny_model
from minglm.testing.strategies import numbers, seeds
from minglm.train.checkpoint import CheckpointStore

TASK = Task("0", "letters", (user("?"),), (), None, 1)
CONFIG = RLConfig(("letters",), steps=1, prompts=2, samples=2, max_new_tokens=8, peak_lr=1e-2)


def with_loss(normalize_std=True, updates_per_rollout=1, **changes):
    """Return the config with another loss."""
    return dataclasses.replace(
        CONFIG,
        normalize_std=normalize_std,
        updates_per_rollout=updates_per_rollout,
        loss=dataclasses.replace(CONFIG.loss, **changes),
    )


def drawn_segment(seed, sampled=True):
    """Return up to 12 random tokens of the tiny vocabulary, some of them sampled, with random log-probabilities."""
    size = int(torch.randint(3, 13, (), generator=numbers(seed)))
    tokens = torch.randint(0, 24, (size,), generator=numbers(seed + 1)).tolist()
    mask = (torch.rand(size, generator=numbers(seed + 2)) < 0.5).tolist()
    mask[0] = False
    mask[1] = sampled
    logprobs = (-3 * torch.rand(size, generator=numbers(seed + 3))).tolist()
    return Segment(tokens, mask, [p if m else 0.0 for p, m in zip(logprobs, mask)])


def drawn_groups(seed, rewards, status="ok"):
    """Return groups of trajectories of one to three segments with these rewards; None is an infrastructure failure."""
    groups = []
    for p, row in enumerate(rewards):
        groups.append([])
        for g, reward in enumerate(row):
            segments = [
                drawn_segment(seed + 1000 * p + 100 * g + 10 * i)
                for i in range(1 + (seed + p + g) % 3)
            ]
            score = Score(0.0, "infrastructure") if reward is None else Score(reward, status)
            groups[-1].append(Trajectory(TASK, True, [], segments, ["a<|user|>"], score))
    return groups


def recorded(model, segments, temperature=1.0):
    """Return the segments with the log-probabilities that the model gives them now."""
    found = []
    for s in segments:
        with torch.no_grad():
            logprobs_BS, _, _ = sampled_log_probabilities(model, collate([s], 0), temperature)
        found.append(Segment(s.tokens, s.mask, logprobs_BS[0].tolist()))
    return found


class Looks(torch.optim.SGD):
    """An optimizer that changes nothing and keeps the gradients it is shown."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)
        self.model = model
        self.seen = []

    def step(self):
        """Copy the gradients; zeros where there is none."""
        named = self.model.named_parameters()
        self.seen.append(
            {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}
        )


def gradients(model, pairs, config=CONFIG, clip_norm=1e9, threads=1):
    """Return ({name: gradient}, metrics) of one update on (segment, advantage) pairs, or on samples."""
    optimizer = Looks(model)
    options = OptimizerConfig(clip_norm=clip_norm)
    samples = [pair if isinstance(pair, Sample) else Sample([pair[0]], pair[1]) for pair in pairs]
    metrics = PolicyTrainer(model, optimizer, config, options, 0, Replicas(model, threads)).update(
        samples, 0.0
    )
    (seen,) = optimizer.seen
    return seen, metrics


def weights(model):
    """Return a copy of the model's parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    """Return whether two such copies are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@settings(max_examples=15)
@given(seed=seeds, temperature=st.sampled_from([0.5, 1.0, 1.7]))
def test_log_probabilities_are_those_of_a_forward_pass(seed, temperature):
    """At sampled tokens log softmax of logits over temperature, alone and unpadded; 0 elsewhere; entropy as a sum."""
    model = tiny_model(seed)
    segments = [drawn_segment(seed + 10 * i, sampled=i > 0) for i in range(4)]
    batch = collate(segments, pad=7)
    found_BS, entropy, _ = sampled_log_probabilities(model, batch, temperature)
    total = 0.0
    for b, s in enumerate(segments):
        with torch.no_grad():
            logp_SV = (model(torch.tensor([s.tokens]))[0] / temperature).log_softmax(-1)
        for at in range(batch.computed):
            if at >= len(s.tokens) or not s.mask[at]:
                assert found_BS[b, at] == 0
                continue
            logp_V = logp_SV[at - 1]
            # float32, padded rows sum otherwise.
            expected = logp_V[s.tokens[at]].item()
            assert found_BS[b, at].item() == pytest.approx(expected, abs=1e-4)
            total -= (logp_V.exp() * logp_V).sum().item()
    assert entropy.item() == pytest.approx(total, rel=1e-4, abs=1e-4)


@given(seed=seeds)
def test_environment_tokens_have_no_gradient(seed):
    """The state before a token that came from outside gets a gradient of exactly zero; before a sampled one it does."""
    segments = [drawn_segment(seed), drawn_segment(seed + 50)]
    batch = collate(segments, 0)
    hidden_BSD = torch.randn(*batch.tokens_BS.shape, 6, generator=numbers(seed)).requires_grad_()
    head = LMHead(24, 6)
    torch.nn.init.normal_(head.weight, generator=numbers(seed + 1))
    stub = SimpleNamespace(hidden=lambda *_, **__: Output(hidden_BSD), lm_head=head)
    logprobs_BS, _, _ = sampled_log_probabilities(stub, batch, 1.0)
    logprobs_BS.sum().backward()
    before_BS = torch.zeros_like(batch.mask_BS)
    before_BS[:, :-1] = batch.mask_BS[:, 1:]
    assert torch.equal(hidden_BSD.grad.abs().sum(-1) > 0, before_BS)


@settings(max_examples=10)
@given(seed=seeds)
def test_what_follows_the_last_sampled_token_changes_nothing(seed):
    """Tool results that no turn answered, other ids in their place, or none: the same gradient, and as with padding."""
    model, s = tiny_model(seed), drawn_segment(seed)
    last = max(i for i, m in enumerate(s.mask) if m) + 1
    cut = Segment(s.tokens[:last], s.mask[:last], s.logprobs[:last])
    tail = torch.randint(0, 24, (5,), generator=numbers(seed + 9)).tolist()
    longer = Segment(cut.tokens + tail, cut.mask + [False] * 5, cut.logprobs + [0.0] * 5)
    other = drawn_segment(seed + 70)
    first, _ = gradients(model, [(cut, 1.0), (other, -1.0)])
    second, _ = gradients(model, [(longer, 1.0), (other, -1.0)])
    for name in first:  # float32, the padding of the two batches differs
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-3)


@settings(max_examples=10)
@given(
    seed=seeds,
    size=st.sampled_from([1, 13, 30, 60]),
    threads=st.integers(1, 9),
    mode=st.sampled_from(Aggregation),
)
def test_neither_micro_batches_nor_threads_change_a_gradient(seed, size, threads, mode):
    """Any bound on the tokens of a pass, any number of threads and aggregation: the same gradient, norm and metrics."""
    model = tiny_model(seed)
    config = with_loss(aggregation=mode)
    pairs = [(drawn_segment(seed + 10 * i), [1.0, -0.5, 2.0][i % 3]) for i in range(7)]
    whole, metrics = gradients(model, pairs, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "MICROBATCH_TOKENS", size)
        cut, other = gradients(model, pairs, config, threads=threads)
    for name in whole:  # float32 sums of up to 84 tokens in another order; ratios of up to e^3
        torch.testing.assert_close(
            whole[name], cut[name], atol=1e-4 * max(1, whole[name].abs().max()), rtol=1e-3
        )
    for absent in ("left_out", "capped_share", "reference_kl", "gap_routing", "mtp_loss"):
        assert metrics.pop(absent) is other.pop(absent) is None
    assert metrics.pop("gap") == pytest.approx(other.pop("gap"), rel=1e-3, abs=1e-4)
    assert metrics == pytest.approx(other, rel=1e-3, abs=1e-4)


@settings(max_examples=8)
@given(seed=seeds, temperature=st.sampled_from([0.7, 1.0]))
def test_on_policy_the_ratio_is_one(seed, temperature):
    """Just sampled and not yet trained: ratio 1, nothing clipped, divergence 0, whatever engine recorded it."""
    model = tiny_model(seed, vocab_size=292, max_position_embeddings=512)
    tokenizer = byte_tokenizer()
    config = dataclasses.replace(CONFIG, temperature=temperature)
    tasks = ENVIRONMENTS["arithmetic"].tasks(2, seed)
    generator = EngineGenerator(Engine(model, tokenizer))
    player = Player(generator, tokenizer, SamplingSettings(8, temperature, max_turns=1))
    groups = rollout(player, ENVIRONMENTS, tasks, 3, seed=seed)
    pairs = [(s, 1.0) for group in groups for t in group for s in t.segments]
    _, metrics = gradients(model, pairs, config)
    # the engine's float32 log-probabilities differ from the trainer's by up to 1e-4; the divergence is quadratic in it
    assert metrics["ratio_max"] == pytest.approx(1, abs=2e-4)
    assert metrics["clip_share"] == 0
    assert abs(metrics["kl"]) < 1e-6 and metrics["entropy"] > 0
    assert 0 <= metrics["gap"].kl < 1e-6 and metrics["gap"].worst < 2e-4
    alone = recorded(model, [s for s, _ in pairs], temperature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "MICROBATCH_TOKENS", 1)  # each on its own, as it was recorded
        _, metrics = gradients(model, [(s, -1.0) for s in alone], config)
    # without gradients the experts are multiplied in another order: equal but for rounding
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert abs(metrics["kl"]) < 1e-9


@settings(max_examples=10)
@given(seed=seeds)
def test_on_policy_the_gradient_is_reinforce(seed):
    """The gradient of minus advantage times log-probability, mean over all sampled tokens of the batch."""
    model = tiny_model(seed)
    segments = recorded(model, [drawn_segment(seed + 10 * i) for i in range(3)])
    pairs = list(zip(segments, (1.0, -2.0, 0.5)))
    found, _ = gradients(model, pairs)
    model.zero_grad()
    count = sum(sum(s.mask) for s in segments)
    loss = 0.0
    for s, advantage in pairs:
        logp_SV = model(torch.tensor([s.tokens]))[0].log_softmax(-1)
        loss -= (
            sum(advantage * logp_SV[i - 1, s.tokens[i]] for i, m in enumerate(s.mask) if m) / count
        )
    loss.backward()
    for name, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found[name], expected, atol=1e-4, rtol=1e-3)  # float32


def test_gradients_are_clipped_to_the_bound():
    """The optimizer sees a norm of at most one; the log shows the norm before."""
    model = tiny_model(1)
    pairs = [(drawn_segment(i), 30.0) for i in range(3)]
    found, metrics = gradients(model, pairs, clip_norm=0.5)
    assert metrics["grad_norm"] > 0.5
    assert torch.nn.utils.get_total_norm(found.values()).item() == pytest.approx(0.5, rel=1e-3)


def test_a_gradient_that_is_not_finite_leaves_the_weights():
    """A step that is not finite is skipped and logged."""
    model = tiny_model(1)
    before = weights(model)
    handle = model.model.norm.register_forward_hook(
        lambda module, inputs, output: output * float("inf")
    )
    trainer = trainer_of(model)
    samples = [Sample([drawn_segment(1)], 1.0), Sample([drawn_segment(2)], -1.0)]
    metrics = trainer.update(samples, 1e-3)
    handle.remove()
    assert not math.isfinite(metrics["grad_norm"]) and same(before, weights(model))
    assert metrics["left_out"] == "not finite" and trainer.guard.left_out == 1
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def muon(model):
    """Return the optimizer of a run."""
    return Muon(model, OptimizerConfig())


def trainer_of(model, config=CONFIG, **options):
    """Return a trainer of this model with a fresh optimizer."""
    return PolicyTrainer(model, muon(model), config, OptimizerConfig(**options), pad=0)


def moments(optimizer):
    """Return a copy of the optimizer's memory."""
    return {
        f"{number}.{name}": torch.as_tensor(value).clone()
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def learn(model, groups, config=CONFIG, step=9):
    """Learn from groups with a fresh trainer; return the metrics."""
    return trainer_of(model, config).learn(groups, step)


REWARDS = {
    "nothing": ([[0, 0], [0, 0]], True),
    "everything": ([[1, 1], [1, 1]], True),
    "half marks": ([[0.1, 0.1, 0.1], [0.7, 0.7, 0.7]], True),
    "one live group": ([[0, 1], [1, 1], [0, 0]], True),
    "all but one failed": ([[None, 1], [None, 0], [0, 1]], True),
    "two live groups": ([[0, 1], [1, 1], [1, 0]], False),
    "live with a failure": ([[None, 1, 0], [0, 1, None]], False),
}


@pytest.mark.parametrize("name", REWARDS)
def test_groups_without_variance_teach_nothing(name):
    """With fewer than two groups whose rewards differ no weight moves by a bit; otherwise they do."""
    rewards, skipped = REWARDS[name]
    model = tiny_model(1)
    before = weights(model)
    trainer = trainer_of(model)
    metrics = trainer.learn(drawn_groups(1, rewards), step=9)
    assert metrics["skipped"] == skipped
    assert same(before, weights(model)) == skipped
    memory = [
        value
        for state in trainer.optimizer.state_dict()["state"].values()
        for value in state.values()
    ]
    assert any(torch.as_tensor(value).any() for value in memory) != skipped, (
        "nor does the optimizer's memory"
    )
    live = sum(len({r for r in row if r is not None}) > 1 for row in rewards)
    assert metrics["live_groups"] == pytest.approx(live / len(rewards), abs=1e-4)


@settings(max_examples=8)
@given(seed=seeds, normalize=st.booleans())
def test_uninformative_groups_are_as_if_they_had_not_been(seed, normalize):
    """A step with a group of equal rewards is the step without that group, bit for bit."""
    config = dataclasses.replace(CONFIG, normalize_std=normalize)
    found = []
    rewards = [[0, 1, 1], [1, 1, 1], [0.5, 0, 1]]
    groups = drawn_groups(seed, rewards)
    for chosen in (groups, [groups[0], groups[2]]):
        model = tiny_model(seed)
        metrics = learn(model, chosen, config)
        found.append(weights(model))
    assert same(*found)
    segments = [s for group in chosen for t in group for s in t.segments]
    assert metrics["segment_tokens"] == sum(len(s.tokens) for s in segments)
    assert metrics["trained_tokens"] == sum(sum(s.mask) for s in segments)


@settings(max_examples=8)
@given(seed=seeds, normalize=st.booleans(), mode=st.sampled_from(Aggregation))
def test_failures_of_the_machine_leave_the_statistics(seed, normalize, mode):
    """A sample whose environment failed is as if it had not been drawn: for the advantages and for the denominator."""
    config = with_loss(aggregation=mode, normalize_std=normalize)
    found = []
    groups = drawn_groups(seed, [[0, 1, 1, None], [None, 1, 0, 0]])
    without = [[t for t in group if t.score.status != "infrastructure"] for group in groups]
    for chosen in (groups, without):
        model = tiny_model(seed)
        learn(model, chosen, config)
        found.append(weights(model))
    assert same(*found)


def test_the_learning_rate_warms_up_over_five_steps():
    """A fifth of the peak in the first step, all of it from the fifth on."""
    for step, share in ((0, 0.2), (1, 0.4), (4, 1.0), (100, 1.0)):
        model = tiny_model(1)
        trainer = trainer_of(model)
        trainer.learn(drawn_groups(1, [[0, 1], [1, 0]]), step)
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        assert rates == pytest.approx([share * CONFIG.peak_lr] * len(rates))


@pytest.mark.parametrize("updates", [1, 2, 3, 99])
def test_a_rollout_can_serve_several_updates(updates):
    """Each share is one optimizer step on whole trajectories, and there are never more shares than trajectories."""
    model = tiny_model(1)
    groups = drawn_groups(1, [[0, 1], [1, 0]])
    calls = []
    config = dataclasses.replace(CONFIG, updates_per_rollout=updates)
    subject = trainer_of(model, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            subject,
            "update",
            lambda samples, rate: (
                calls.append(samples)
                or {"left_out": None, "gap": Gap(len(calls), 0, 0, 0), "gap_routing": None}
            ),
        )
        metrics = subject.learn(groups, 9)
    assert metrics["gap_mean"] == 1, "the gap is that of the first update"
    assert len(calls) == min(updates, 4) and all(calls)
    assert Counter(id(sample.segments) for samples in calls for sample in samples) == Counter(
        id(t.segments) for group in groups for t in group
    )


@settings(max_examples=10)
@given(
    seed=seeds,
    counts=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    mode=st.sampled_from(["sequence", "constant"]),
    size=st.sampled_from([1, 30, 8192]),
)
def test_a_trajectory_has_one_vote(seed, counts, mode, size):
    """However many segments it has: the mean over trajectories of each one's sum, divided by its tokens or a constant."""
    model = tiny_model(seed)
    config = with_loss(aggregation=mode)
    samples = [
        Sample(recorded(model, [drawn_segment(seed + 100 * i + j) for j in range(n)]), (-1.0) ** i)
        for i, n in enumerate(counts)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "MICROBATCH_TOKENS", size)
        found, _ = gradients(model, samples, config)
    model.zero_grad()
    loss = 0.0
    for segments, advantage, _ in samples:
        total = 0.0
        for s in segments:
            logp_SV = model(torch.tensor([s.tokens]))[0].log_softmax(-1)
            total += sum(logp_SV[i - 1, s.tokens[i]] for i, m in enumerate(s.mask) if m)
        tokens = sum(sum(s.mask) for s in segments)
        weight = tokens if mode == "sequence" else config.max_new_tokens * config.max_turns
        loss -= advantage * total / weight / len(samples)
    loss.backward()
    for name, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found[name], expected, atol=1e-4, rtol=1e-3)  # float32


@settings(max_examples=8)
@given(seed=seeds, counts=st.lists(st.integers(1, 3), min_size=2, max_size=4))
def test_a_prompt_has_one_vote(seed, counts):
    """Averaged by prompt: the mean over prompts of the mean over the tokens of all its samples and their segments."""
    model = tiny_model(seed)
    samples = []
    for prompt, count in enumerate(counts):
        for i in range(count):
            drawn = [drawn_segment(seed + 100 * prompt + 10 * i + j) for j in range(1 + i % 2)]
            samples.append(Sample(recorded(model, drawn), (-1.0) ** i, prompt))
    found, _ = gradients(model, samples, with_loss(aggregation="prompt"))
    model.zero_grad()
    loss = 0.0
    for prompt in range(len(counts)):
        total = 0.0
        tokens = 0
        for segments, advantage, _ in (s for s in samples if s.prompt == prompt):
            for s in segments:
                logp_SV = model(torch.tensor([s.tokens]))[0].log_softmax(-1)
                chosen = [logp_SV[i - 1, s.tokens[i]] for i, m in enumerate(s.mask) if m]
                total -= advantage * sum(chosen)
                tokens += len(chosen)
        loss += total / tokens / len(counts)
    loss.backward()
    for name, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found[name], expected, atol=1e-4, rtol=1e-3)  # float32


@settings(max_examples=6)
@given(seed=seeds, threads=st.integers(1, 2), size=st.sampled_from([1, 30, 8192]))
def test_later_updates_know_the_policy_before_the_first(seed, threads, size):
    """With a cap the second update of a rollout gets the log-probabilities from before the first, the first gets none."""
    model = tiny_model(seed)
    config = with_loss(importance_cap=2.0, updates_per_rollout=2)
    groups = drawn_groups(seed, [[0, 1], [1, 0]])
    segments = [s for group in groups for t in group for s in t.segments]
    before = {id(s): recorded(model, [s])[0].logprobs for s in segments}
    workers = Replicas(model, threads)
    subject = PolicyTrainer(model, muon(model), config, OptimizerConfig(), 0, workers)
    updates = []
    update = subject.update

    def watched(samples, rate):
        own = [s for sample in samples for s in sample.segments]
        updates.append(own)
        for s in own:
            if len(updates) == 1:
                assert s.proximal_logprobs is None
            else:  # float32, other rows in the pass
                assert s.proximal_logprobs == pytest.approx(before[id(s)], abs=1e-4)
        return update(samples, rate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "MICROBATCH_TOKENS", size)
        patch.setattr(subject, "update", watched)
        metrics = subject.learn(groups, 9)
    assert Counter(id(s) for own in updates for s in own) == Counter(map(id, segments))
    assert 0 <= metrics["capped_share"] <= 1


@pytest.mark.parametrize(("cap", "kept"), [(0.0, 1), (2.0, 2)])
def test_samples_have_the_log_probabilities_before_the_first_update(cap, kept):
    """What is written beside the engine's is no policy that has moved: a later update has those from before, or none."""
    model = tiny_model(1)
    config = with_loss(importance_cap=cap, updates_per_rollout=2)
    groups = drawn_groups(1, [[0, 1], [1, 0]])
    before = {}
    for s in (s for group in groups for t in group for s in t.segments):
        before[id(s)] = recorded(model, [s])[0].logprobs
    subject = PolicyTrainer(model, muon(model), config, OptimizerConfig(), 0)
    subject.keep_logprobs = True
    subject.learn(groups, 9)
    for group in groups:
        for place, trajectory in enumerate(group):
            for s in trajectory.segments:
                if place >= kept:  # of the second update
                    assert s.trainer_logprobs is None
                else:
                    assert s.trainer_logprobs == pytest.approx(before[id(s)], abs=1e-4)


@settings(max_examples=6)
@given(seed=seeds, threads=st.integers(1, 2), size=st.sampled_from([1, 30, 8192]))
def test_the_divergence_is_from_the_reference(seed, threads, size):
    """0 with no gradient at the reference itself; elsewhere the mean of r - 1 - log r, r = reference / policy."""
    model = tiny_model(seed)
    config = with_loss(beta=0.5)
    samples = [Sample([drawn_segment(seed + 10 * i)], 0.0) for i in range(4)]
    segments = [s for sample in samples for s in sample.segments]
    ours = recorded(model, segments)
    for reference in (copy.deepcopy(model), tiny_model(seed + 1)):
        optimizer = Looks(model)
        workers = Replicas(model, threads)
        subject = PolicyTrainer(
            model, optimizer, config, OptimizerConfig(clip_norm=1e9), 0, workers, reference
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "MICROBATCH_TOKENS", size)
            metrics = subject.update(samples, 0.0)
        theirs = recorded(reference, segments)
        expected = []
        for new, old in zip(ours, theirs, strict=True):
            for log, other, produced in zip(new.logprobs, old.logprobs, new.mask, strict=True):
                if produced:
                    expected.append(math.expm1(other - log) - (other - log))
        mean = sum(expected) / len(expected)
        # float32, and another order of the rows
        assert metrics["reference_kl"] == pytest.approx(mean, abs=1e-5, rel=1e-3)
        moved = max(float(gradient.abs().max()) for gradient in optimizer.seen[0].values())
        assert (moved < 1e-4) == (mean < 1e-9)
        assert all(p.grad is None for p in reference.parameters())


def test_a_reference_is_held_only_for_a_divergence():
    """A trainer without the KL term that is given a reference, or the other way round, is a mistake of the caller."""
    model = tiny_model(1)
    for config, reference in ((CONFIG, model), (with_loss(beta=0.1), None)):
        with pytest.raises(AssertionError, match="a reference, if there is a KL term"):
            PolicyTrainer(model, muon(model), config, OptimizerConfig(), 0, reference=reference)


class Unstable(Environment):
    """An environment whose grader returns a value that is no reward for the second sample of each task."""

    name = "unstable"

    def __init__(self, value):
        self.value = value
        self.count = 0

    def draw(self, rng, difficulty):
        return [user(f"{rng.randint(0, 10**6)}?")], None

    def episode(self, task):
        self.count += 1
        return UnstableEpisode(
            task, self.value if self.count % 4 == 2 else float(self.count % 4 == 1)
        )


class UnstableEpisode(Episode):
    """Take any message, malformed or not."""

    def __init__(self, task, value):
        super().__init__(task)
        self.value = value

    async def respond(self, message):
        """End at once."""
        return []

    async def grade(self):
        """Return the value, if it is a reward."""
        return Score(self.value, "ok")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, torch.tensor(math.nan)])
def test_a_reward_that_is_no_number_leaves_the_statistics(value):
    """The environment is named, its sample is an infrastructure failure, and the siblings teach as without it."""
    tokenizer = byte_tokenizer()
    found = []
    environments = {"unstable": Unstable(value)}
    tasks = environments["unstable"].tasks(2, 1)
    engine = ScriptedGenerator(tokenizer, lambda prompt: said(tokenizer, assistant("yes", "so")))
    player = Player(engine, tokenizer, SamplingSettings(8))
    with pytest.warns(UserWarning, match="^unstable: ValueError: reward = .*leaves the statistics"):
        groups = rollout(player, environments, tasks, 4)
    assert [[t.valid for t in group] for group in groups] == [[True, False, True, True]] * 2
    for chosen in (groups, [[t for t in group if t.valid] for group in groups]):
        model = tiny_model(1, vocab_size=292, max_position_embeddings=512)
        assert not learn(model, chosen)["skipped"]
        found.append(weights(model))
    assert same(*found)


class Careless(Environment):
    """An environment that scores past `Score`: another type, a subclass without the check, a value changed later."""

    name = "careless"

    def __init__(self, score):
        self.score = score

    def draw(self, rng, difficulty):
        return [user(f"{rng.randint(0, 10**6)}?")], None

    def episode(self, task):
        episode = UnstableEpisode(task, 0.0)

        async def score():
            return self.score

        episode.score = score
        return episode


class Unchecked(Score):
    """A score that checks nothing."""

    def __post_init__(self):
        """Broken: take any value."""


def changed():
    """Return a score that was a reward when it was made."""
    score = Score(1.0, "ok")
    object.__setattr__(score, "value", math.inf)
    return score


@pytest.mark.parametrize(
    "score",
    [
        math.nan,
        None,
        SimpleNamespace(value=math.nan, status="ok"),
        Unchecked(math.nan, "ok"),
        changed(),
    ],
    ids=["a number", "nothing", "a lookalike", "a subclass", "changed"],
)
def test_no_score_passes_unchecked(score):
    """Whatever an environment returns in place of a `Score`, its sample is not valid and the environment is named."""
    tokenizer = byte_tokenizer()
    environments = {"careless": Careless(score)}
    engine = ScriptedGenerator(tokenizer, lambda prompt: said(tokenizer, assistant("yes", "so")))
    player = Player(engine, tokenizer, SamplingSettings(8))
    with pytest.warns(UserWarning, match="^careless: .*leaves the statistics"):
        ((trajectory,),) = rollout(player, environments, environments["careless"].tasks(1, 1), 1)
    assert not trajectory.valid and trajectory.score.value == 0


class Shares(Environment):
    """Tasks whose answers differ in reward for a share of the tasks, and are all wrong for the others."""

    name = "shares"

    def __init__(self, share):
        self.share = share
        self.seen = Counter()

    def draw(self, rng, difficulty):
        return [user(f"{rng.randint(0, 10**9)}?")], rng.random() < self.share

    def episode(self, task):
        self.seen[task.id] += 1
        return UnstableEpisode(task, float(task.label and self.seen[task.id] % 2))


@settings(max_examples=12)
@given(
    seed=seeds,
    share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    refill=st.integers(0, 3),
    prompts=st.integers(1, 5),
)
def test_groups_without_signal_are_refilled(seed, share, refill, prompts):
    """New prompts replace them until all are live or the rounds are used up; every draw is counted, none comes twice."""
    tokenizer = byte_tokenizer()
    environment = Shares(share)
    engine = ScriptedGenerator(tokenizer, lambda prompt: said(tokenizer, assistant("yes", "so")))
    player = Player(engine, tokenizer, SamplingSettings(8))
    schedule = TaskSchedule({"shares": environment}, ("shares",), prompts, seed, refill=refill)
    model = tiny_model(1, vocab_size=292, max_position_embeddings=512)
    subject = trainer_of(model)
    seen = []
    for step in range(2):
        groups, refilled, _ = draw_groups(subject, player, schedule, step)
        live = [bool(group[0].task.label) for group in groups]
        assert refilled == len(groups) - prompts
        assert sum(live) <= prompts
        if sum(live) < prompts:  # no place was given up before its last round
            assert live.count(False) >= 1 + refill
        else:
            assert sum(live) == prompts
        seen += [group[0].task.id for group in groups]
        metrics = subject.learn(groups, 9)
        counts = (metrics["groups"], metrics["discarded"])
        assert counts == (len(groups), live.count(False))
        assert metrics["skipped"] == (sum(live) < 2)
    assert len(set(seen)) == len(seen)
    first = TaskSchedule({"shares": environment}, ("shares",), prompts, seed)
    assert refill or schedule.draw(1) == first.draw(1)


@settings(max_examples=8)
@given(
    seed=seeds,
    bad=st.sampled_from([math.nan, math.inf, 1e9]),
    updates=st.sampled_from([1, 2]),
    all_bad=st.booleans(),
)
def test_an_update_left_out_moves_nothing(seed, bad, updates, all_bad):
    """Not finite or a spike: weights, momenta and selection bias stay bit for bit, and the log says why."""
    model = tiny_model(seed)
    config = dataclasses.replace(CONFIG, updates_per_rollout=updates)
    subject = trainer_of(model, config, spike_factor=10.0)
    subject.guard.norms.extend([1.0] * 10)
    groups = drawn_groups(seed, [[0, 1], [1, 0]])
    for group in groups:
        for t in group:
            t.segments = recorded(model, t.segments)
    before = weights(model)
    memory = moments(subject.optimizer)
    passes = []

    def spoil(gradient):
        passes.append(1)
        return gradient * bad if all_bad or len(passes) > 1 else gradient * 1e-3

    model.lm_head.weight.register_hook(spoil)
    metrics = subject.learn(groups, 9)
    taken = updates - subject.guard.left_out
    assert metrics["skipped"] == (taken == 0)
    assert taken == (0 if all_bad else 1)
    expected = "not finite" if not math.isfinite(bad) else "spike"
    assert metrics["left_out"] == (expected if taken < updates else None)
    assert same(before, weights(model)) == (taken == 0)
    assert same(memory, moments(subject.optimizer)) == (taken == 0)


@given(
    seed=seeds,
    names=st.lists(
        st.sampled_from(["arithmetic", "retail", "instructions"]), min_size=1, max_size=4
    ),
    count=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_every_environment_is_asked_with_and_without_thinking(seed, names, count, share):
    """Tasks follow from seed and step, none comes twice, and each place in the turn has its share of thinking."""
    steps = 4 * len(names)
    schedule = TaskSchedule(ENVIRONMENTS, names, count, seed, share)
    drawn = [schedule.draw(step) for step in range(steps)]
    assert drawn == [schedule.draw(step) for step in range(steps)]
    tasks, thinking = ([x for step in drawn for x in step[part]] for part in (0, 1))
    assert [t.environment for t in tasks] == [names[n % len(names)] for n in range(steps * count)]
    for place in range(len(names)):  # 4 * count turns, so that every share is a whole number
        assert sum(thinking[place :: len(names)]) == share * 4 * count
    again = [ENVIRONMENTS[t.environment].task(n, seed, "train") for n, t in enumerate(tasks)]
    assert tasks == again


def test_the_log_says_what_happened():
    """Means over all episodes: reward, also by environment, length, truncation, switch; calls of tasks with tools."""
    shop = dataclasses.replace(TASK, environment="shop", tools=({"name": "f"},))
    parts = {"calls": 4, "valid_calls": 3}
    segment = Segment([1, 2, 3], [False, True, True], [0.0, -1.0, -1.0])
    groups = [
        [
            Trajectory(
                TASK,
                True,
                [],
                [segment],
                ["\n<think>a</think>\nfine<|user|>"],
                Score(1.0, "ok", {}),
            ),
            Trajectory(
                TASK,
                True,
                [],
                [segment] * 3,
                ["so we go on " * 60 + "<|user|>"],
                Score(0.0, "wrong", {}),
            ),
        ],
        [
            Trajectory(
                shop, True, [], [segment], ["fine<|user|>"], Score(0.5, "ok", parts), False, False
            ),
            Trajectory(
                shop,
                True,
                [],
                [segment],
                ["fine"],
                Score(0.0, "format", {"calls": 1, "valid_calls": 0}),
                True,
            ),
        ],
    ]
    found = summarize(groups)
    assert found["reward"] == 0.375 and found["reward_by_env"] == {"letters": 0.5, "shop": 0.25}
    assert (found["length"], found["truncated"], found["switch_ok"]) == (3.0, 0.25, 0.75)
    assert found["valid_calls"] == 0.6
    assert found["incidence"]["repetition"] == 0.25
    assert summarize(groups[:1])["valid_calls"] is None


def test_a_step_whose_environments_all_failed_logs_no_reward():
    """No 0, which would say that the policy was wrong, and no NaN: the means are absent, and the failures are counted."""
    failed = Trajectory(TASK, True, [], [], ["fine"], Score(0.0, "infrastructure"))
    found = summarize([[failed, failed]])
    shares = {"live_groups": 0.0, "skipped": True}
    record = RLRecord(stage="rl", step=1, seconds=0.1, **found, **shares)
    absent = {"reward", "length", "truncated", "switch_ok"}
    assert not absent & record.values().keys()
    assert (found["reward_by_env"], found["incidence"], found["infrastructure"]) == ({}, {}, 2)
    assert parse({"kind": "rl", **json.loads(json.dumps(record.values()))}) == record


class Letters(Environment):
    """A bandit: say a letter of the Latin alphabet. Other faults of the turn do not matter here."""

    name = "letters"

    def draw(self, rng, difficulty):
        return [user(f"{rng.randint(0, 10**6)}?")], None

    def episode(self, task):
        return LettersEpisode(task)


class LettersEpisode(Episode):
    """Take any message, malformed or not."""

    message = None

    async def step(self, message):
        """Keep the message."""
        self.done = True
        self.message = message
        return []

    async def score(self):
        """Return 1 for letters."""
        text = self.message["content"] + self.message["reasoning_content"]
        return Score(float(text.isascii() and text.isalpha()), "ok")


LETTERS = RLConfig(("letters",), steps=6, prompts=4, samples=8, max_new_tokens=1, peak_lr=2e-2)


class Run:
    """One process of an RL run: everything is built anew, and only the folder survives from the process before."""

    def __init__(self, folder, config=LETTERS, seconds=1e9, stop_after=None, **options):
        self.options = OptimizerConfig(**options)
        self.model = GLM(tiny_model(1, vocab_size=292).config, seed=3)
        self.optimizer = muon(self.model)
        self.config = config
        self.log = Log(folder / "log.jsonl")
        self.checkpoints = CheckpointStore(folder, self.log, seconds).stage("letters.rl")
        self.stop_after = stop_after
        self.steps = 0
        self.curriculum = None

    def write(self, record):
        """Write to the log; send Ctrl-C during the step to stop after."""
        self.steps += 1
        if self.steps == self.stop_after:
            signal.raise_signal(signal.SIGINT)
        self.log.write(record)

    def go(self):
        """Train to the end, or until stopped."""
        tokenizer = byte_tokenizer()
        trainer = PolicyTrainer(
            self.model, self.optimizer, self.config, self.options, tokenizer.pad
        )
        generator = EngineGenerator(Engine(self.model, tokenizer))
        player = Player(generator, tokenizer, SamplingSettings(self.config.max_new_tokens))
        names = self.config.environments
        schedule = TaskSchedule(
            {"letters": Letters()},
            names,
            self.config.prompts,
            5,
            0.5,
            curriculum=self.curriculum,
        )
        reinforce(trainer, player, schedule, self.checkpoints, self, "letters.rl", quiet=True)
        return self


def logged(folder):
    """Return the log without times."""
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "spans")}
        for r in read_jsonl(folder / "log.jsonl")
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return (folder, run) of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, Run(folder).go()


@settings(max_examples=4)
@given(stops=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_stopped_and_resumed_equals_straight(straight, tmp_path_factory, stops):
    """Ctrl-C after any steps, a new process each time: weights, optimizer and log are those of one run, bit for bit."""
    whole, run = straight
    folder = tmp_path_factory.mktemp("stopped")
    left = LETTERS.steps
    for stop in stops:
        if stop > left:
            break
        with pytest.raises(Stopped):
            Run(folder, stop_after=stop).go()
        left -= stop
    resumed = Run(folder).go()
    assert same(weights(resumed.model), weights(run.model))
    assert logged(folder) == logged(whole)
    states = [r.optimizer.state_dict()["state"] for r in (resumed, run)]
    assert states[0].keys() == states[1].keys()
    assert all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(states[1][k][name]))
        for k, s in states[0].items()
        for name, v in s.items()
    )


MOVING = dataclasses.replace(
    LETTERS,
    dynamic_temperature=DynamicTemperatureConfig(
        window=2, gain=1.0, lowest=1.0, highest=1.2, drop=0.9, risk=0.4, problems=30, samples=2
    ),
)
"""A stage that raises its temperature at each plateau, because almost any loss is allowed."""


def test_rollout_and_loss_share_a_temperature_that_moves(tmp_path):
    """What a step samples with, what its loss divides by and what its record says are one number, before and after."""
    sampled = []
    divided = []
    generate = EngineGenerator.generate
    score = trainer.sampled_log_probabilities

    def generating(self, request):
        sampled.append(request.temperature)
        return generate(self, request)

    def scoring(model, batch, temperature):
        divided.append(temperature)
        return score(model, batch, temperature)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineGenerator, "generate", generating)
        patch.setattr(trainer, "sampled_log_probabilities", scoring)
        run = Run(tmp_path, MOVING)
        run.go()
    records = logged(tmp_path)
    probes = [r for r in records if r["kind"] == "temperature"]
    steps = [r for r in records if r["kind"] == "rl"]
    assert [probe["verdict"] for probe in probes] == ["raised"] and probes[0]["problems"] == 30
    assert probes[0]["step"] == 4 and probes[0]["after"] > 1.0
    expected = [1.0] * 4 + [probes[0]["after"]] * 2
    assert [step["temperature"] for step in steps] == expected
    episodes = LETTERS.prompts * LETTERS.samples
    grid = [1.0, 1.1, 1.2]
    probed = [temperature for temperature in grid for _ in range(30 * 2)]
    assert sampled == [1.0] * 4 * episodes + probed + [probes[0]["after"]] * 2 * episodes
    trained = [step["temperature"] for step in steps if not step["skipped"]]
    assert [t for i, t in enumerate(divided) if not i or t != divided[i - 1]] == [
        t for i, t in enumerate(trained) if not i or t != trained[i - 1]
    ]


@pytest.mark.parametrize("stops", [[3], [4], [5, 1]])
def test_a_temperature_that_moves_is_resumed(tmp_path, stops):
    """Stopped before, at and after a probe: the same decisions, temperatures and weights as in one run."""
    whole = Run(tmp_path / "whole", MOVING).go()
    for stop in stops:
        with pytest.raises(Stopped):
            Run(tmp_path / "stopped", MOVING, stop_after=stop).go()
    resumed = Run(tmp_path / "stopped", MOVING).go()
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")
    assert same(weights(resumed.model), weights(whole.model))


def guarded(folder, stop_after=None, seconds=1e9):
    """Return a run of six steps, the last four of them hard, whose held-out problems are scored every two."""
    run = Run(folder, stop_after=stop_after, seconds=seconds)
    letters = Letters()
    tiers = {tier: {"letters": []} for tier in Tier}
    for tier, split in ((Tier.MODERATE, "train"), (Tier.EXTREME, "development")):
        tasks = letters.distinct_tasks(6, 1, split)
        tiers[tier]["letters"] = [Problem(task, False) for task in tasks]
    config = CurriculumConfig(pool=6, moderate_share=0.34, guard_every=2)
    held = [Problem(task, False) for task in letters.distinct_tasks(40, 2, "development")]
    run.curriculum = Curriculum(config, LETTERS.steps, ("letters",), tiers, held, 1)
    return run


@pytest.mark.parametrize("falls_at", [None, 4, 6])
def test_hard_problems_are_watched_and_rolled_back(tmp_path, falls_at):
    """Scored before the first hard step and then every two; after a fall the last healthy weights, and moderate steps."""
    seen = {}

    def scores(player, environments, prompts, samples, seed):
        assert len(prompts.tasks) == 40 and samples == 4
        done = sum(r["kind"] == "rl" for r in read_jsonl(run.log.path))
        seen[done] = weights(run.model)
        return [0.0 if done == falls_at else 1.0] * 40

    run = guarded(tmp_path, seconds=0)  # a checkpoint would be due after every step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "problem_scores", scores)
        run.go()
    records = read_jsonl(tmp_path / "log.jsonl")
    checks = [(r["step"], r["verdict"]) for r in records if r["kind"] == "curriculum"]
    tiers = [r["tier"] for r in records if r["kind"] == "rl"]
    back = [(r["step"], r["to_step"]) for r in records if r["kind"] == "rollback"]
    if falls_at is None:
        assert checks == [(2, "remembered"), (4, "held"), (6, "held")] and not back
        assert tiers == ["moderate"] * 2 + ["extreme"] * 4
    elif falls_at == 4:
        assert checks == [(2, "remembered"), (4, "fallen")] and back == [(4, 2)]
        assert tiers == ["moderate"] * 2 + ["extreme"] * 2 + ["moderate"] * 2
    else:
        assert checks == [(2, "remembered"), (4, "held"), (6, "fallen")] and back == [(6, 4)]
        assert same(weights(run.model), seen[4]) and not same(seen[4], seen[6])


def test_rewards_of_two_tiers_are_not_compared(tmp_path):
    """The windows of the temperature are filled anew at the first hard step, and after a fall."""
    seen = []
    run = guarded(tmp_path)
    run.config = dataclasses.replace(
        LETTERS, dynamic_temperature=DynamicTemperatureConfig(window=50)
    )
    step = loop.reinforce_step

    def stepping(subject, *rest):
        seen.append(len(subject.temperature.rewards))
        return step(subject, *rest)

    def scores(player, environments, prompts, samples, seed):
        return [0.0 if len(seen) == 4 else 1.0] * 40

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "problem_scores", scores)
        patch.setattr(loop, "reinforce_step", stepping)
        run.go()
    assert seen == [0, 1, 0, 1, 0, 1]  # hard from the third step, moderate again from the fifth


@pytest.mark.parametrize("stops", [[1], [3], [4], [5, 2]])
def test_a_curriculum_is_resumed(tmp_path, stops):
    """Stopped before, at and after a check: the same problems, checks and weights as in one run."""
    whole = guarded(tmp_path / "whole").go()
    for stop in stops:
        with pytest.raises(Stopped):
            guarded(tmp_path / "stopped", stop_after=stop).go()
    resumed = guarded(tmp_path / "stopped").go()
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")
    assert same(weights(resumed.model), weights(whole.model))


def test_the_guard_is_saved_and_restored(tmp_path):
    """A resumed run knows the gradient norms of the steps before, and the counts of skipped ones."""
    with pytest.raises(Stopped):
        Run(tmp_path, stop_after=3, spike_factor=9.0).go()
    state = Run(tmp_path).checkpoints.load({})
    taken = [r for r in logged(tmp_path) if not r["skipped"]]
    assert state["guard"]["norms"] == pytest.approx([r["grad_norm"] for r in taken])
    assert state["step"] == 3


def test_a_stage_that_keeps_failing_rolls_back(tmp_path):
    """After two skipped updates in a row the weights of the last checkpoint return, while the tasks continue."""
    run = Run(tmp_path, rollback_after=2)
    handle = run.model.model.norm.register_forward_hook(
        lambda module, inputs, output: output * float("nan") if torch.is_grad_enabled() else None
    )
    before = weights(run.model)
    run.go()
    handle.remove()
    assert same(before, weights(run.model))
    records = read_jsonl(tmp_path / "log.jsonl")
    skipped = [r for r in records if r["kind"] == "rl" and r.get("left_out") == "not finite"]
    rollbacks = [r for r in records if r["kind"] == "rollback"]
    assert len(skipped) >= 4 and len(rollbacks) == len(skipped) // 2
    assert all(r["to_step"] == 0 for r in rollbacks)
    assert max(r["step"] for r in records if r["kind"] == "rl") == LETTERS.steps


def test_steps_after_the_last_checkpoint_are_done_once(straight, tmp_path):
    """Killed without a word: the steps since the last checkpoint are repeated, and occur in the log once."""
    whole, run = straight
    with pytest.raises(Stopped):
        Run(tmp_path, stop_after=2).go()
    partial = tmp_path / "checkpoints" / "letters.rl" / "partial"
    shutil.copytree(partial, tmp_path / "kept")
    with pytest.raises(Stopped):
        Run(tmp_path, stop_after=2).go()
    shutil.rmtree(partial)
    shutil.copytree(tmp_path / "kept", partial)
    resumed = Run(tmp_path).go()
    assert same(weights(resumed.model), weights(run.model))
    assert logged(tmp_path) == logged(whole)


def test_checkpoints_on_the_way_change_nothing(straight, tmp_path):
    """A checkpoint after every step gives the same run, and the last one is of the last step."""
    _, run = straight
    again = Run(tmp_path, seconds=0).go()
    assert same(weights(again.model), weights(run.model))
    assert again.checkpoints.load({})["step"] == LETTERS.steps
    assert Run(tmp_path).go().steps == 0


def test_what_reinforcement_leaves_alone(straight):
    """The MTP layer and the routers' selection biases have no part in it; the rest of the model has moved."""
    _, run = straight
    fresh = GLM(run.model.config, seed=3)
    mtp = f"model.layers.{fresh.config.num_hidden_layers}."
    moved = {
        name
        for name, value in weights(run.model).items()
        if not torch.equal(value, fresh.state_dict()[name])
    }
    rest = {n for n, _ in fresh.named_parameters() if not n.startswith(mtp)}
    assert not {n for n in moved if n.startswith(mtp) or n.endswith("e_score_correction_bias")}
    assert "lm_head.weight" in moved and len(moved) > 0.8 * len(rest)


def test_reward_rises(tmp_path):
    """Thirty steps on the bandit: from chance to nearly always."""
    run = Run(tmp_path, dataclasses.replace(LETTERS, steps=30, prompts=8)).go()
    rewards = [r["reward"] for r in logged(tmp_path)]
    assert rewards[0] < 0.4 and sum(rewards[-5:]) / 5 > 0.9, rewards
    assert all(r["trained_tokens"] > 0 for r in logged(tmp_path) if not r["skipped"])
    assert run.steps == 30


def test_at_rate_zero_the_gap_is_flat_and_no_weight_moves(tmp_path):
    """Twenty steps of rate 0: not one bit, decay included, and trainer and engine agree in the last as in the first."""
    run = Run(tmp_path, dataclasses.replace(LETTERS, steps=20, peak_lr=0.0))
    before = weights(run.model)
    run.go()
    assert same(before, weights(run.model))
    taken = [r for r in logged(tmp_path) if not r["skipped"]]
    assert len(taken) > 15
    for r in taken:
        # float32 on both sides: the difference of two log-probabilities of about -6 is a few times 1e-6
        assert 0 <= r["gap_mean"] <= r["gap_p99"] <= r["gap_worst"] < 1e-4
        assert 0 <= r["gap_kl"] < 1e-6


def test_an_engine_with_other_weights_is_seen_in_the_gap(tmp_path):
    """An engine that does not get the new weights, the fault that the gap is for: it grows with the steps."""
    run = Run(tmp_path, LETTERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "update_weights", lambda self, state=None: None)
        patch.setattr(Engine, "_current_pages", stale_pages)
        run.go()
    gaps = [r["gap_mean"] for r in logged(tmp_path) if not r["skipped"]]
    assert gaps[0] < 1e-4 < 1e-3 < gaps[-1]


def stale_pages(engine):
    """Return the cache of the first step's weights."""
    if engine._pages is None:
        engine._pages = decoder_for(engine.model)(engine.model, engine.blocks.block_size)
        engine._pages.read_weights()
    return engine._pages


def test_a_model_that_is_always_right_is_not_touched(tmp_path):
    """All rewards equal: every step is skipped and logged as such, and the weights stay, bit for bit."""
    model = tiny_model(1, vocab_size=292)
    tokenizer = byte_tokenizer()
    before = weights(model)
    log = Log(tmp_path / "log.jsonl")
    schedule = TaskSchedule(ENVIRONMENTS, ("arithmetic",), CONFIG.prompts, 5)
    tasks = [task for step in range(3) for task in schedule.draw(step).tasks]
    answers = {
        task.messages[-1]["content"]: said(tokenizer, assistant(task.label, "so")) for task in tasks
    }
    engine = ScriptedGenerator(
        tokenizer, lambda prompt: next(a for q, a in answers.items() if f"\n{q}<|" in prompt)
    )
    config = dataclasses.replace(CONFIG, environments=("arithmetic",), steps=3)
    checkpoints = CheckpointStore(tmp_path, log).stage("rl")
    trainer = PolicyTrainer(model, muon(model), config, OptimizerConfig(), tokenizer.pad)
    player = Player(engine, tokenizer, SamplingSettings(8))
    reinforce(trainer, player, schedule, checkpoints, log, "rl", quiet=True)
    assert engine.updates == 0
    assert same(before, weights(model))
    assert [(r["reward"], r["skipped"], r["live_groups"]) for r in logged(tmp_path)] == [
        (1.0, True, 0.0)
    ] * 3


@settings(max_examples=15)
@given(
    seed=seeds,
    prompts=st.integers(1, 3),
    size=st.sampled_from([1, 13, 30, 60]),
    threads=st.integers(1, 5),
    replay=st.booleans(),
    mtp=st.sampled_from([0.0, 0.5]),
)
def test_a_shared_prompt_changes_no_gradient(seed, prompts, size, threads, replay, mtp):
    """Once for all its answers, or once for each: the same gradient and metrics, and fewer tokens in the passes."""
    model = tiny_model(seed)
    config = dataclasses.replace(CONFIG, mtp_loss_weight=mtp)
    pairs = []
    for i in range(7):
        prompt = drawn_segment(seed + i % prompts).tokens
        answer = drawn_segment(seed + 10 * (i + 1))
        answer.mask[0] = True
        masks = [False] * len(prompt) + answer.mask
        logprobs = [0.0] * len(prompt) + answer.logprobs
        segment = Segment(prompt + answer.tokens, masks, logprobs)
        if replay:
            count = len(segment.tokens)
            segment.experts_SLK = drawn_experts(model, segment.tokens)[: count - 1]
        pairs.append((segment, [1.0, -0.5, 2.0][i % 3]))
    computed = []
    hidden = GLM.hidden

    def counting(self, tokens_BS, *arguments, **options):
        computed.append(tokens_BS.numel())
        return hidden(self, tokens_BS, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GLM, "hidden", counting)
        patch.setattr(PolicyTrainer, "shares_prompts", False)
        apart, expected = gradients(model, pairs, config)
    padded = sum(computed)
    computed.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GLM, "hidden", counting)
        together, metrics = gradients(model, pairs, config)
    assert sum(computed) < padded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "MICROBATCH_TOKENS", size)
        cut, _ = gradients(model, pairs, config, threads=threads)
    for name, x in apart.items():  # as above
        bound = 1e-4 * max(1, x.abs().max())
        torch.testing.assert_close(together[name], x, atol=bound, rtol=1e-3)
        torch.testing.assert_close(cut[name], x, atol=bound, rtol=1e-3)
    metrics.pop("gap"), expected.pop("gap")
    routing = metrics.pop("gap_routing"), expected.pop("gap_routing")
    assert (routing[0] is None) == (routing[1] is None)
    for name, value in expected.items():
        assert metrics[name] == (
            value if value is None else pytest.approx(value, rel=1e-3, abs=1e-4)
        )


@pytest.mark.parametrize(
    "lengths", [[(300, 1)], [(1, 1)] * 40 + [(300, 1)], [(1, 1)]], ids=["long", "uneven", "one"]
)
@given(answers=st.integers(1, 20), most_tokens=st.integers(1, 800))
@example(answers=20, most_tokens=400)
def test_shared_prompts_fill_no_memory_with_their_copies(lengths, answers, most_tokens):
    """However short the answers to a long prompt are, and however uneven the texts: both bounds hold, and each row is there."""
    rows = []
    for prompt, answer in lengths:
        mask = [False] * prompt + [True] * answer
        segment = Segment([prompt] * len(mask), mask, [0.0] * len(mask))
        rows += [Row(segment, 1.0, 0, 1)] * answers
    found = list(sharing_microbatches(by_prompt(rows), most_tokens))
    assert Counter(map(id, itertools.chain(*found))) == Counter(map(id, rows))
    for microbatch in found:
        texts = [row.segment for row in microbatch]
        longest = max(len(text.tokens) for text in texts)
        passed = sum({text.mask.index(True) for text in texts}) + sum(sum(t.mask) for t in texts)
        if len(microbatch) > 1:
            assert passed <= most_tokens
            assert longest * len(microbatch) <= MOST_COPIES * most_tokens


def drawn_experts(model, tokens):
    """Return other experts than a model would choose for some tokens, which depend on the tokens alone: int16 (S, L, K)."""
    config = model.config
    layers = config.num_hidden_layers - config.first_k_dense_replace
    rows = []
    for token in tokens:
        scores_LE = torch.rand(layers, config.n_routed_experts, generator=numbers(token))
        rows.append(scores_LE.topk(config.num_experts_per_tok).indices)
    return torch.stack(rows).to(torch.int16)
