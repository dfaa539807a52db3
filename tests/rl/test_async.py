"""Asynchronous rollouts: with staleness 0 they are the synchronous run, and with more every token knows its weights."""

import asyncio
import dataclasses
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from helpers.scripted import byte_tokenizer
from rl.test_trainer import LETTERS, Letters, logged, muon

from minglm.common.files import read_jsonl
from minglm.common.log import Log
from minglm.config import OptimizerConfig, RewardConfig
from minglm.config.posttraining import (
    AsynchronousConfig,
    DynamicTemperatureConfig,
    PolicyLossConfig,
    WeightTransport,
)
from minglm.config.run import Kernels
from minglm.inference import Engine
from minglm.inference.client import EngineGenerator
from minglm.model.glm import GLM
from minglm.rewards.hybrid import Grader
from minglm.rewards.judge import Item
from minglm.rl import async_loop
from minglm.rl.async_loop import Disaggregated
from minglm.rl.episode import Player, SamplingSettings
from minglm.rl.grading import grade
from minglm.rl.loop import Synchronous, reinforce
from minglm.rl.pool import LocalPool
from minglm.rl.ray_pool import RayPool
from minglm.rl.samples import SampleFile
from minglm.rl.schedule import TaskSchedule
from minglm.rl.trainer import PolicyTrainer
from minglm.rl.weights import BroadcastChannel, FileChannel
from minglm.rl.worker import EngineSetup, WorkerSetup, serve
from minglm.testing.model import tiny_model
from minglm.train.checkpoint import CheckpointStore

SYNCHRONOUS = AsynchronousConfig()


def run(
    folder,
    asynchronous=SYNCHRONOUS,
    channel=None,
    during=None,
    make_pool=LocalPool,
    grader=None,
    **changes,
):
    """Train six steps on letters. Return (weights, records, samples); during(pool) is called in another thread."""
    tokenizer = byte_tokenizer()
    model = GLM(tiny_model(1, vocab_size=292).config, seed=3)
    config = dataclasses.replace(LETTERS, asynchronous=asynchronous, **changes)
    trainer = PolicyTrainer(model, muon(model), config, OptimizerConfig(), tokenizer.pad)
    trainer.grader = grader
    settings = SamplingSettings(config.max_new_tokens)
    player = Player(EngineGenerator(Engine(model, tokenizer)), tokenizer, settings)
    environments = {"letters": Letters()}
    schedule = TaskSchedule(environments, config.environments, config.prompts, 5, 0.5)
    log = Log(folder / "log.jsonl")
    checkpoints = CheckpointStore(folder, log, 1e9).stage("letters.rl")
    samples = SampleFile(folder / "samples.jsonl", {"stage": "letters.rl"})
    rollouts = Synchronous(trainer, player, schedule)
    if asynchronous.workers:
        make = EngineSetup(
            model.config, tokenizer, "cpu", torch.float32, Kernels.AUTO, asynchronous.partial
        )
        setup = WorkerSetup(make, tokenizer, settings, environments, config.samples)
        pool = make_pool(setup, asynchronous.workers)
        give_reward = grader and partial(grade, grader, environments, tokenizer)
        rollouts = Disaggregated(
            trainer, schedule, pool, channel or FileChannel(), grade=give_reward
        )
        if during is not None:
            threading.Thread(target=during, args=(pool,), daemon=True).start()
    try:
        reinforce(
            trainer, player, schedule, checkpoints, log, "letters.rl", True, rollouts, samples
        )
    finally:
        if asynchronous.workers:
            rollouts.close()
    return model.state_dict(), logged(folder), read_jsonl(samples.path)


def same(ours, theirs):
    """Return whether two state dicts are equal to the bit."""
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory):
    """Return what the synchronous run left."""
    return run(tmp_path_factory.mktemp("synchronous"))


def broadcast():
    """Return a channel that reaches the workers of this machine."""
    return BroadcastChannel(LocalPool.host)


def ray_pool(setup, workers):
    """Return workers that Ray has started, which find the modules of the tests as this process does."""
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        return RayPool(setup, workers, WeightTransport.SHARED_MEMORY)


