"""Exact log-probabilities: the trainer's are the engine's, to the last bit."""

import pytest
import torch
from helpers.scripted import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.cli.main import main
from minglm.config import OptimizerConfig, RLConfig, load_config
from minglm.envs import ENVIRONMENTS
from minglm.inference import Engine
from minglm.inference.client import EngineGenerator
from minglm.inference.scoring import Scorer, Text
from minglm.kernels.cpu import build
from minglm.optim.muon import Muon
from minglm.parallel import Replicas
from minglm.rl.batch import Sample, collate, sampled_log_probabilities
from minglm.rl.episode import Player, SamplingSettings, Segment
from minglm.rl.exact import with_values
from minglm.rl.rollout import rollout
from minglm.rl.trainer import PolicyTrainer
from minglm.testing.inference import check_scorer
from minglm.testing.model import tiny_model
from minglm.testing.strategies import seeds

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler here")


def by_engine(model, texts, temperature):
    """Score with the engine's decoder."""
    return Scorer(model).log_probabilities(texts, temperature)


def test_scores_have_the_bits_of_the_engine():
    """Any prompts, answers, batches, pieces, drafts, temperatures."""
    check_scorer(by_engine)


def by_training_pass(model, texts, temperature):
    """Score with the trainer's own forward pass: equal but for rounding."""
    found = []
    for text in texts:
        segment = Segment(list(text.tokens), list(text.scored), [0.0] * len(text.tokens))
        batch = collate([segment], 0)
        with torch.no_grad():
            logprobs_BS = sampled_log_probabilities(model, batch, temperature).logprobs_BS
        found.append(logprobs_BS[batch.mask_BS])
    return found


def in_other_blocks(model, texts, temperature):
    """Add up the attention in larger blocks than the engine's."""
    return Scorer(model, 5).log_probabilities(texts, temperature)


def without_temperature(model, texts, temperature):
    """Forget the temperature."""
    return by_engine(model, texts, 1.0)


def of_the_token_before(model, texts, temperature):
    """Score each token one position too early."""
    early = [Text(text.tokens, [*text.scored[1:], text.scored[0]]) for text in texts]
    return by_engine(model, [Text(t.tokens, [False, *t.scored[1:]]) for t in early], temperature)


@pytest.mark.parametrize(
    "broken", [by_training_pass, in_other_blocks, without_temperature, of_the_token_before]
)
def test_the_check_finds_faults(broken):
    """Each broken twin fails."""
    with pytest.raises(AssertionError):
        check_scorer(broken)


@given(seed=seeds)
def test_values_are_exact_and_the_gradient_is_the_other(seed):
    """No rounding of a + (b - a): the values are there bit for bit, and x gets the gradient."""
    x = torch.randn(9, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    values = 1e-3 * x.detach() + 7
    y = with_values(x, values)
    assert torch.equal(y, values)
    (gradient,) = torch.autograd.grad((y * torch.arange(9.0)).sum(), x)
    assert torch.equal(gradient, torch.arange(9.0))


def played(model, turns, seed, temperature):
    """Return the trajectories of two tasks, three samples each, as samples to learn from."""
    tokenizer = byte_tokenizer()
    name = "retail" if turns > 1 else "arithmetic"
    engine = EngineGenerator(Engine(model, tokenizer))
    player = Player(engine, tokenizer, SamplingSettings(12, temperature, max_turns=turns))
    groups = rollout(player, ENVIRONMENTS, ENVIRONMENTS[name].tasks(2, seed), 3, seed=seed)
    return [Sample(t.segments, (-1.0) ** g) for group in groups for g, t in enumerate(group)]


@settings(max_examples=3)
@given(
    seed=seeds,
    turns=st.sampled_from([1, 2]),
    threads=st.sampled_from([1, 2]),
    temperature=st.sampled_from([1.0, 0.8]),
)
def test_the_first_ratio_is_one_to_the_bit(seed, turns, threads, temperature):
    """Several turns, padding, threads, temperatures: ratio 1, divergence 0, and the gradient of the training pass."""
    found = []
    for exact in (True, False):
        model = tiny_model(seed, vocab_size=292, max_position_embeddings=4096)
        samples = played(model, turns, seed, temperature)
        config = RLConfig(("x",), max_new_tokens=12, max_turns=turns, temperature=temperature)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        workers = Replicas(model, threads)
        scorer = Scorer(model) if exact else None
        options = OptimizerConfig(clip_norm=0.0)
        trainer = PolicyTrainer(model, optimizer, config, options, 0, workers, scorer=scorer)
        trainer.optimizer.zero_grad = lambda: None  # keep the gradient
        metrics = trainer.update(samples, 0.0)
        found.append([p.grad for p in model.parameters()])
        if exact:
            assert metrics["ratio_max"] == 1.0
            assert metrics["kl"] == 0.0
            assert metrics["gap"] == (0.0, 0.0, 0.0, 0.0)
    for a, b in zip(*found, strict=True):
        if a is None:  # of the MTP layer
            assert b is None
        else:  # ratios of 1 and of 1 + 1e-6, times gradients of up to 10
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_it_stays_exact_when_the_weights_move():
    """Several steps of Muon: each new rollout agrees to the bit with the weights that it was drawn from."""
    model = tiny_model(3, vocab_size=292, max_position_embeddings=512)
    options = OptimizerConfig()
    config = RLConfig(("arithmetic",), max_new_tokens=12)
    trainer = PolicyTrainer(model, Muon(model, options), config, options, 0, scorer=Scorer(model))
    for step in range(3):
        metrics = trainer.update(played(model, 1, step, 1.0), 1e-2)
        assert metrics["left_out"] is None
        assert metrics["gap"].worst == 0.0
    again = trainer.update(played(tiny_model(3, vocab_size=292), 1, 0, 1.0), 1e-2)
    assert again["gap"].worst > 0, "a rollout of other weights"


WORDS = ["run", "configs/nano.py", "--dry-run", "--posttraining.chat.rl.exact", "true"]


@pytest.mark.parametrize(
    "words, needs",
    [
        (["--dtype", "bfloat16"], "dtype = float32, and it is bfloat16"),
        (["--rollouts", "float8"], "rollouts = model, and it is float8"),
        (["--kernels", "torch"], "kernels = auto, and it is torch"),
    ],
)
def test_what_cannot_be_exact_is_refused(words, needs, tmp_path, capsys):
    """One line that names the field, before anything starts."""
    assert main([*WORDS, *words, "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == f"minglm: posttraining.chat.rl.exact needs {needs}\n"
    assert not (tmp_path / "x").exists()


def test_a_run_can_ask_for_it():
    """The option reaches the stage, and changes the run."""
    plain = load_config("configs/nano.py")
    asked = load_config("configs/nano.py", WORDS[3:])
    assert asked.posttraining.chat.rl.exact and asked.hash() != plain.hash()


def test_a_model_that_c_does_not_know_is_refused():
    """One line, which says what the decoder takes."""
    grouped = tiny_model(1, n_routed_experts=4, n_group=2, topk_group=1)
    with pytest.raises(ValueError, match=r"^exact log-probabilities need the C decoder: [^\n]*$"):
        Scorer(grouped)
