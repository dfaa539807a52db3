"""Measure a step of reinforcement learning beside trl's `GRPOTrainer` on the same weights (no counterpart in the paper).

    step = rollout (prompts x samples answers, and their rewards) + update (one optimizer step on all of them)

Both sides are as a user would run them: ours is `minglm.rl.loop.reinforce_step`, theirs is
`GRPOTrainer.train`, inside which ours takes its turn before each of its steps. Both start from the same
weights, on the same prompts, in float32, without a KL term, with the same bounds of the clip, the same
optimizer (our Muon) and bound on its gradient. The MTP layer is off, because transformers ignores it. No
answer ends early, so that both sample and train on the same number of tokens, which the benchmark checks at
every step, as it does the number of updates. The reward is a number between 0 and 1 that differs for almost
every answer, so that no group is left out.

trl pads its batch and cuts it into micro-batches as it is told to; each of `MICROBATCHES` is tried, and the
fastest counts. Several threads share the operations of trl, and the batch of ours, as in a run. Seconds are
CPU-seconds of the process for one thread, and seconds of the clock for more; the best of the turns counts.
The weights begin untrained.

The floor of a row is the time that the step's products in float32 take at the best speed that these cores reach in
any product, if each token of a prompt is computed once for all its answers. The ratio of trl's seconds to it is what
a step would reach that did nothing else, and nothing slower.
"""

import dataclasses
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch

from minglm.bench.options import BenchOptions
from minglm.chat import render
from minglm.chat.messages import Message
from minglm.common.allocator import keep_freed_memory
from minglm.common.device import measured_flops
from minglm.common.threads import use_threads
from minglm.config.model import ModelConfig
from minglm.config.posttraining import RLConfig
from minglm.config.run import RunConfig
from minglm.data.tokenizer import Tokenizer
from minglm.envs.arithmetic import Arithmetic
from minglm.envs.base import Episode, Score, ScoreStatus, Task
from minglm.inference import Engine
from minglm.inference.client import EngineGenerator
from minglm.kernels.linear import linear
from minglm.model.glm import GLM
from minglm.optim.muon import Muon
from minglm.parallel import Replicas
from minglm.plan.counts import count_parameters
from minglm.rl.episode import Player, SamplingSettings, Trajectory
from minglm.rl.loop import Synchronous, reinforce_step
from minglm.rl.schedule import TaskSchedule
from minglm.rl.trainer import PolicyTrainer

THREADS = (1, 2)
MICROBATCHES = (128, 32)
"""Answers of one of trl's micro-batches."""
BASELINE = (
    "trl GRPOTrainer: dapo loss, beta 0, transformers generate, no checkpointing of activations"
)


class StepSeconds(NamedTuple):
    """Seconds of one step."""

    step: float
    rollout: float
    """The part that sampling and scoring took; the rest is the update."""


class Row(TypedDict):
    """One side with one number of threads, as the record holds it. Seconds are the best of the turns."""

    side: str
    threads: int
    microbatch: int | None
    """Answers of a micro-batch of trl."""
    seconds: float
    rollout_seconds: float
    """Of the step with the best time."""
    update_seconds: float
    """Of the same step."""
    floor_seconds: float
    """Those of the products of a step at the full speed of these cores."""


class Ratio(TypedDict):
    """Seconds of trl over seconds of minglm; above 1 minglm is faster."""

    step: float
    rollout: float
    update: float
    floor: float
    """That of a step that takes no longer than its products."""
    microbatch: int
    """Answers of a micro-batch in the faster form of trl."""


class Noise(Arithmetic):
    """Sums whose answers are scored whatever they say: a random model writes noise."""

    name = "noise"

    def episode(self, task: Task) -> Episode:
        """Return an episode that scores the first message."""
        return NoiseEpisode(task)


class NoiseEpisode(Episode):
    """An episode of one message, of any form."""

    text = ""

    async def step(self, message: Message) -> list[Message]:
        """Take the message."""
        self.text = str(message.get("content"))
        self.done = True
        return []

    async def score(self) -> Score:
        """Return a number that differs for almost every text."""
        return Score(variety(self.text), ScoreStatus.WRONG, self.parts())


def variety(text: str) -> float:
    """Return a number from 0 to 1 that differs for almost every text."""
    return zlib.crc32(text.encode()) % 997 / 997


class Clock:
    """Times steps and the rollouts in them, in CPU-seconds for one thread and in seconds of the clock for more."""

    def __init__(self, threads: int) -> None:
        self.now: Callable[[], float] = time.process_time if threads == 1 else time.perf_counter
        self.rollouts: list[float] = []

    def timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a rollout's function that adds its seconds to `rollouts`."""

        def call(*arguments: Any, **options: Any) -> Any:
            began = self.now()
            result = run(*arguments, **options)
            self.rollouts.append(self.now() - began)
            return result

        return call


