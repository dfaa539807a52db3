"""Reinforcement learning on ranks: the rollouts of one process, and its updates."""

import copy

import torch
from helpers.scripted import byte_tokenizer
from helpers.world import run_ranks

from minglm.common.ranks import Ranks
from minglm.config import (
    Aggregation,
    BalanceConfig,
    Layout,
    OptimizerConfig,
    ParallelConfig,
    PolicyLossConfig,
    RLConfig,
)
from minglm.envs import ENVIRONMENTS
from minglm.envs.base import Task
from minglm.inference import Engine
from minglm.inference.client import EngineGenerator
from minglm.optim.muon import Muon
from minglm.parallel import Replicas, parallelize
from minglm.parallel.mesh import build_meshes
from minglm.parallel.sequence import RowPart
from minglm.parallel.shard import shard
from minglm.parallel.workers import gathered
from minglm.parallel.world import World
from minglm.rl.batch import Sample
from minglm.rl.episode import Player, SamplingSettings, Segment, Trajectory
from minglm.rl.rollout import rollout
from minglm.rl.trainer import PolicyTrainer
from minglm.rl.unify import Distiller, average_into
from minglm.testing.model import tiny_model
from minglm.testing.strategies import numbers

CPU = torch.device("cpu")


def drawn_samples(count):
    """Draw trajectories of one to three segments, most of whose tokens are sampled."""
    samples = []
    for number in range(count):
        segments = []
        for part in range(1 + number % 3):
            generator = numbers(100 * number + part)
            length = int(torch.randint(3, 12, (), generator=generator))
            tokens = torch.randint(0, 24, (length,), generator=generator).tolist()
            logprobs = (-3 * torch.rand(length, generator=generator)).tolist()
            segments.append(Segment(tokens, [False] + [True] * (length - 1), logprobs))
        samples.append(Sample(segments, [1.0, -0.5, 2.0][number % 3]))
    return samples


WHOLE_ROWS = Layout(1, 1, 4, 2, 1)
SHARED_ROWS = [Layout(1, 1, 4, 2, 2), Layout(1, 1, 4, 1, 4)]
EVERYTHING = RLConfig(
    max_new_tokens=12,
    loss=PolicyLossConfig(aggregation=Aggregation.SEQUENCE, importance_cap=2.0),
    mtp_loss_weight=0.5,
    balance_loss=True,
    balance_bias=True,
)
CASES = [
    (WHOLE_ROWS, RLConfig(max_new_tokens=12), 1),
    (WHOLE_ROWS, RLConfig(max_new_tokens=12), 7),
    (SHARED_ROWS[0], EVERYTHING, 1),
    (SHARED_ROWS[0], RLConfig(max_new_tokens=12), 7),
    (SHARED_ROWS[1], EVERYTHING, 5),
]
"""Layout, stage, number of trajectories."""


def updates(cases, part=None):
    """Return, for each case, how far metrics and weights are from those of one process.

    part: the part of each row that every rank computes in place of its own, for a broken twin.
    """
    world = World(CPU)
    found = []
    for number, (layout, config, count) in enumerate(cases):
        meshes = build_meshes(layout, "cpu")
        plain = tiny_model(number)
        model = copy.deepcopy(plain)
        shard(model, meshes, ParallelConfig())
        workers = parallelize(model, world=world, meshes=meshes)
        if part is not None:
            workers.row_part = part
        options = OptimizerConfig()
        balance = BalanceConfig(bias_rate=0.01, sequence_loss_weight=0.5)
        ours = PolicyTrainer(
            model, Muon(model, options), config, options, 0, workers, balance=balance
        )
        theirs = PolicyTrainer(plain, Muon(plain, options), config, options, 0, balance=balance)
        results = []
        for trainer in (ours, theirs):
            samples = drawn_samples(count)
            if config.loss.importance_cap:
                trainer.record_proximal(samples)
            results.append(trainer.update(samples, 0.01))
        a, b = results
        a |= a.pop("gap")._asdict()
        b |= b.pop("gap")._asdict()
        absent = {name for name, value in b.items() if value is None}
        assert absent == {name for name, value in a.items() if value is None}
        b = {name: value for name, value in b.items() if name not in absent}
        assert a.pop("p99") >= b.pop("p99") - 1e-4  # over ranks it is the largest of theirs
        metrics = max(abs(a[name] - value) / max(1.0, abs(value)) for name, value in b.items())
        values = workers.weights()
        weights = [(values[k] - value).abs().max() for k, value in plain.state_dict().items()]
        found.append((metrics, float(max(weights))))
    return found