@pytest.mark.parametrize(
    ("make_channel", "make_pool"),
    [
        (FileChannel, LocalPool),
        (broadcast, LocalPool),
        pytest.param(FileChannel, ray_pool, marks=pytest.mark.ci),
    ],
)
def test_without_staleness_it_is_the_synchronous_run(
    tmp_path, synchronous, make_channel, make_pool
):
    """Two workers, weights through memory or by broadcast: weights, log and samples are the same to the bit."""
    asked = AsynchronousConfig(workers=2, max_staleness=0)
    found = run(tmp_path, asked, make_channel(), make_pool=make_pool)
    assert same(found[0], synchronous[0])
    assert found[1:] == synchronous[1:]


def changes_between_steps():
    """Return settings that decide something between two steps: a temperature other than 1, and one that rises."""
    rises = DynamicTemperatureConfig(
        window=2, gain=1.0, drop=1.0, relative=False, problems=30, samples=1, spacing=0.4
    )
    return [{"temperature": 0.7}, {"dynamic_temperature": rises}]


@pytest.mark.parametrize("changes", changes_between_steps(), ids=["constant", "rising"])
def test_without_staleness_the_temperature_is_that_of_the_synchronous_run(tmp_path, changes):
    """A step is played at the temperature that its loss reads, also the first one and the one after a probe."""
    wanted = run(tmp_path / "synchronous", **changes)
    asked = AsynchronousConfig(workers=2, max_staleness=0)
    found = run(tmp_path / "asynchronous", asked, **changes)
    assert found[1:] == wanted[1:] and same(found[0], wanted[0])
    if "dynamic_temperature" in changes:
        temperatures = {record["temperature"] for record in found[1] if "temperature" in record}
        assert len(temperatures) > 1, "no probe has raised it"


EARLY = Item("early", "Is it early?", lambda judged: judged.message["content"][:1] < "N")


def test_a_reward_of_several_parts_is_that_of_the_synchronous_run(tmp_path):
    """Without staleness, with rules, a rubric and refilled groups: weights, log and samples are the same to the bit."""
    grader = Grader(RewardConfig(rules=1.0, rubric=1.0), rubric=[EARLY])
    wanted = run(tmp_path / "synchronous", grader=grader, refill=1)
    asked = AsynchronousConfig(workers=2, max_staleness=0)
    found = run(tmp_path / "asynchronous", asked, grader=grader, refill=1)
    assert same(found[0], wanted[0]) and found[1:] == wanted[1:]
    assert {0.0, 0.5, 1.0} == {line["reward"] for line in found[2][1:]}
    assert found[1][0]["reward_parts"].keys() == {"rules", "rubric"}


def killer(kills, seed):
    """Return a function that kills workers of a pool at random moments."""
    rng = random.Random(seed)
    killed = []

    def kill(pool):
        while len(killed) < kills:
            time.sleep(rng.uniform(0.0, 0.05))
            processes = list(pool.processes.values())
            if processes:
                with_pid = rng.choice(processes)
                try:
                    os.kill(with_pid.pid, signal.SIGKILL)
                except (ProcessLookupError, TypeError):
                    continue
                killed.append(with_pid.pid)
                time.sleep(0.1)  # so that something gets done

    return kill, killed


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.ci)])
def test_kills_change_nothing(tmp_path, synchronous, kills, monkeypatch):
    """Workers killed at random moments: their groups are played again, and the run is the one without kills."""
    monkeypatch.setattr(
        async_loop, "MOST_DEATHS", kills
    )  # on a busy machine one may die before it has begun
    kill, killed = killer(kills, 1)
    found = run(tmp_path, AsynchronousConfig(workers=2, max_staleness=0), during=kill)
    assert killed and same(found[0], synchronous[0])
    assert found[1:] == synchronous[1:]