class TimedTrainer(PolicyTrainer):
    """A trainer that keeps the seconds of its last call of `learn`."""

    clock = Clock(1)
    seconds = 0.0

    def learn(self, groups: Sequence[Sequence[Trajectory]], step: int) -> dict[str, Any]:
        """Turn rewarded groups into an optimizer step, and keep the seconds."""
        began = self.clock.now()
        metrics = super().learn(groups, step)
        self.seconds = self.clock.now() - began
        return metrics


class Ours:
    """minglm's side: `step()` takes one step and returns its seconds."""

    def __init__(
        self,
        model: GLM,
        tokenizer: Tokenizer,
        config: RunConfig,
        rl: RLConfig,
        clock: Clock,
        threads: int,
    ) -> None:
        self.clock = clock
        self.rl = rl
        self.threads = threads
        optimizer = Muon(model, config.optimizer)
        workers = Replicas(model, threads)
        self.trainer = TimedTrainer(model, optimizer, rl, config.optimizer, tokenizer.pad, workers)
        self.trainer.clock = clock
        # An engine without a tokenizer knows no stop tokens.
        self.generator = EngineGenerator(Engine(model))
        settings = SamplingSettings(rl.max_new_tokens, rl.temperature)
        player = Player(self.generator, tokenizer, settings)
        self.schedule = TaskSchedule({Noise.name: Noise()}, (Noise.name,), rl.prompts, seed=0)
        self.rollouts = Synchronous(self.trainer, player, self.schedule)

    def step(self) -> StepSeconds:
        """Take a step. Raises ValueError if it did less or more work than it should."""
        torch.set_num_threads(1)  # the threads share the batch
        began = self.clock.now()
        record = reinforce_step(self.trainer, self.rollouts, self.schedule, "bench")
        seconds = self.clock.now() - began
        torch.set_num_threads(self.threads)
        check_work("minglm", record.trained_tokens or 0, self.rl)
        return StepSeconds(seconds, seconds - self.trainer.seconds)


def check_work(side: str, tokens: int, rl: RLConfig) -> None:
    """Raise ValueError where a step has sampled or trained on another number of tokens than it should."""
    expected = rl.prompts * rl.samples * rl.max_new_tokens
    if tokens != expected:
        raise ValueError(f"{side} trained on {tokens} tokens in place of {expected}")


def take_turns(
    config: RunConfig, rl: RLConfig, threads: int, microbatch: int, turns: int
) -> dict[str, list[StepSeconds]]:
    """Take `turns` steps of both sides in turns, after one to warm up; return the seconds of each, by side."""
    model = GLM(dataclasses.replace(config.model, num_nextn_predict_layers=0))
    tokenizer = Tokenizer.train(prompt_texts(rl), config.model.vocab_size)
    clock = Clock(threads)
    seconds: dict[str, list[StepSeconds]] = {"minglm": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, "float32")
        tokenizer.save(Path(folder) / "tokenizer.json")
        ours = Ours(model, tokenizer, config, rl, clock, threads)
        with closing(ours.generator):
            run_trl(
                Path(folder), tokenizer, config, rl, clock, ours, microbatch, turns + 1, seconds
            )
    return {side: taken[1:] for side, taken in seconds.items()}


def prompt_texts(rl: RLConfig) -> list[str]:
    """Return the questions of the first step."""
    tasks = Noise().tasks(rl.prompts, 0)
    return [task.messages[-1]["content"] for task in tasks]


def prompt_tokens(config: RunConfig, rl: RLConfig) -> int:
    """Count the tokens of the prompts of the first step."""
    tokenizer = Tokenizer.train(prompt_texts(rl), config.model.vocab_size)
    total = 0
    for task in Noise().tasks(rl.prompts, 0):
        total += len(render(tokenizer, task.messages, generation_prompt=True).ids)
    return total


def product_speed(threads: int) -> float:
    """Measure the FLOP/s of so many cores in float32: the best of a large product and of one as training computes it."""
    rows, inputs, outputs = 2048, 96, 288
    x_TD = torch.ones(rows, inputs)
    weight_FD = torch.ones(outputs, inputs, requires_grad=True)
    best = float("inf")
    for _ in range(50):
        began = time.thread_time()
        linear(x_TD, weight_FD)
        best = min(best, time.thread_time() - began)
    own = 2 * rows * inputs * outputs / best * threads
    return max(own, measured_flops(torch.device("cpu"), torch.float32, threads))


def step_flops(model: ModelConfig, rl: RLConfig, prompts: int) -> int:
    """Count the operations of a step's products: the rollout's pass, and the update's with its gradients.

    prompts: tokens of all prompts; each passes once in the rollout and once in the update.
    """
    count = count_parameters(model)
    sampled = rl.prompts * rl.samples * rl.max_new_tokens
    length = prompts / rl.prompts
    # On average a token sees half of its own text, and an answer all of its prompt.
    seen = prompts * length / 2 + sampled * (length + rl.max_new_tokens / 2)
    body = 2 * count["active_body"] * (prompts + sampled)
    head = 2 * count["embedding"] * sampled
    width = model.num_attention_heads * model.head_dim
    attention = 4 * model.num_hidden_layers * width * seen  # q k' and P v
    return int(4 * (body + head + attention))  # a gradient takes as much as two passes


