"""The benchmark of reinforcement learning: both sides do the work it says, and their seconds are compared."""

import asyncio
import dataclasses
import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm import load_config
from minglm.bench import rl, rl_async
from minglm.bench.options import BenchOptions
from minglm.bench.plots import redraw
from minglm.bench.run import run
from minglm.config.posttraining import RLConfig
from minglm.plan.counts import flops_per_token

PHASE = RLConfig(environments=("arithmetic",), prompts=2, samples=2, max_new_tokens=3)


def small():
    """Return the nano run with a step of four answers."""
    config = load_config("configs/nano.py")
    post = config.posttraining
    reasoning = dataclasses.replace(post.reasoning, rl=PHASE)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=292),
        posttraining=dataclasses.replace(post, reasoning=reasoning),
    )


def test_record_of_a_small_run(monkeypatch, tmp_path):
    """Rows for each side and number of threads, whose parts are positive and add up, ratios of them, and a figure."""
    monkeypatch.setattr(rl, "MICROBATCHES", (2,))
    monkeypatch.setattr(rl, "THREADS", (1,))
    path = run("rl", small(), BenchOptions(repeats=1), tmp_path)
    assert redraw(path).exists()
    record = json.loads(path.read_text())
    assert [(row["side"], row["threads"]) for row in record["results"]] == [
        ("minglm", 1),
        ("trl", 1),
    ]
    for row in record["results"]:
        assert 0 < row["floor_seconds"] < row["seconds"]
        assert 0 < row["rollout_seconds"] < row["seconds"]
    assert record["ratios"]["1 thread"]["step"] > 0


def test_another_amount_of_work_is_refused():
    """A speed that stands for fewer tokens is none."""
    rl.check_work("minglm", 12, PHASE)
    with pytest.raises(ValueError, match="trl trained on 11 tokens in place of 12"):
        rl.check_work("trl", 11, PHASE)


def test_rewards_differ():
    """Texts that differ in a letter or in its place have other rewards, from 0 to 1."""
    texts = ["ab", "ba", "aab", "", "abc", "é☕"]
    rewards = [rl.variety(text) for text in texts]
    assert len(set(rewards)) == len(texts) and all(0 <= reward <= 1 for reward in rewards)


def test_ratios_are_of_the_same_threads():
    """Above one minglm is faster; rollout and update are compared apart."""

    def row(side, threads, rollout, update):
        return {
            "side": side,
            "threads": threads,
            "microbatch": 32 if side == "trl" else None,
            "seconds": rollout + update,
            "rollout_seconds": rollout,
            "update_seconds": update,
            "floor_seconds": 0.5,
        }

    rows = [
        row("minglm", 1, 1, 1),
        row("trl", 1, 4, 2),
        row("minglm", 2, 1, 1),
        row("trl", 2, 1, 3),
    ]
    assert rl.ratios(rows) == {
        "1 thread": {"step": 3.0, "rollout": 4.0, "update": 2.0, "floor": 12.0, "microbatch": 32},
        "2 threads": {"step": 2.0, "rollout": 1.0, "update": 3.0, "floor": 8.0, "microbatch": 32},
    }


@given(prompt=st.integers(1, 50), answer=st.integers(1, 50), samples=st.integers(1, 5))
def test_the_floor_counts_a_pass_more_than_training(prompt, answer, samples):
    """One answer: four passes where training has three, without a head on the prompt; others add their own tokens."""
    model = dataclasses.replace(small().model, num_nextn_predict_layers=0)
    phase = dataclasses.replace(PHASE, prompts=1, samples=samples, max_new_tokens=answer)
    one = dataclasses.replace(phase, samples=1)
    length = prompt + answer
    trained = flops_per_token(model, length).total * length
    head = 8 * model.vocab_size * model.hidden_size
    assert rl.step_flops(model, one, prompt) == pytest.approx(
        trained * 4 / 3 - head * prompt, abs=1
    )
    alone = rl.step_flops(model, dataclasses.replace(one, samples=0), prompt)
    each = rl.step_flops(model, one, prompt) - alone
    assert rl.step_flops(model, phase, prompt) == pytest.approx(alone + samples * each, abs=samples)


def test_record_of_a_small_asynchronous_run(monkeypatch, tmp_path):
    """A row for each side without and with waits, ratios of them, and a figure."""
    monkeypatch.setattr(rl_async, "STEPS", 2)
    monkeypatch.setattr(rl_async, "AHEAD", 2)
    path = run("rl_async", small(), BenchOptions(repeats=1), tmp_path)
    assert redraw(path).exists()
    record = json.loads(path.read_text())
    rows = record["results"]
    sides = ["synchronous", "asynchronous"]
    assert [row["side"] for row in rows] == sides * 2
    assert [bool(row["median_wait"]) for row in rows] == [False, False, True, True]
    for row in rows:
        assert row["reward_per_second"] > 0 and row["seconds"] > 0
        assert 0 <= row["engine_idle"] <= 1 and 0 <= row["trainer_idle"] <= 1
    assert record["ratios"].keys() == {"without waits", "heavy-tailed waits"}


def test_slow_environments_wait_as_their_task_decides(monkeypatch):
    """The wait is some multiple of the median, eight at most, equal for a task played again; a median of 0 waits for nothing."""
    waits = []

    async def wait(seconds):
        waits.append(seconds)

    monkeypatch.setattr(rl_async.asyncio, "sleep", wait)

    def waits_of(median):
        waits.clear()
        for number in range(100):
            episode = rl_async.SlowNoise(median).episode(rl.Noise().task(number, seed=0))
            asyncio.run(episode.step({"role": "assistant", "content": "ab"}))
        return list(waits)

    first = waits_of(0.5)
    assert len(set(first)) > 50 and max(first) <= 0.5 * rl_async.TAIL
    assert 0.3 < statistics.median(first) < 0.8  # three standard errors of the median of a hundred
    assert waits_of(0.5) == first
    assert waits_of(0) == []
