"""Routing replay: the engine returns the experts of each token, and training goes through them."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers.scripted import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.config import OptimizerConfig, RLConfig
from minglm.envs import ENVIRONMENTS
from minglm.inference import Engine, Request
from minglm.inference.client import EngineGenerator
from minglm.kernels import dispatch
from minglm.model.moe import MoE
from minglm.rl.batch import Sample
from minglm.rl.episode import Player, SamplingSettings
from minglm.rl.rollout import rollout
from minglm.rl.trainer import PolicyTrainer
from minglm.testing.model import tiny_model
from minglm.testing.rl import check_routing_replay
from minglm.testing.strategies import numbers, seeds


def forward(model, tokens_BS, imposed_BSLK):
    """Run the model, with imposed experts or without."""
    return model.hidden(tokens_BS, imposed_BSLK=imposed_BSLK)


def test_replay_is_its_contract():
    """Own choices change no bit; other experts get the weights of the model's own scores."""
    check_routing_replay(forward)


def shifted(model, tokens_BS, imposed_BSLK):
    """Impose each choice one position too late."""
    late = None if imposed_BSLK is None else imposed_BSLK.roll(1, 1)
    return forward(model, tokens_BS, late)


def ignored(model, tokens_BS, imposed_BSLK):
    """Choose anew, as without replay."""
    out = forward(model, tokens_BS, None)
    for routing in out.routing:
        routing.replaced = torch.zeros((), dtype=torch.int64)
    return out


def other_layer(model, tokens_BS, imposed_BSLK):
    """Impose on each layer what another one chose."""
    return forward(model, tokens_BS, None if imposed_BSLK is None else imposed_BSLK.flip(2))


def detached(model, tokens_BS, imposed_BSLK):
    """Take the weights of the imposed experts as constants, so that the router learns nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if imposed_BSLK is not None:
            for layer in model.modules():
                if isinstance(layer, MoE):
                    impose = layer.gate.impose
                    patch.setattr(
                        layer.gate,
                        "impose",
                        lambda routes, imposed, impose=impose: impose(routes, imposed)._replace(
                            weights_TK=impose(routes, imposed).weights_TK.detach()
                        ),
                    )
        return forward(model, tokens_BS, imposed_BSLK)


@pytest.mark.parametrize("broken", [shifted, ignored, other_layer, detached])
def test_the_check_finds_faults(broken):
    """Each broken twin fails."""
    with pytest.raises((AssertionError, TypeError)):
        check_routing_replay(broken)


def own_choices(model, tokens):
    """Return the experts that a forward pass of the whole text takes, (S, L, K)."""
    with torch.no_grad():
        out = model.hidden(torch.tensor([tokens]))
    return torch.stack([routing.experts_TK for routing in out.routing], 1)


@settings(max_examples=8)
@given(
    seed=seeds,
    drafts=st.sampled_from([0, 2]),
    cut=st.sampled_from([3, 2048]),
    kernels=st.sampled_from(["auto", "torch"]),
    tight=st.booleans(),
)
def test_the_engine_returns_the_experts_of_every_token(seed, drafts, cut, kernels, tight):
    """Drafted, cut, preempted, continued from another request's blocks, in C or in PyTorch: those of the whole text."""
    dispatch.use(kernels)
    try:
        model = tiny_model(seed)
        prompt = torch.randint(0, 24, (9,), generator=numbers(seed)).tolist()
        # Room for the longest text alone when tight, so that of the others most wait or are computed again.
        engine = Engine(
            model,
            draft_tokens=drafts,
            prefill_tokens=cut,
            block=2,
            cache_tokens=26 if tight else None,
            keep_choices=True,
        )
        requests = [Request(prompt, 6, seed=i, stop_ids=()) for i in range(3)]
        requests.append(Request(prompt[:5], 8, seed=9, stop_ids=()))
        answers = engine.generate(requests)
        longer = Request(prompt + answers[0].tokens + [1, 2], 3, stop_ids=())
        answers += engine.generate([longer])
        differ = 0
        for request, answer in zip([*requests, longer], answers, strict=True):
            text = request.prompt + answer.tokens
            assert answer.experts_SLK.dtype == torch.uint8
            assert len(answer.experts_SLK) == len(text) - 1
            own = own_choices(model, text)[:-1]
            differ += int((answer.experts_SLK != own).sum())
        # Scores that are equal up to rounding are in either order: none in nearly all examples.
        assert differ <= 4
    finally:
        dispatch.use("auto")


def test_an_engine_that_was_not_asked_keeps_nothing():
    """Nothing is stored and nothing is returned."""
    engine = Engine(tiny_model(0))
    assert engine.generate([Request([1, 2], 3)])[0].experts_SLK is None


def test_experts_beyond_a_byte():
    """More than 256 experts are numbered in sixteen bits."""
    model = tiny_model(0, n_routed_experts=300, num_experts_per_tok=3)
    answer = Engine(model, keep_choices=True).generate([Request([1, 2, 3], 4, stop_ids=())])[0]
    assert answer.experts_SLK.dtype == torch.int16
    assert torch.equal(answer.experts_SLK, own_choices(model, [1, 2, 3, *answer.tokens])[:-1])


def gap_of(model, groups, config):
    """Return what an update of rate 0 on the groups measures before it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = PolicyTrainer(model, optimizer, config, OptimizerConfig(), 0)
    samples = [Sample(t.segments, 1.0) for group in groups for t in group]
    return SimpleNamespace(**trainer.update(samples, 0.0))


def played(model, name, tokens, samples, seed, **options):
    """Return groups of two tasks of an environment."""
    tokenizer = byte_tokenizer()
    engine = Engine(model, tokenizer, keep_choices=True, **options)
    player = Player(EngineGenerator(engine), tokenizer, SamplingSettings(tokens, max_turns=2))
    tasks = ENVIRONMENTS[name].tasks(2, seed)
    return rollout(player, ENVIRONMENTS, tasks, samples, seed=seed)


CONFIG = RLConfig(("arithmetic",), samples=2)


@settings(max_examples=2)
@given(seed=seeds)
def test_an_episode_brings_the_experts_of_all_its_turns(seed):
    """Prompts, answers and tool results: what the engine chose is what the trainer's routers choose in float32."""
    model = tiny_model(seed, vocab_size=292, max_position_embeddings=4096)
    groups = played(model, "retail", 6, 2, seed)
    for group in groups:
        for t in group:
            for segment in t.segments:
                assert len(segment.experts_SLK) == len(segment.tokens) - 1 - segment.mask[
                    ::-1
                ].index(True)
    assert (
        gap_of(model, groups, CONFIG).gap_routing < 1e-3
    )  # equal but for scores that rounding orders


@pytest.mark.parametrize("seed", [0, 1])
def test_replay_closes_the_gap_of_float8(seed):
    """Float8 rollouts choose other experts for some tokens; through the same ones the log-probabilities are nearer."""
    model = tiny_model(seed, vocab_size=292, max_position_embeddings=512, n_routed_experts=16)
    groups = played(model, "arithmetic", 60, 6, seed, experts="float8")
    with_replay = gap_of(model, groups, CONFIG)
    assert 0 < with_replay.gap_routing < 0.2
    for group in groups:
        for t in group:
            t.segments = [dataclasses.replace(s, experts_SLK=None) for s in t.segments]
    without = gap_of(model, groups, CONFIG)
    assert without.gap_routing is None
    assert with_replay.gap.kl < 0.8 * without.gap.kl
