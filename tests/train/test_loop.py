"""The training loop: the cut into micro-batches changes nothing, and biases and logs are updated once per step."""

import dataclasses
import math

import pytest
import torch
from helpers.tiny import constant_phase, drawn_batch, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.loss.loss_utils import ForCausalLMLoss

from minglm.config import OptimizerConfig
from minglm.data.packing import Batch
from minglm.model.glm import GLM
from minglm.optim.muon import Muon
from minglm.testing.model import drawn_documents, tiny_model
from minglm.testing.strategies import numbers, seeds
from minglm.train.guard import Guard
from minglm.train.loop import accumulate, step
from minglm.train.loss import (
    LossTerms,
    LossWeights,
    count_targets,
    next_token_targets,
    training_loss,
)


@settings(max_examples=15)
@given(
    seed=seeds,
    B=st.integers(1, 5),
    S=st.integers(3, 9),
    packed=st.booleans(),
    size=st.integers(1, 30),
)
def test_micro_batches_change_no_gradient(seed, B, S, packed, size):
    """Losses, loads and every gradient are the same for any bound on the tokens of a pass."""
    model = tiny_model(seed)
    batch = drawn_batch(seed, B, S, packed)
    batch.mask_BS[seed % B] = (
        False  # a row, and with it perhaps a whole micro-batch, without any target
    )
    sums, whole, loads = gradients(model, batch, 0.3, balance_weight=0.1)
    other_sums, cut, other_loads = gradients(
        model, batch, 0.3, balance_weight=0.1, microbatch_tokens=size
    )
    assert torch.equal(loads, other_loads)
    assert sums == pytest.approx(other_sums, abs=1e-4)
    for name in whole:  # float32 sums of up to 45 tokens in another order
        torch.testing.assert_close(whole[name], cut[name], atol=1e-4, rtol=1e-3)


@settings(max_examples=12)
@given(
    seed=seeds, bad=st.sampled_from([math.nan, math.inf, -math.inf, 1e9]), steps=st.integers(1, 3)
)
def test_a_step_left_out_moves_nothing(seed, bad, steps):
    """Not finite or a spike: weights, biases and the optimizer's memory stay bit for bit; the next step moves them."""
    model = tiny_model(seed)
    batch = drawn_batch(seed, 3, 8, False)
    optimizer = Muon(model, OptimizerConfig())
    guard = Guard(spike_factor=10.0)
    phase = constant_phase(bias_rate=0.1)

    def state():
        memory = optimizer.state_dict()["state"]
        values = {f"{n}.{k}": v for n, s in memory.items() for k, v in s.items()}
        both = model.state_dict() | values
        return {name: torch.as_tensor(value).clone() for name, value in both.items()}

    usual = step(model, optimizer, batch, phase, 0, guard).grad_norm
    guard.norms.extend([usual] * 10)  # enough to judge by
    before = state()
    handle = model.lm_head.weight.register_hook(lambda gradient: gradient * bad)
    for _ in range(steps):
        metrics = step(model, optimizer, batch, phase, 0, guard)
        assert metrics.left_out == ("spike" if math.isfinite(bad) else "not finite")
    handle.remove()
    after = state()
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert not moved
    step(model, optimizer, batch, phase, 0, guard)
    moved = {name for name, value in state().items() if not torch.equal(value, before[name])}
    assert "lm_head.weight" in moved and any("e_score_correction_bias" in name for name in moved)


@given(seed=seeds, packed=st.booleans(), offset=st.sampled_from([1, 2]))
def test_targets_lie_ahead(seed, packed, offset):
    """A target is the token at the offset; beyond the end of the row it is 0 and never counts."""
    batch = drawn_batch(seed, 3, 8, packed)
    batch.mask_BS[:] = True
    targets = next_token_targets(batch.tokens_BS, batch.mask_BS, batch.documents_BS, offset)
    assert torch.equal(targets.tokens_BS[:, :-offset], batch.tokens_BS[:, offset:])
    assert not targets.tokens_BS[:, -offset:].any() and not targets.counts_BS[:, -offset:].any()


@given(seed=seeds, packed=st.booleans())
def test_loss_is_the_mean_over_targets(seed, packed):
    """The logged losses are plain means of cross-entropy over the targets that count, of trunk and MTP layer."""
    model = tiny_model(seed)
    batch = drawn_batch(seed, 3, 8, packed)
    terms = accumulate(model, batch, constant_phase(), 0.3)
    model.zero_grad()
    with torch.no_grad():
        out = model.hidden(batch.tokens_BS, batch.positions_BS, batch.documents_BS, mtp=True)
    for name, hidden_BSD, ahead in (
        ("loss", out.hidden_BSD, 1),
        ("mtp_loss", out.mtp_hidden_BSD, 2),
    ):
        losses = []
        for b in range(3):
            for s in range(8 - ahead):
                if not batch.mask_BS[b, s + ahead]:
                    continue
                if packed and batch.documents_BS[b, s] != batch.documents_BS[b, s + ahead]:
                    continue
                logp_V = model.lm_head(hidden_BSD[b, s]).log_softmax(-1)
                losses.append(-logp_V[batch.tokens_BS[b, s + ahead]].item())
        expected = sum(losses) / max(1, len(losses))
        assert getattr(terms, name) == pytest.approx(expected, abs=1e-4)  # float32


