"""What RL trains beside the policy: the MTP layer alone learns from its loss, and the balance only where asked."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.cli.main import main
from minglm.config import BalanceConfig, OptimizerConfig, RLConfig
from minglm.model.balance import sequence_loss
from minglm.optim.muon import Muon
from minglm.parallel import Replicas
from minglm.rl import trainer as trainer_module
from minglm.rl.auxiliary import count_mtp_targets, mtp_loss
from minglm.rl.batch import Sample, collate
from minglm.rl.episode import Segment
from minglm.rl.trainer import PolicyTrainer
from minglm.testing.model import tiny_model
from minglm.testing.strategies import numbers, seeds

CONFIG = RLConfig(("x",), max_new_tokens=8)


def drawn_samples(seed, count=5):
    """Return samples of one segment each: up to 14 random tokens, some of them sampled."""
    samples = []
    for i in range(count):
        size = int(torch.randint(4, 15, (), generator=numbers(seed + i)))
        tokens = torch.randint(0, 24, (size,), generator=numbers(seed + i + 100)).tolist()
        mask = (torch.rand(size, generator=numbers(seed + i + 200)) < 0.6).tolist()
        mask[0], mask[-1] = False, True
        segment = Segment(tokens, mask, [-3.0 if m else 0.0 for m in mask])
        samples.append(Sample([segment], (-1.0) ** i))
    return samples


def gradients(seed, threads=1, clip_norm=0.0, balance=None, **options):
    """Return ({name: gradient before clipping}, metrics) of an update."""
    model = tiny_model(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad = lambda: None
    trainer = PolicyTrainer(
        model,
        optimizer,
        dataclasses.replace(CONFIG, **options),
        OptimizerConfig(clip_norm=clip_norm),
        0,
        Replicas(model, threads),
        balance=balance,
    )
    metrics = trainer.update(drawn_samples(seed), 0.0)
    return {name: p.grad for name, p in model.named_parameters()}, metrics, model


def is_mtp(name):
    """Return whether a parameter of the tiny model belongs to its MTP layer."""
    return name.startswith("model.layers.3.")


@settings(max_examples=6)
@given(seed=seeds, clip_norm=st.sampled_from([0.0, 0.05]), threads=st.sampled_from([1, 2]))
def test_the_trunk_learns_as_without(seed, clip_norm, threads):
    """With a loss of the MTP layer every other gradient, the norm and the clip are as without it, bit for bit."""
    alone, metrics, _ = gradients(seed, threads, clip_norm)
    found, with_mtp, _ = gradients(seed, threads, clip_norm, mtp_loss_weight=0.7)
    for name, gradient in alone.items():
        if is_mtp(name):
            assert gradient is None and found[name].abs().max() > 0, name
        else:
            assert torch.equal(found[name], gradient), name
    assert metrics.pop("mtp_loss") is None and with_mtp.pop("mtp_loss") > 0
    assert metrics == with_mtp


@settings(max_examples=6)
@given(seed=seeds, size=st.sampled_from([1, 30, 8192]))
def test_the_mtp_loss_is_its_definition(seed, size):
    """Mean over positions whose token after next was sampled of its cross-entropy, however the batch is cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "MICROBATCH_TOKENS", size)
        found, metrics, model = gradients(seed, mtp_loss_weight=1.0)
    total = 0.0
    count = 0
    for sample in drawn_samples(seed):
        (segment,) = sample.segments
        tokens_BS = torch.tensor([segment.tokens])
        states_BSD = model.hidden(tokens_BS, mtp=True).mtp_hidden_BSD
        logp_SV = model.lm_head(states_BSD)[0].log_softmax(-1)
        for place in range(2, len(segment.tokens)):
            if segment.mask[place]:
                total = total - logp_SV[place - 2, segment.tokens[place]]
                count += 1
    assert metrics["mtp_loss"] == pytest.approx((total / count).item(), rel=1e-4)
    model.zero_grad()
    (total / count).backward()
    for name, p in model.named_parameters():
        if is_mtp(name):  # float32, sums in another order
            torch.testing.assert_close(found[name], p.grad, atol=1e-4, rtol=1e-3)