def stop_one(pool):
    """Stop a worker that has begun, as one that hangs, and let silence count."""
    begun = time.monotonic()
    while pool.last_heard.get(0, 0) < begun:
        time.sleep(0.01)
    if isinstance(pool, LocalPool):
        pid = pool.processes[0].pid
    else:
        pid = pool.ray.get(pool.actors[0].__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    pool.idle_seconds = 4.0


@pytest.mark.parametrize("make_pool", [LocalPool, pytest.param(ray_pool, marks=pytest.mark.ci)])
def test_a_worker_that_hangs_is_replaced(tmp_path, synchronous, capfd, make_pool):
    """A worker that is stopped, and lives, is killed after so much silence: the run is the one without, and says so."""
    asked = AsynchronousConfig(workers=2, max_staleness=0)
    found = run(tmp_path, asked, during=stop_one, make_pool=make_pool)
    assert same(found[0], synchronous[0]) and found[1:] == synchronous[1:]
    assert (
        "minglm: rollout worker 0 was silent for 4 s: it is started again" in capfd.readouterr().err
    )


@pytest.mark.parametrize("make_pool", [LocalPool, pytest.param(ray_pool, marks=pytest.mark.ci)])
def test_workers_that_stood_still_with_the_trainer_live_on(
    tmp_path, synchronous, capfd, monkeypatch, make_pool
):
    """Ctrl-Z stops everything, longer than silence may last, again and again: no worker is taken for one that hangs."""
    stops = []

    def hour_after_hour(_):
        for _ in range(500):
            time.sleep(0.01)
            stops.append(3600.0)

    stopped = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(stops))
    for module in ("pool", "ray_pool"):
        monkeypatch.setattr(f"minglm.rl.{module}.time", stopped)
    asked = AsynchronousConfig(workers=2, max_staleness=0)
    found = run(tmp_path, asked, during=hour_after_hour, make_pool=make_pool)
    assert len(stops) > 3
    assert same(found[0], synchronous[0])
    assert "silent" not in capfd.readouterr().err


@pytest.mark.parametrize("partial", ["continue", "resume"])
def test_workers_run_ahead_and_every_token_knows_its_weights(tmp_path, partial):
    """With a bound of 2 tokens are up to 2 versions old, never more, and every step learns from its own tasks."""
    asked = AsynchronousConfig(workers=1, max_staleness=2, partial=partial)
    loss = PolicyLossConfig(importance_cap=2.0)
    _, records, samples = run(tmp_path, asked, loss=loss)
    ages = {}
    for line in samples[1:]:
        for segment in line["segments"]:
            for version, _ in segment["versions"]:
                ages.setdefault(line["step"], set()).add(line["step"] - version)
    assert all(0 <= age <= 2 for found in ages.values() for age in found)
    assert any(max(found) > 0 for found in ages.values()), "nothing ran ahead"
    assert [len({line["task"] for line in samples[1:] if line["step"] == s}) for s in ages] == [
        4
    ] * 6
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    for record in records[2:]:
        assert sum(record["staleness"]) == LETTERS.prompts * LETTERS.samples


def test_a_checkpoint_waits_while_groups_come_in():
    """Whoever saves the buffer has it alone: a group that came in meanwhile would end the save with an error."""
    tokenizer = byte_tokenizer()
    model = GLM(tiny_model(1, vocab_size=292).config, seed=3)
    trainer = PolicyTrainer(model, muon(model), LETTERS, OptimizerConfig(), tokenizer.pad)
    schedule = TaskSchedule({"letters": Letters()}, LETTERS.environments, LETTERS.prompts, 5)
    rollouts = Disaggregated(trainer, schedule, None, None)
    saved = []
    saver = threading.Thread(
        target=lambda: saved.append({n: p.state_dict() for n, p in rollouts.parts.items()}),
        daemon=True,
    )
    with rollouts.changed:  # as the thread that takes groups in
        saver.start()
        saver.join(0.2)
        assert not saved
    saver.join(60)
    assert saved == [{"buffer": {"step": 0, "samples": []}}]


def test_a_trainer_that_deals_many_tasks_waits_for_no_answer():
    """Tasks and answers far beyond what a pipe holds: all are dealt before an answer is read, and all answers come."""

    class Echo:
        async def play(self, task):
            return bytes(100_000)

    ours, theirs = multiprocessing.Pipe()
    worker = threading.Thread(target=lambda: asyncio.run(serve(theirs, Echo())), daemon=True)
    worker.start()
    tasks = [SimpleNamespace(key=number, text="t" * 10_000) for number in range(200)]

    def deal():
        for task in tasks:
            ours.send_bytes(pickle.dumps(("play", task)))

    dealer = threading.Thread(target=deal, daemon=True)
    dealer.start()
    dealer.join(120)
    assert not dealer.is_alive()
    played = []
    while len(played) < len(tasks):
        kind, value = pickle.loads(ours.recv_bytes())
        if kind == "played":
            played.append(value[0])
    assert sorted(played) == list(range(200))
    ours.close()
    worker.join(120)
    assert not worker.is_alive()