@given(seed=seeds, packed=st.booleans(), rows=st.integers(1, 3))
def test_losses_of_parts_add_up(seed, packed, rows):
    """The terms of the parts of a batch, divided by the counts of the whole, add up to those of the whole."""
    model = tiny_model(seed)
    batch = drawn_batch(seed, 3, 8, packed)
    weights = LossWeights(mtp=0.3, balance=0.1)
    counts = count_targets(model, batch, weights)
    whole = training_loss(model, batch, counts, weights)
    parts = [training_loss(model, part, counts, weights) for part in batch.split(rows)]
    for name in LossTerms._fields:
        total = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(total, getattr(whole, name), atol=1e-5, rtol=1e-5, msg=name)
    expected = whole.cross_entropy + 0.3 * whole.mtp + 0.1 * whole.balance
    torch.testing.assert_close(whole.loss, expected)
    out = model.hidden(batch.tokens_BS, batch.positions_BS, batch.documents_BS, mtp=True)
    of_routers = [routing.balance_loss for routing in out.routing]
    assert len(of_routers) == 3
    torch.testing.assert_close(whole.balance, sum(of_routers) / 3)


@given(seed=seeds, rows=st.integers(1, 3))
def test_the_loss_of_a_batch_in_parts_is_that_of_transformers(seed, rows):
    """Labels of -100 where the mask is False, and the number of targets of the whole batch, as its trainer passes it."""
    model, batch = tiny_model(seed), drawn_batch(seed, 3, 8, packed=False)
    weights = LossWeights(mtp=0.0, balance=0.0)
    counts = count_targets(model, batch, weights)
    parts = [training_loss(model, part, counts, weights).loss for part in batch.split(rows)]

    with torch.no_grad():
        logits_BSV = model(batch.tokens_BS)
    labels_BS = batch.tokens_BS.masked_fill(~batch.mask_BS, -100)
    targets = (labels_BS[:, 1:] != -100).sum()
    expected = ForCausalLMLoss(
        logits_BSV, labels_BS, model.config.vocab_size, num_items_in_batch=targets
    )
    torch.testing.assert_close(sum(parts), expected, atol=1e-5, rtol=1e-5)  # float32


def optimizer(model, rate=0.0):
    """Return Muon as in a run; the loop sets its learning rate."""
    return Muon(model.named_parameters(), OptimizerConfig(peak_lr=rate))


