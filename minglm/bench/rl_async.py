"""Measure asynchronous against synchronous reinforcement learning, where environments are slow and where they are not.

    reward per second = rewards of the steps that were learned from / seconds of the clock          (paper 3.5)

Both sides train the same model on the same tasks, whatever the model says (`minglm.bench.rl.Noise`). An
environment replies after a time with a heavy tail: log-normal, its median that of a synchronous step without
any wait, at most eight times that. A synchronous step waits for its slowest episode; `AHEAD` steps under way
at once hide that. The sides take turns, each from the same weights; the first steps of a turn, while the
pipeline fills, do not count. As in a run, the trainer has a thread for each core, and a worker one: an update
and a rollout share the cores, and whoever waits leaves them to the other.

`engine_idle` and `trainer_idle` are shares of the time in which the engine has no request, and the trainer no batch.
"""

import asyncio
import dataclasses
import random
import time
from contextlib import ExitStack, closing
from statistics import median
from typing import Any, TypedDict

import torch

from minglm.bench.options import BenchOptions
from minglm.bench.rl import Noise, NoiseEpisode, prompt_texts
from minglm.chat.messages import Message
from minglm.common.allocator import keep_freed_memory
from minglm.common.threads import threads_in_use, use_threads
from minglm.common.trace import TRAINER, Phase, Span, idle_share
from minglm.config.posttraining import AsynchronousConfig, PolicyLossConfig, RLConfig
from minglm.config.run import RunConfig
from minglm.data.tokenizer import Tokenizer
from minglm.envs.base import Episode, Task
from minglm.inference import Engine
from minglm.inference.client import EngineGenerator
from minglm.model.glm import GLM
from minglm.optim.muon import Muon
from minglm.parallel import Replicas
from minglm.rl.async_loop import Disaggregated
from minglm.rl.episode import Player, SamplingSettings
from minglm.rl.loop import Rollouts, Synchronous, reinforce_step
from minglm.rl.pool import LocalPool
from minglm.rl.schedule import TaskSchedule
from minglm.rl.trainer import PolicyTrainer
from minglm.rl.weights import FileChannel
from minglm.rl.worker import EngineSetup, WorkerSetup

AHEAD = 16
"""Versions that rollouts may be behind: as many steps are under way as hide the slowest episode of one."""
STEPS = 12
"""Steps of a turn that count."""
TAIL = 8.0
"""Longest wait, in medians."""


class Turn(TypedDict):
    """What one turn of one side measured."""

    seconds: float
    """Of the clock, for a step."""
    reward_per_second: float
    engine_idle: float
    trainer_idle: float


class SlowNoise(Noise):
    """Noise whose environment takes its time. median: of the wait, in seconds; 0: none."""

    def __init__(self, median: float) -> None:
        self.median = median

    def episode(self, task: Task) -> Episode:
        """Return an episode that waits."""
        return SlowEpisode(task, self.median)


class SlowEpisode(NoiseEpisode):
    """An episode whose reply takes a time with a heavy tail, which its task decides."""

    def __init__(self, task: Task, median: float) -> None:
        super().__init__(task)
        self.median = median
        self.random = random.Random(task.id)

    async def step(self, message: Message) -> list[Message]:
        """Take the message, after a wait."""
        if self.median:
            await asyncio.sleep(self.median * min(TAIL, self.random.lognormvariate(0, 1)))
        return await super().step(message)


def take_turn(config: RunConfig, rl: RLConfig, median_wait: float) -> Turn:
    """Train some steps, synchronously or with one worker, as `rl.asynchronous` says; return what was measured."""
    torch.manual_seed(0)
    model = GLM(dataclasses.replace(config.model, num_nextn_predict_layers=0), seed=0)
    tokenizer = Tokenizer.train(prompt_texts(rl), config.model.vocab_size)
    trainer = PolicyTrainer(
        model,
        Muon(model, config.optimizer),
        rl,
        config.optimizer,
        tokenizer.pad,
        Replicas(model, threads_in_use()),
    )
    environments = {Noise.name: SlowNoise(median_wait)}
    schedule = TaskSchedule(environments, (Noise.name,), rl.prompts, seed=0)
    settings = SamplingSettings(rl.max_new_tokens, rl.temperature)
    rollouts: Rollouts
    warm = 1
    with ExitStack() as stack:
        if rl.asynchronous.workers:
            make = EngineSetup(model.config, tokenizer, "cpu", model.dtype, config.kernels)
            setup = WorkerSetup(make, tokenizer, settings, environments, rl.samples)
            pool = LocalPool(setup, rl.asynchronous.workers)
            rollouts = Disaggregated(trainer, schedule, pool, FileChannel())
            stack.enter_context(closing(rollouts))
            warm = AHEAD
        else:
            generator = stack.enter_context(closing(EngineGenerator(Engine(model, tokenizer))))
            rollouts = Synchronous(trainer, Player(generator, tokenizer, settings), schedule)
        rollouts.publish(0)
        rewards = 0.0
        spans: list[Span] = []
        began = 0.0
        for step in range(warm + STEPS):
            if step == warm:
                began = time.time()
            record = reinforce_step(trainer, rollouts, schedule, "bench")
            if step >= warm:
                rewards += (record.reward or 0.0) * rl.prompts * rl.samples
            spans += [Span(*span) for span in record.spans or []]
        seconds = time.time() - began
    counted = [s._replace(began=max(s.began, began)) for s in spans if s.ended > began]
    lane = next(s.lane for s in counted if s.phase == Phase.GENERATE)
    return {
        "seconds": round(seconds / STEPS, 4),
        "reward_per_second": round(rewards / seconds, 3),
        "engine_idle": round(idle_share(counted, lane, [Phase.GENERATE]), 4),
        "trainer_idle": round(idle_share(counted, TRAINER, [Phase.TRAIN, Phase.PUBLISH]), 4),
    }


def rl_async(config: RunConfig, options: BenchOptions) -> dict[str, Any]:
    """Measure both sides without waits and with a heavy tail; return the record."""
    keep_freed_memory()
    use_threads(inside=False)
    loss = PolicyLossConfig(importance_cap=2.0)
    base = dataclasses.replace(
        config.posttraining.reasoning.rl, refill=0, updates_per_rollout=1, loss=loss
    )
    sides = {
        "synchronous": base,
        "asynchronous": dataclasses.replace(
            base, steps=10**6, asynchronous=AsynchronousConfig(workers=1, max_staleness=AHEAD)
        ),
    }
    wait = take_turn(config, base, 0.0)["seconds"]
    rows = []
    for median_wait in (0.0, wait):
        turns: dict[str, list[Turn]] = {side: [] for side in sides}
        for _ in range(options.repeats):
            for side, rl in sides.items():
                turns[side].append(take_turn(config, rl, median_wait))
        for side, taken in turns.items():
            row = {"side": side, "median_wait": round(median_wait, 4)}
            row |= {name: median(turn[name] for turn in taken) for name in Turn.__annotations__}
            print(*(f"{k} {v}" for k, v in row.items()), flush=True)
            rows.append(row)
    speed = {(row["side"], bool(row["median_wait"])): row["reward_per_second"] for row in rows}
    ratios = {
        name: round(speed["asynchronous", waits] / speed["synchronous", waits], 3)
        for name, waits in (("without waits", False), ("heavy-tailed waits", True))
    }
    print(ratios)
    return {
        "prompts": base.prompts,
        "samples": base.samples,
        "tokens": base.max_new_tokens,
        "max_staleness": AHEAD,
        "results": rows,
        "ratios": ratios,
    }