def test_it_reaches_no_other_parameter():
    """Not the trunk, the embedding, nor the head; and a loss without a detached input would."""
    model = tiny_model(1)
    batch = collate([s.segments[0] for s in drawn_samples(1)], 0)
    out = model.hidden(batch.tokens_BS, documents_BS=batch.documents_BS)
    targets = count_mtp_targets(batch.mask_BS)
    loss = mtp_loss(model, out, batch, targets)
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached and all(is_mtp(name) for name in reached)


def test_a_gradient_of_the_layer_that_is_not_finite_leaves_only_the_layer():
    """The policy takes its step, and the MTP layer stays."""
    model = tiny_model(1)
    options = OptimizerConfig()
    config = dataclasses.replace(CONFIG, mtp_loss_weight=1.0)
    trainer = PolicyTrainer(model, Muon(model, options), config, options, 0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.mtp.shared_head["norm"].weight.register_hook(lambda gradient: gradient * float("nan"))
    assert trainer.update(drawn_samples(1), 1e-2)["left_out"] is None
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any(is_mtp(name) for name in moved)


def test_the_layer_learns_to_draft():
    """A few updates lower its loss on the same samples."""
    model = tiny_model(2)
    options = OptimizerConfig()
    config = dataclasses.replace(CONFIG, mtp_loss_weight=1.0)
    trainer = PolicyTrainer(model, Muon(model, options), config, options, 0)
    losses = [trainer.update(drawn_samples(2), 1e-2)["mtp_loss"] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1


@settings(max_examples=4)
@given(seed=seeds, threads=st.sampled_from([1, 2]))
def test_balance_is_off_unless_asked_for(seed, threads):
    """Off, no bias moves; on, each router's bias steps against its load, and the loss pulls at the router."""
    balance = BalanceConfig(bias_rate=0.01, sequence_loss_weight=0.5)
    off, _, model = gradients(seed, threads, balance=balance)
    plain = tiny_model(seed)
    for a, b in zip(model.routers(), plain.routers(), strict=True):
        assert torch.equal(a.e_score_correction_bias, b.e_score_correction_bias)
    on, _, model = gradients(seed, threads, balance=balance, balance_loss=True, balance_bias=True)

    # The loads and the loss of the whole batch, from one pass.
    batch = collate([s.segments[0] for s in drawn_samples(seed)], 0)
    out = plain.hidden(batch.tokens_BS, documents_BS=batch.documents_BS)
    losses = []
    for routing, before, after in zip(out.routing, plain.routers(), model.routers(), strict=False):
        load_E = routing.tokens_per_expert_E
        step_E = after.e_score_correction_bias - before.e_score_correction_bias
        torch.testing.assert_close(step_E, 0.01 * torch.sign(load_E.mean() - load_E))
        valid_T = (batch.documents_BS >= 0).flatten()
        rows = len(batch.tokens_BS)
        losses.append(sequence_loss(routing.scores_TE, routing.experts_TK, rows, valid_T))
    (0.5 * sum(losses) / len(losses)).backward()
    for name, p in plain.named_parameters():
        if p.grad is not None:  # float32; the rows of an expert in other batches
            torch.testing.assert_close(on[name] - off[name], p.grad, atol=1e-4, rtol=1e-2)


def test_an_mtp_loss_without_a_layer_is_refused(tmp_path, capsys):
    """One line that names the field, before anything starts."""
    words = ["run", "configs/nano.py", "--dry-run", "--out", str(tmp_path / "x")]
    words += ["--posttraining.agent.rl.mtp_loss_weight", "0.1"]
    assert main([*words, "--model.num_nextn_predict_layers", "0"]) == 2
    line = "posttraining.agent.rl.mtp_loss_weight = 0.1: the model has no MTP layer"
    assert capsys.readouterr().err.startswith(f"minglm: {line}")
