"""The guard skips bad steps and rolls back to a good checkpoint; recomputing layers changes nothing."""

import dataclasses
import itertools
import math
import statistics
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import drawn_batch, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import ROWS, STEPS, Run, S

from minglm.common.files import read_jsonl
from minglm.plan.counts import flops_per_token
from minglm.testing.model import tiny_model
from minglm.testing.strategies import seeds
from minglm.train import loop
from minglm.train.checkpoint_files import read_values
from minglm.train.guard import MIN_HISTORY, Guard
from minglm.train.loop import LoopOptions, Trainer

healthy = st.lists(st.floats(0.5, 2), min_size=MIN_HISTORY, max_size=80)


@given(healthy, st.floats(4, 100), st.sampled_from([math.nan, math.inf]))
def test_which_steps_are_skipped(norms, factor, broken):
    """Norms near the others are accepted; those above factor times the median, or not finite, are skipped."""
    guard = Guard(spike_factor=factor)
    assert not any(guard.reason(norm) for norm in norms)
    usual = sorted(norms[-50:])[len(norms[-50:]) // 2]
    assert guard.reason(factor * usual * 1.01) == "spike"
    assert guard.reason(broken) == "not finite"
    assert guard.reason(usual) is None and (guard.in_a_row, guard.left_out) == (0, 2)
    assert Guard().reason(1e30) is None  # by default only NaN and infinity are


@given(healthy, st.lists(st.sampled_from([1.0, math.nan, 1e9]), max_size=12))
def test_a_guard_is_restored_from_its_state(norms, later):
    """A guard restored from its state judges as the one that it was saved from."""
    guard, other = Guard(10, 3), Guard(10, 3)
    for norm in norms:
        guard.reason(norm)
    other.load_state_dict(guard.state_dict())
    for norm in later:
        assert guard.reason(norm) == other.reason(norm) and guard.gives_up == other.gives_up


@given(
    st.integers(0, 80),
    st.integers(0, 60),
    st.sampled_from([1.5, 4.0, 8.0]),
)
def test_a_spike_is_judged_by_the_last_fifty_accepted_norms(ones, twos, factor):
    """Norms at the bound are accepted and the next number is a spike; fewer than ten accepted norms judge nothing."""
    guard = Guard(spike_factor=factor)
    accepted = [1.0] * ones + [1.25] * twos  # below every factor, so that all are accepted
    assert not any(guard.reason(norm) for norm in accepted)
    last = sorted(accepted[-50:])
    if len(last) < 10:
        assert guard.reason(1e9) is None
        return
    bound = factor * statistics.median(last)
    assert guard.reason(math.nextafter(bound, 1e9)) == "spike"
    assert guard.reason(bound) is None
    assert guard.norms[-1] == bound
    assert len(guard.norms) == min(50, len(accepted) + 1)


def test_ten_norms_are_a_history():
    """With nine accepted norms any finite one is accepted, with ten a spike is found."""
    for count, reason in ((9, None), (10, "spike")):
        guard = Guard(spike_factor=2.0)
        assert [guard.reason(1.0) for _ in range(count)] == [None] * count
        assert guard.reason(1e9) == reason


@given(st.integers(0, 4), st.lists(st.booleans(), max_size=12))
def test_it_gives_up_after_so_many_in_a_row(limit, healthy_steps):
    """Skipped steps are counted from the last accepted one, from none at the start; 0 never gives up."""
    guard = Guard(rollback_after=limit)
    in_a_row = skipped = 0
    assert not guard.gives_up
    for is_healthy in healthy_steps:
        guard.reason(1.0 if is_healthy else math.nan)
        in_a_row = 0 if is_healthy else in_a_row + 1
        skipped += not is_healthy
        assert (guard.in_a_row, guard.left_out) == (in_a_row, skipped)
        assert guard.gives_up == (0 < limit <= in_a_row)


def test_by_default_only_what_is_not_finite_is_skipped():
    """No spike is too high, and nothing is rolled back."""
    guard = Guard()
    assert [guard.reason(norm) for norm in [1.0] * 20 + [1e30, math.inf]] == [None] * 21 + [
        "not finite"
    ]
    assert not guard.gives_up


class Poisoned(Run):
    """A run whose gradients of some steps are NaN."""

    def __init__(self, folder, poisoned, **values):
        super().__init__(folder, seconds=0)
        for name, value in values.items():
            optimizer = dataclasses.replace(self.phase.optimizer, **{name: value})
            object.__setattr__(self.phase, "optimizer", optimizer)

        def poison(gradient):
            return gradient * (math.nan if self.steps in poisoned else 1)

        self.model.lm_head.weight.register_hook(poison)


def test_a_nan_in_a_gradient_costs_one_step(tmp_path):
    """The weights never see it, the log says which step was skipped and why, and training continues."""
    run = Poisoned(tmp_path, {3}).go()
    records = read_jsonl(tmp_path / "log.jsonl")
    assert [r.get("left_out") for r in records] == [None, None, "not finite", None, None, None]
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert all(v.isfinite().all() for s in run.optimizer.state.values() for v in s.values())


@pytest.mark.parametrize("packing", ["truncate", "best_fit"])
def test_utilisation_is_speed_over_the_ceiling(tmp_path, monkeypatch, packing):
    """With a ceiling each step logs its share of it: less where attention stays inside documents; else no utilisation."""
    clock = itertools.accumulate(itertools.repeat(0.5))  # each step takes half a second
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    run = Run(tmp_path, packing)
    peak = 2 * ROWS * S * flops_per_token(run.model.config, S).total
    options = LoopOptions(quiet=True, peak_flops=peak)
    Trainer(run.model, run.optimizer, run, run.phase, run.checkpoints, run.log, options).run()
    shares = [r["mfu"] for r in read_jsonl(tmp_path / "log.jsonl") if r["kind"] == "step"]
    assert max(shares) <= 1 and (min(shares) == 1) == (packing == "truncate")
    assert not any("mfu" in r for r in read_jsonl(Run(tmp_path / "other").go().log.path))


def test_after_repeated_failures_the_last_good_weights_come_back(tmp_path):
    """After two skipped steps in a row the checkpoint before them is restored, the data continue, and the log says so."""
    run = Poisoned(tmp_path, {3, 4}, rollback_after=2).go()
    records = read_jsonl(tmp_path / "log.jsonl")
    (back,) = (r for r in records if r["kind"] == "rollback")
    assert (back["step"], back["to_step"], back["left_out"]) == (4, 2, 2)
    assert [r["tokens"] for r in records if r["kind"] == "step"] == [
        ROWS * S * (i + 1) for i in range(STEPS)
    ]
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_no_checkpoint_is_written_while_steps_fail(tmp_path, monkeypatch):
    """A rollback returns to a state from before the failures, even when a checkpoint is due after every step."""
    seen = []
    run = Poisoned(tmp_path, {3, 4, 5}, rollback_after=9)
    save = run.checkpoints.save
    monkeypatch.setattr(
        run.checkpoints,
        "save",
        lambda tensors, values, background: seen.append(values["step"]) or save(tensors, values),
    )
    run.go()
    assert seen == [0, 1, 2, 6, 6]
    assert read_values(run.checkpoints.partial)["guard"]["left_out"] == 3


@settings(max_examples=8)
@given(seed=seeds, packed=st.booleans())
def test_recomputing_layers_changes_nothing(seed, packed):
    """Losses, gradients and the routers' loads are bit-equal: no load is counted twice."""
    model = tiny_model(seed)
    batch = drawn_batch(seed, 3, 8, packed)
    sums, kept, loads = gradients(model, batch, 0.3, balance_weight=0.1)
    model.recompute = True
    other_sums, again, other_loads = gradients(model, batch, 0.3, balance_weight=0.1)
    assert sums == other_sums and torch.equal(loads, other_loads)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_recomputing_keeps_less():
    """Between the passes only the input of a layer is kept."""
    held = []
    for recompute in (False, True):
        model = tiny_model(0)
        batch = drawn_batch(0, 4, 32, False)
        sizes = {}
        model.recompute = recompute

        def pack(x, sizes=sizes):
            sizes[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.hidden(batch.tokens_BS)
        held.append(sum(sizes.values()))
    assert held[1] < held[0] / 4


@pytest.mark.ci
def test_compiled_layers_compute_the_same():
    """The switch changes neither names of parameters nor logits nor gradients. Traced only: no compiler is needed."""
    model = tiny_model(0, num_hidden_layers=2)  # a dense layer and a MoE layer
    batch = drawn_batch(0, 2, 8, False)
    names = list(model.state_dict())

    def logits_and_gradients():
        model.zero_grad()
        logits_BSV = model(batch.tokens_BS)
        logits_BSV.square().mean().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [logits_BSV.detach(), *gradients]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = logits_and_gradients()
        model.compile_layers(backend="eager")
        # float32
        torch.testing.assert_close(logits_and_gradients(), plain, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(model(batch.tokens_BS), plain[0], atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == names
