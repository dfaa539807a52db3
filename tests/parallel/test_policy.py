"""Reinforcement learning on ranks: the rollouts of one process, and its updates."""

import copy

import torch
from helpers.scripted import byte_tokenizer
from helpers.world import run_ranks

from minglm.common.ranks import Ranks
from minglm.config import Layout, OptimizerConfig, ParallelConfig, RLConfig
from minglm.envs import ENVIRONMENTS
from minglm.inference import Engine
from minglm.inference.client import EngineGenerator
from minglm.optim.muon import Muon
from minglm.parallel import parallelize
from minglm.parallel.mesh import build_meshes
from minglm.parallel.shard import shard
from minglm.parallel.world import World
from minglm.rl.episode import Player, SamplingSettings, Segment
from minglm.rl.rollout import rollout
from minglm.rl.trainer import PolicyTrainer, Sample
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


def updates(counts):
    """Return, for each number of trajectories, how far metrics and weights are from those of one process."""
    world = World(CPU)
    meshes = build_meshes(Layout(1, 1, 4, 2, 1), "cpu")
    config = RLConfig(max_new_tokens=12)
    found = []
    for count in counts:
        plain = tiny_model(count)
        model = copy.deepcopy(plain)
        shard(model, meshes, ParallelConfig())
        workers = parallelize(model, world=world, meshes=meshes)
        samples = drawn_samples(count)
        options = OptimizerConfig()
        ours = PolicyTrainer(model, Muon(model, options), config, options, 0, workers)
        theirs = PolicyTrainer(plain, Muon(plain, options), config, options, 0)
        a, b = ours.update(samples, 0.01), theirs.update(samples, 0.01)
        assert a.pop("left_out") is b.pop("left_out") is None
        metrics = max(abs(a[name] - value) / max(1.0, abs(value)) for name, value in b.items())
        values = workers.weights()
        weights = [(values[k] - value).abs().max() for k, value in plain.state_dict().items()]
        found.append((metrics, float(max(weights))))
    return found


def test_an_update_on_ranks_is_that_of_one_process():
    """One trajectory for four ranks, so that most make passes with nothing to learn, and more than ranks; segments share
    the advantage of their trajectory wherever they are computed."""
    for found in run_ranks(updates, 4, [1, 7]):
        for metrics, weights in found:
            # float32; Newton-Schulz magnifies the rounding, and a wrong gradient moves a weight by 2e-3
            assert metrics < 1e-4 and weights < 2e-5, (metrics, weights)


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