def run_trl(
    folder: Path,
    tokenizer: Tokenizer,
    config: RunConfig,
    rl: RLConfig,
    clock: Clock,
    ours: Ours,
    microbatch: int,
    steps: int,
    seconds: Mapping[str, list[StepSeconds]],
) -> None:
    """Let trl train for some steps, ours before each of its own, and add the seconds of both.

    Raises ValueError without trl, and where a step did less or more work than it should.
    """
    try:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
        from transformers.utils import logging
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        message = f"bench rl compares with trl: pip install trl ({error})"
        raise ValueError(message) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    names = {token: name for name, token in tokenizer.special.items()}
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token=names[tokenizer.end],
        pad_token=names[tokenizer.pad],
    )
    prompts = []
    for task in Noise().tasks(rl.prompts * steps, 0):
        prompts.append(render(tokenizer, task.messages, generation_prompt=True).text)
    batch = rl.prompts * rl.samples
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=min(microbatch, batch),
        gradient_accumulation_steps=max(1, batch // microbatch),
        num_generations=rl.samples,
        max_completion_length=rl.max_new_tokens,
        max_steps=steps,
        temperature=rl.temperature,
        generation_kwargs={"min_new_tokens": rl.max_new_tokens},
        beta=0.0,
        epsilon=rl.loss.clip_low,
        epsilon_high=rl.loss.clip_high,
        max_grad_norm=config.optimizer.clip_norm,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    optimizer = Muon(twin, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = rl.peak_lr
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def reward(completions: Sequence[str], **_: Any) -> list[float | None]:
        return [variety(text) for text in completions]

    trainer = GRPOTrainer(
        model=twin,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=fast,
        optimizers=(optimizer, schedule),
    )
    generate = clock.timed(trainer._generate_and_score_completions)

    def generate_and_check(inputs: Any) -> Any:
        result = generate(inputs)
        check_work("trl", int(result["completion_mask"].sum()), rl)
        return result

    trainer._generate_and_score_completions = generate_and_check

    class Turns(TrainerCallback):
        """Ours before each step of trl's."""

        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds["minglm"].append(ours.step())
            clock.rollouts.clear()
            self.began = clock.now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            step = clock.now() - self.began
            seconds["trl"].append(StepSeconds(step, sum(clock.rollouts)))

    trainer.add_callback(Turns())
    trainer.train()
    if trainer.state.global_step != steps:
        raise ValueError(f"trl took {trainer.state.global_step} steps in place of {steps}")


def rl(config: RunConfig, options: BenchOptions) -> dict[str, Any]:
    """Measure a step of minglm and of trl on one thread and on two; return the record.

    The sizes of the step are those of the config's reasoning expert. Raises ValueError without trl, and where
    the two sides do not do the same work.
    """
    phase = dataclasses.replace(config.posttraining.reasoning.rl, refill=0, updates_per_rollout=1)
    keep_freed_memory()  # as a run does
    rows: list[Row] = []
    flops = step_flops(config.model, phase, prompt_tokens(config, phase))
    for threads in THREADS:
        use_threads(threads)
        speed = product_speed(threads)
        best: dict[str, Row] = {}
        for microbatch in MICROBATCHES:
            turns = take_turns(config, phase, threads, microbatch, options.repeats)
            for side, seconds in turns.items():
                fastest = min(seconds)
                row: Row = {
                    "side": side,
                    "threads": threads,
                    "microbatch": microbatch if side == "trl" else None,
                    "seconds": round(fastest.step, 4),
                    "rollout_seconds": round(fastest.rollout, 4),
                    "update_seconds": round(fastest.step - fastest.rollout, 4),
                    "floor_seconds": round(flops / speed, 4),
                }
                print(*(f"{k} {v}" for k, v in row.items()), flush=True)
                if side not in best or row["seconds"] < best[side]["seconds"]:
                    best[side] = row
        rows += best.values()
    record = {
        "prompts": phase.prompts,
        "samples": phase.samples,
        "tokens": phase.max_new_tokens,
        "flops": flops,
        "results": rows,
        "ratios": ratios(rows),
        "baseline": BASELINE,
    }
    print(record["ratios"])
    return record


def ratios(rows: Sequence[Row]) -> dict[str, Ratio]:
    """Compare the sides, {"1 thread": ratio}."""
    compared: dict[str, Ratio] = {}
    for mine in [row for row in rows if row["side"] == "minglm"]:
        (other,) = [r for r in rows if r["side"] == "trl" and r["threads"] == mine["threads"]]
        threads = mine["threads"]
        compared[f"{threads} thread{'s' if threads > 1 else ''}"] = {
            "step": round(other["seconds"] / mine["seconds"], 3),
            "rollout": round(other["rollout_seconds"] / mine["rollout_seconds"], 3),
            "update": round(other["update_seconds"] / mine["update_seconds"], 3),
            "floor": round(other["seconds"] / mine["floor_seconds"], 3),
            "microbatch": other["microbatch"] or 0,
        }
    return compared