@settings(max_examples=15)
@given(
    seed=seeds,
    B=st.integers(1, 4),
    packed=st.booleans(),
    size=st.integers(1, 20),
    weight=st.sampled_from([0, 0.3]),
)
def test_bias_steps_once_from_the_loads_of_the_whole_batch(seed, B, packed, size, weight):
    """The bias of every router that was used moves by the rate once, whatever the micro-batches."""
    model = tiny_model(seed)
    batch = drawn_batch(seed, B, 6, packed)
    before = [router.e_score_correction_bias.clone() for router in model.routers()]
    loads = accumulate(model, batch, constant_phase(), weight).tokens_per_expert_LE
    model.zero_grad()
    step(
        model,
        optimizer(model),
        batch,
        constant_phase(microbatch_tokens=size, mtp_weight=weight, bias_rate=0.01),
        0,
    )
    assert len(loads) == (3 if weight else 2) and len(before) == 3
    for i, (router, bias_E) in enumerate(zip(model.routers(), before)):
        expected_E = (
            0.01 * torch.sign(loads[i].mean() - loads[i]) if i < len(loads) else torch.zeros(4)
        )
        # float32 values of size 1
        torch.testing.assert_close(
            router.e_score_correction_bias - bias_E, expected_E, atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_step_of_dense_layers(weight):
    """If only the MTP layer has experts, their load is reported exactly when the layer is trained."""
    model = tiny_model(1)
    config = dataclasses.replace(model.config, first_k_dense_replace=model.config.num_hidden_layers)
    model = GLM(config, 1)
    batch = drawn_batch(1, 2, 8, False)
    with torch.no_grad():
        used = model.hidden(batch.tokens_BS, mtp=bool(weight)).routing
    balance = sum(float(routing.balance_loss) for routing in used)
    metrics = step(model, optimizer(model), batch, constant_phase(mtp_weight=weight), 0)
    assert len(used) == len(metrics.load_max_over_mean or []) == (1 if weight else 0)
    assert metrics.left_out is None and metrics.balance_loss == pytest.approx(balance, rel=1e-6)


def test_padding_is_not_in_the_load():
    """The logged load counts tokens of documents only."""
    model = tiny_model(1)
    documents_BS = drawn_documents(8, 2, 40)
    assert (documents_BS < 0).any()
    batch = dataclasses.replace(drawn_batch(1, 2, 40, False), documents_BS=documents_BS)
    loads = accumulate(model, batch, constant_phase(), 0.3).tokens_per_expert_LE
    assert loads.sum(1).tolist() == [2 * (documents_BS >= 0).sum().item()] * 3


def test_step_reports_what_it_did():
    """The metrics of one step: losses, rate, norm before clipping, and the load of every router."""
    model = tiny_model(1)
    batch = drawn_batch(1, 4, 8, False)
    _, found, loads = gradients(model, batch, 0.2, balance_weight=1e-4)
    model.zero_grad()
    asked = constant_phase(
        learning_rate=0.5e-3, mtp_weight=0.2, bias_rate=0.01, balance_weight=1e-4
    )
    metrics = step(model, optimizer(model), batch, asked, 0)
    norm = math.sqrt(sum(g.square().sum().item() for g in found.values()))
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
    assert metrics.learning_rate == 0.5e-3
    assert metrics.mtp_weight == 0.2
    assert metrics.bias_rate == 0.01
    assert metrics.load_max_over_mean == pytest.approx(
        (loads.amax(1) / loads.mean(1)).tolist(), abs=1e-3
    )
    assert all(0 <= entropy <= 1 for entropy in metrics.load_entropy)
    assert metrics.dead_experts == (loads == 0).sum() and 0.2 < metrics.balance_loss < 4
    assert all(p.grad is None or not p.grad.any() for p in model.parameters()), (
        "gradients are cleared"
    )


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e9])
def test_gradients_are_clipped_to_the_bound(clip):
    """The optimizer sees gradients of at most the bound on the norm; 0 leaves them as they are."""
    model = tiny_model(1)
    batch = drawn_batch(1, 4, 8, False)
    norms = []

    class Looks(torch.optim.SGD):
        def step(self):
            found = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(found).item())

    metrics = step(
        model, Looks(model.parameters(), lr=1.0), batch, constant_phase(clip_norm=clip), 0
    )
    expected = metrics.grad_norm if clip in (0.0, 1e9) else clip
    assert norms == pytest.approx([expected], rel=1e-3)


def test_a_batch_without_targets_changes_no_weight_by_gradient():
    """Loss and gradients are exactly 0 and nothing becomes NaN; the selection bias still steps."""
    model = tiny_model(1)
    batch = drawn_batch(1, 2, 6, False)
    nothing = Batch(batch.tokens_BS, torch.zeros_like(batch.mask_BS))
    metrics = step(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        nothing,
        constant_phase(learning_rate=1.0),
        0,
    )
    assert metrics.loss == metrics.mtp_loss == metrics.grad_norm == 0
    assert all(p.isfinite().all() for p in model.parameters())
    expected = tiny_model(1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters()))


def test_a_step_that_is_not_finite_leaves_the_weights():
    """An infinite gradient norm is logged and the step is skipped; the next step is not affected."""
    model = tiny_model(1)
    batch = drawn_batch(1, 2, 6, False)
    before = [p.clone() for p in model.parameters()]
    handle = model.model.norm.register_forward_hook(
        lambda module, inputs, output: output * float("inf")
    )
    metrics = step(model, optimizer(model), batch, constant_phase(learning_rate=1e-2), 0)
    handle.remove()
    assert not math.isfinite(metrics.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert math.isfinite(
        step(model, optimizer(model), batch, constant_phase(learning_rate=1e-2), 0).grad_norm
    )
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_it_learns():
    """Sixty steps on one batch of random tokens: both losses fall from the logarithm of the vocabulary to near 0."""
    model = GLM(tiny_model(1).config, seed=1)
    tokens_BS = torch.randint(0, 24, (4, 12), generator=numbers(1))
    batch = Batch(tokens_BS, (torch.arange(12) > 0).expand(4, -1))
    adam = optimizer(model)
    asked = constant_phase(learning_rate=2e-2)
    history = [step(model, adam, batch, asked, 0) for _ in range(60)]
    assert history[0].loss == pytest.approx(math.log(24), abs=0.1)
    assert history[-1].loss < 0.5 and history[-1].mtp_loss < 1
