"""Replicas: threads that share the weights give the gradients of one model, and share nothing else."""

import dataclasses

import pytest
import torch
from helpers.tiny import constant_phase, drawn_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.config import OptimizerConfig
from minglm.model.glm import GLM
from minglm.optim.muon import Muon
from minglm.parallel.replicas import Replicas, sharing
from minglm.testing.model import tiny_model
from minglm.testing.strategies import seeds
from minglm.train.loop import accumulate, step


def gradients(model, count, batch, **values):
    """Return (losses, loads, {name: gradient or None}) of a batch that `count` threads share."""
    model.zero_grad()
    replicas = Replicas(model, count)
    sums = accumulate(model, batch, constant_phase(**values), 0.3, replicas)._asdict()
    loads = sums.pop("tokens_per_expert_LE")
    return sums, loads, {name: p.grad for name, p in model.named_parameters()}


@settings(max_examples=15)
@given(
    seed=seeds,
    B=st.integers(1, 6),
    count=st.integers(1, 5),
    size=st.integers(1, 40),
    packed=st.booleans(),
)
def test_shared_among_threads_a_batch_has_the_same_gradient(seed, B, count, size, packed):
    """Losses, loads and gradients do not depend on how many threads compute them, nor on the micro-batches of each."""
    model, batch = tiny_model(seed), drawn_batch(seed, B, 8, packed)
    sums, loads, expected = gradients(model, 1, batch, balance_weight=0.01)
    others, found_loads, found = gradients(
        model, count, batch, balance_weight=0.01, microbatch_tokens=size
    )
    assert others == pytest.approx(sums, rel=1e-5, abs=1e-6) and torch.equal(loads, found_loads)
    for name, grad in expected.items():  # float32 sums in another order
        torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("count", [2, 3])
def test_equal_counts_give_equal_bits(count):
    """The speed of the threads does not matter: gradients are added up in the order of the replicas."""
    model, batch = tiny_model(1), drawn_batch(1, 6, 8, True)
    runs = [gradients(model, count, batch, microbatch_tokens=8) for _ in range(5)]
    for _, _, found in runs[1:]:
        assert all(
            torch.equal(found[name], grad) for name, grad in runs[0][2].items() if grad is not None
        )


@settings(max_examples=8)
@given(seed=seeds, tied=st.booleans())
def test_replicas_see_every_step(seed, tied):
    """After a step, a loaded state and a moved bias, all replicas compute what the model computes, bit for bit."""
    config = dataclasses.replace(tiny_model(seed).config, tie_word_embeddings=tied)
    model, batch = GLM(config, seed), drawn_batch(seed, 3, 8, False)
    replicas = Replicas(model, 3)
    optimizer = Muon(model.named_parameters(), OptimizerConfig())
    step(
        model, optimizer, batch, constant_phase(learning_rate=0.1, bias_rate=0.5), 0, None, replicas
    )
    model.load_state_dict({name: value + 0.125 for name, value in model.state_dict().items()})
    wanted = model(batch.tokens_BS)
    for replica in replicas.models:
        assert torch.equal(replica(batch.tokens_BS), wanted)
        assert all(p.grad is None for p in replica.parameters()), (
            "a gradient is left that the next step would add"
        )


def test_a_replica_owns_its_gradients_only():
    """The copy has other parameters over the same memory, and the same buffers."""
    model = tiny_model(1)
    copy = sharing(model)
    pairs = list(zip(model.parameters(), copy.parameters(), strict=True))
    assert all(a is not b and a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert all(a is b for a, b in zip(model.buffers(), copy.buffers(), strict=True))


def test_an_error_in_a_thread_is_raised_and_shares_must_have_a_replica():
    """An error in a thread is raised, and no share of a batch is silently dropped."""
    replicas = Replicas(torch.nn.Linear(1, 1), 2)

    def work(_, share):
        if share:
            raise ValueError("this share")
        return share

    assert replicas.run(work, [0, 0]) == [0, 0]
    with pytest.raises(ValueError, match="this share"):
        replicas.run(work, [0, 1])
    with pytest.raises(AssertionError):
        replicas.run(work, [0, 0, 0])