def test_an_update_on_ranks_is_that_of_one_process():
    """One trajectory for four ranks, so that most make passes with nothing to learn, and more than ranks; segments share
    the advantage of their trajectory wherever they are computed. Ranks that share rows have fewer positions than a row has
    sampled tokens, and some parts have none; the MTP layer and the balance learn across the cuts too."""
    for found in run_ranks(updates, 4, CASES):
        for case, (metrics, weights) in zip(CASES, found, strict=True):
            # float32; Newton-Schulz magnifies the rounding, and a wrong gradient moves a weight by 2e-3
            assert metrics < 1e-4 and weights < 2e-5, (case, metrics, weights)


def test_a_cut_in_the_wrong_place_is_found():
    """The broken twin: every rank computes the first half of each row."""
    case = (Layout(1, 1, 2, 1, 2), RLConfig(max_new_tokens=12), 3)
    for metrics, weights in run_ranks(updates, 2, [case], RowPart(0, 2))[0]:
        assert metrics > 1e-3 and weights > 1e-4


def distilled(cases):
    """Return, for each layout and number of answers, how far on-policy distillation is from that of two threads."""
    world = World(CPU)
    found = []
    for number, (layout, count) in enumerate(cases):
        meshes = build_meshes(layout, "cpu")
        sides = []
        for sharded in (True, False):
            student, *experts = (tiny_model(number + k) for k in range(3))
            workers = Replicas(student, 2)
            if sharded:
                for model in (student, *experts):
                    shard(model, meshes, ParallelConfig())
                workers = parallelize(student, world=world, meshes=meshes)
            options = OptimizerConfig()
            judges = {"even": experts[0], "odd": experts[1]}
            optimizer = Muon(student, options)
            distiller = Distiller(student, optimizer, judges, 0.01, options.clip_norm, 0, workers)
            answers = []
            for n, sample in enumerate(drawn_samples(count)):
                task = Task(str(n), ["even", "odd"][n % 2], (), (), None, 1)
                answers.append(Trajectory(task, True, segments=list(sample.segments)))
            metrics = distiller.learn(answers, 4)
            sides.append((metrics, workers.weights()))
        (ours, weights), (theirs, wanted) = sides
        metrics = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))
        moved = max(float((weights[k] - value).abs().max()) for k, value in wanted.items())
        found.append((metrics, moved))
    return found


def test_distillation_on_ranks_is_that_of_two_threads():
    """One answer to the prompts of one expert for four ranks, and more than ranks; ranks that share rows."""
    cases = [(WHOLE_ROWS, 2), (WHOLE_ROWS, 11), (SHARED_ROWS[0], 3)]
    for found in run_ranks(distilled, 4, cases):
        for case, (metrics, weights) in zip(cases, found, strict=True):
            # As above: float32, and Newton-Schulz magnifies the rounding.
            assert metrics < 1e-4 and weights < 2e-5, (case, metrics, weights)


def averaged():
    """Return how far the mean of three sharded models is from that of whole ones."""
    meshes = build_meshes(WHOLE_ROWS, "cpu")
    means = []
    for sharded in (True, False):
        models = [tiny_model(number) for number in range(4)]
        if sharded:
            for model in models:
                shard(model, meshes, ParallelConfig())
        average_into(models[0], models[1:])
        means.append(models[0].state_dict())
    ours, wanted = means
    return max(float((gathered(ours[k]) - value).abs().max()) for k, value in wanted.items())


def test_the_mean_of_sharded_experts():
    """It is that of whole ones, whichever rank holds a weight, to float32's rounding."""
    assert all(far < 1e-6 for far in run_ranks(averaged, 4))


def answers(ranks):
    """Play some tasks twice with a tiny model; return the tokens, scores and log-probabilities."""
    tokenizer = byte_tokenizer()
    model = tiny_model(1, vocab_size=tokenizer.vocab_size, max_position_embeddings=4096).eval()
    player = Player(
        EngineGenerator(Engine(model, tokenizer)),
        tokenizer,
        SamplingSettings(6, max_turns=2),
        ranks,
    )
    tasks = [*ENVIRONMENTS["arithmetic"].tasks(2, 0), *ENVIRONMENTS["retail"].tasks(1, 0)]
    groups = rollout(player, ENVIRONMENTS, tasks, 2, [True, False, True], seed=3)
    return [
        ([s.tokens for s in t.segments], t.score.value, t.segments[0].logprobs)
        for group in groups
        for t in group
    ]


def divided_answers():
    """Play them divided over the ranks."""
    return answers(Ranks.of_the_world())


def test_ranks_sample_what_one_process_samples():
    """Six episodes over four ranks: each rank has all of them, in order, with the tokens that one process samples."""
    wanted = answers(Ranks())
    for found in run_ranks(divided_answers, 4):
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours[:2] == theirs[:2]
            # The last bits depend on what shares a batch.
            torch.testing.assert_close(
                torch.tensor(ours[2]), torch.tensor(theirs[2]), atol=1e-5, rtol=1e-5
            )
