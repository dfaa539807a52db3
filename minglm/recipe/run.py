"""The whole paper, stage by stage, as one resumable run (paper Figure 3 and sections 2 to 4).

    data -> general -> code_reasoning -> repository -> reasoning -> long_agent          (one schedule; 2.2 to 2.4)
         -> for each expert: X.sft -> X.rl                                              (3.1 stage one, 3.2, 3.3)
         -> unified -> general_rl -> pathology_rl                                       (3.1 stage two, 3.4)

A stage reads the final checkpoint of the one it builds on and leaves its own; a stage that has one is skipped. So the
same command continues a run that was killed, anywhere. The paper never draws the order of the last stages; it calls
general RL the final one and distils experts into the main model, which leaves this order.

Simplified: one process. The experts are trained one after the other; the paper's run side by side.
"""

import json
import random
import re
import time
from functools import partial
from pathlib import Path

from minglm.chat import render_text
from minglm.common import trackers
from minglm.common.device import measured_flops, pick_device, pick_dtype, seed_everything
from minglm.common.files import write_json
from minglm.common.log import Log
from minglm.common.threads import use_threads
from minglm.common.version import versions
from minglm.config.run import to_dict
from minglm.data.build import prepare
from minglm.data.mixture import Mixture
from minglm.envs import ENVIRONMENTS
from minglm.envs.pathology import corrupt
from minglm.eval import needles
from minglm.eval import tasks as eval_tasks
from minglm.eval.text import bits_per_byte, mtp_acceptance
from minglm.inference.client import EngineGenerator
from minglm.inference.engine import Engine
from minglm.kernels import dispatch
from minglm.model.glm import GLM
from minglm.optim.muon import Muon
from minglm.plan import memory
from minglm.recipe.solutions import task_data
from minglm.recipe.stages import plan_stages, prompts_for
from minglm.report.records import (
    BitsPerByteRecord,
    DataRecord,
    EndRecord,
    EvaluationRecord,
    Moment,
    MTPAcceptanceRecord,
    PathologyRecord,
    RejectionRecord,
    RLRecord,
    SampleRecord,
    StageBeginRecord,
    StageEndRecord,
    StartRecord,
    read_records,
    select,
)
from minglm.rl import distill
from minglm.rl.episode import Player, SamplingSettings
from minglm.rl.loop import TaskSchedule, reinforce
from minglm.rl.rollout import rollout
from minglm.rl.trainer import PolicyTrainer
from minglm.train import sft
from minglm.train.checkpoint import CheckpointStore
from minglm.train.loop import LoopOptions, Trainer
from minglm.train.stages import phases

COLD_START_SEED, DISTILL_SEED, RL_SEED = 2, 3, 4  # streams of training tasks; mid-training has 1
HELDOUT_SOURCES = ("prose", "code")


def check_folder(out, run):
    """Raises ValueError when `out` holds a run of another config."""
    path = out / "config.json"
    found = json.loads(path.read_text())["hash"] if path.exists() else run.hash()
    if found != run.hash():
        raise ValueError(
            f"{out} holds a run of another config (hash {found}, this one is {run.hash()}); choose another --out"
        )


def truncate_reasoning(message):
    """A message whose reasoning stops after its first step."""
    if "reasoning_content" not in message:
        return message
    return message | {"reasoning_content": re.split(r"[;\n]", message["reasoning_content"])[0]}


class RecipeRunner:
    """A run in a folder. Raises ValueError when the folder belongs to another config."""

    def __init__(self, run, out, quiet=False):
        self.run, self.out, self.quiet = run, Path(out), quiet
        check_folder(self.out, run)
        dispatch.use(run.kernels)
        seed_everything(run.seed)
        self.device = pick_device(run.device)
        self.threads = use_threads(run.threads, inside=self.device.type != "cpu" or run.compile)
        self.stages = plan_stages(run)
        self.log = Log(
            self.out / "log.jsonl", trackers.writer(run.watch, self.out / "watch", to_dict(run))
        )
        self.checkpoints = CheckpointStore(self.out, self.log, run.checkpoint_seconds)
        position = self.checkpoints.log_position()
        # What came after the last checkpoint will be done, and logged, again.
        self.log.cut(position)
        for left in self.out.rglob(".*.tmp"):
            left.unlink()  # half a file of a process that was killed
        self.tokenizer, self.shards, self.heldout, about = prepare(
            run, self.out / "data", task_data(run)
        )
        write_json(self.out / "config.json", {"hash": run.hash(), "config": to_dict(run)})
        if not position:
            self.log.write(
                StartRecord(
                    name=run.name, config_hash=run.hash(), seed=run.seed, versions=versions()
                )
            )
            self.log.write(DataRecord(**about))

    def done(self, stage):
        """Whether a stage has its final checkpoint, or comes before one in pre-training that has (by an import)."""
        names = [s.name for s in self.stages if s.kind == "pretrain"]
        later = names[names.index(stage) :] if stage in names else [stage]
        return any(map(self.checkpoints.is_complete, later))

    def execute(self, only=None, until=None):
        """Run all stages, or one (`only`), or those up to one (`until`). Returns whether the whole run is complete.

        An interrupted stage comes first, because its log is cut back to its checkpoint. Raises ValueError when it is
        not among those asked for.
        """
        names = [stage.name for stage in self.stages]
        wanted = [only] if only else names[: names.index(until) + 1] if until else names
        interrupted = [
            name for name in names if self.checkpoints.is_interrupted(name) and not self.done(name)
        ]
        for name in interrupted:
            if name not in wanted:
                raise ValueError(
                    f"stage {name} was interrupted; finish it first, with --only {name}"
                )
        for stage in sorted(self.stages, key=lambda stage: stage.name not in interrupted):
            if stage.name in wanted and not self.done(stage.name):
                self.execute_stage(stage)
        complete = all(map(self.done, names))
        if complete:
            records = read_records(self.log.path)
            seconds = 0.0
            for data in select(records, DataRecord):
                seconds += data.seconds
            for end in select(records, StageEndRecord):
                seconds += end.seconds + end.evaluation_seconds
            self.log.write(EndRecord(seconds=round(seconds, 1)))
        return complete

    def execute_stage(self, stage):
        """Train one stage from the weights of its base, evaluate it, and mark it complete."""
        checkpoints, began = self.checkpoints.stage(stage.name), time.time()
        model, state = self.model_of(stage.base)
        if not checkpoints.partial.exists():
            about = {
                key: getattr(stage, key)
                for key in ("teaches", "tokens", "sequence_length", "learning_rate")
            }
            self.log.write(StageBeginRecord(stage=stage.name, **about))
        kinds = {
            "pretrain": self.pretrain,
            "sft": self.cold_start,
            "rl": self.reinforce,
            "unified": self.unify,
        }
        trained = kinds[stage.kind](stage, model, state, checkpoints)
        seconds = time.time() - began
        self.evaluate(stage, model)
        self.log.write(
            StageEndRecord(
                stage=stage.name,
                tokens=trained["tokens"],
                seconds=round(seconds, 1),
                evaluation_seconds=round(time.time() - began - seconds, 1),
            )
        )
        checkpoints.save({"model": model.state_dict(), **trained}, final=True)

    def model_of(self, stage=None):
        """The model as a stage left it (None: freshly initialised), and that stage's checkpoint."""
        if stage is not None and not self.done(stage):
            raise ValueError(
                f"the stage before has not been run: there is no {self.checkpoints.stage(stage).final}"
            )
        model = GLM(self.run.model, self.run.seed).to(self.device)
        model.recompute = self.run.recompute
        if self.run.compile:
            model.compile_layers()
        model.dtype = pick_dtype(self.run.dtype, self.device)
        state = None
        if stage is not None:
            state = self.checkpoints.load(stage)
            model.load_state_dict(state["model"])
        return model, state

    # Training

    def train(self, model, optimizer, stream, phase, checkpoints, **more):
        """The training loop, with this run's log and its device's ceiling; more: other `LoopOptions`."""
        flops = measured_flops(self.device, pick_dtype(self.run.dtype, self.device)) * self.threads
        ceiling = flops / memory.flops_per_token(self.run.model, phase.sequence_length)["total"]
        options = LoopOptions(quiet=self.quiet, ceiling=ceiling, threads=self.threads, **more)
        Trainer(model, optimizer, stream, phase, checkpoints, self.log, options).run()

    def pretrain(self, stage, model, state, checkpoints):
        """One of the five stages before post-training; the optimizer goes on from the stage before."""
        config = getattr(self.run.stages, stage.name)
        phase = next(phase for phase in phases(self.run) if phase.name == stage.name)
        model.rope_theta = config.rope_theta
        optimizer = Muon(model, self.run.optimizer)
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
        seed = self.run.seed * 100 + phase.start % 97
        stream = Mixture(
            self.shards,
            config.mixture,
            config.sequence_length,
            config.packing,
            seed,
            pad=self.tokenizer.pad,
        )
        measure, every = partial(self.measure_bits, stage, model), self.run.evaluation.every_tokens
        self.train(
            model, optimizer, stream, phase, checkpoints, evaluate=measure, evaluate_every=every
        )
        return {"optimizer": optimizer.state_dict(), "tokens": phase.tokens}

    def fine_tune(self, stage, model, conversations, config, checkpoints):
        """SFT on {environment: [(messages, tools, thinking)]}, each conversation `config.epochs` times."""
        tokens, masks = {}, {}
        for name, group in conversations.items():
            pairs = [pair for c in group for pair in sft.examples(self.tokenizer, *c)]
            pairs = [(t, m) for t, m in pairs if len(t) <= config.sequence_length]
            if pairs:
                tokens[name], masks[name] = zip(*pairs, strict=True)
        if not tokens:
            raise ValueError(
                f"{stage.name}: no conversation fits sequence_length = {config.sequence_length}"
            )
        shares = {name: float(sum(map(len, group))) for name, group in tokens.items()}
        phase = sft.phase(stage.name, config, self.run, int(config.epochs * sum(shares.values())))
        stream = Mixture(
            tokens,
            shares,
            config.sequence_length,
            "best_fit",
            self.run.seed,
            masks,
            self.tokenizer.pad,
        )
        self.train(model, Muon(model, self.run.optimizer), stream, phase, checkpoints)
        return {"tokens": phase.tokens}

    def cold_start(self, stage, model, state, checkpoints):
        """The first half of an expert: a small set of solutions with their reasoning (paper 3.1)."""
        expert = getattr(self.run.posttraining, stage.name.split(".")[0])
        conversations = {name: [] for name in expert.environments}
        for name in expert.environments:
            tasks = ENVIRONMENTS[name].tasks(
                expert.sft.samples, self.run.seed * 100 + COLD_START_SEED
            )
            for number, task in enumerate(tasks):
                messages = ENVIRONMENTS[name].demonstrate(task)
                if int((number + 1) * expert.truncated_reasoning_share) > int(
                    number * expert.truncated_reasoning_share
                ):
                    messages = [truncate_reasoning(message) for message in messages]
                conversations[name].append((messages, task.tools, True))
        return self.fine_tune(stage, model, conversations, expert.sft, checkpoints)

    def unify(self, stage, model, state, checkpoints):
        """One hybrid model from the base and the experts' right answers, some with their thinking removed."""
        post = self.run.posttraining
        answers, counts = self.experts_answers()
        if not checkpoints.partial.exists():
            self.log.write(RejectionRecord(counts=counts))
        random.Random(self.run.seed).shuffle(answers)
        answers = answers[: post.unified.samples] + self.provoked_answers()
        conversations = {}
        for number, (name, messages, tools) in enumerate(answers):
            thinking = int((number + 1) * post.thinking_share) > int(number * post.thinking_share)
            if not thinking:
                messages = [
                    {k: v for k, v in m.items() if k != "reasoning_content"} for m in messages
                ]
            conversations.setdefault(name, []).append((messages, tools, thinking))
        return self.fine_tune(stage, model, conversations, post.unified, checkpoints)

    def provoked_answers(self):
        """Answers to provoking prompts, some of them spoilt, as (environment, messages, tools)."""
        post, environment = self.run.posttraining, ENVIRONMENTS["provocation"]
        rng, found = random.Random(self.run.seed), []
        for task in environment.tasks(post.pathology_samples, self.run.seed * 100 + DISTILL_SEED):
            messages = environment.demonstrate(task)
            spoilt = rng.random() < post.corrupted_share
            found.append(
                (task.environment, corrupt(task, messages, rng) if spoilt else messages, ())
            )
        return found

    def experts_answers(self):
        """What the experts answered well, as (environment, messages, tools), and counts; kept on disk."""
        path, post = self.out / "data" / "accepted.json", self.run.posttraining
        if path.exists():
            return json.loads(path.read_text())
        answers, counts, prompts = [], {}, prompts_for(post)
        for name, expert in post.experts():
            model, _ = self.model_of(f"{name}.rl")
            seed = self.run.seed * 100 + DISTILL_SEED
            tasks = [
                task
                for e in expert.environments
                for task in ENVIRONMENTS[e].tasks(prompts[e], seed)
            ]
            sampler = self.run.evaluation
            settings = SamplingSettings(sampler.max_new_tokens, sampler.temperature, sampler.top_p)
            groups = rollout(
                Player(self.sampler(model), self.tokenizer, settings),
                ENVIRONMENTS,
                tasks,
                post.responses_per_prompt,
                seed=DISTILL_SEED,
            )
            accepted, found = distill.accept(
                [trajectory for group in groups for trajectory in group]
            )
            counts |= {f"{name}: {what}": count for what, count in found.items()}
            answers += [
                (task.environment, messages, list(task.tools)) for task, messages in accepted
            ]
            answered = {task.environment for task, _ in accepted}
            unanswered = [task for task in tasks if task.environment not in answered]
            # Without one right answer an environment would be missing from the unified model: its oracle stands in.
            answers += [
                (t.environment, ENVIRONMENTS[t.environment].demonstrate(t), list(t.tools))
                for t in unanswered
            ]
        write_json(path, [answers, counts])
        return answers, counts

    def sampler(self, model):
        """The generator that answers for RL and for distillation."""
        return EngineGenerator(Engine(model, self.tokenizer, experts=self.run.rollouts))

    def reinforce(self, stage, model, state, checkpoints):
        """GRPO on an expert's tasks, or on the mix of a general stage, half of its prompts without thinking."""
        post, name = self.run.posttraining, stage.name
        is_expert = name.endswith(".rl")
        config = getattr(post, name.split(".")[0]).rl if is_expert else getattr(post, name)
        order = {f"{n}.rl": i for i, (n, _) in enumerate(post.experts())} | {
            "general_rl": 3,
            "pathology_rl": 4,
        }
        optimizer = Muon(model, self.run.optimizer)
        trainer = PolicyTrainer(
            model, optimizer, config, self.run.optimizer, self.tokenizer.pad, self.threads
        )
        settings = SamplingSettings(
            config.max_new_tokens, config.temperature, max_turns=config.max_turns
        )
        player = Player(self.sampler(model), self.tokenizer, settings)
        schedule = TaskSchedule(
            ENVIRONMENTS,
            config.environments,
            config.prompts,
            seed=(self.run.seed * 100 + RL_SEED) * 10 + order[name],
            thinking_share=1.0 if is_expert else post.thinking_share,
        )
        reinforce(trainer, player, schedule, checkpoints, self.log, name, self.quiet)
        records = select(read_records(self.log.path), RLRecord, stage=name)
        return {"tokens": sum(record.segment_tokens or 0 for record in records)}

    # Evaluation

    def measure_bits(self, stage, model):
        """Log the bits per byte of every held-out source. Returns the length of the rows."""
        length = min(getattr(self.run.stages, stage.name).sequence_length, 1024)
        for source in HELDOUT_SOURCES:
            if len(documents := self.heldout.get(source, ())):
                limit = self.run.evaluation.heldout_tokens
                value = bits_per_byte(model, self.tokenizer, documents, length, limit)
                self.log.write(BitsPerByteRecord(stage=stage.name, source=source, value=value))
        return length

    def evaluate(self, stage, model):
        """Log the scores that say what a stage taught."""
        config, name, post = self.run.evaluation, stage.name, self.run.posttraining
        generator = EngineGenerator(Engine(model, self.tokenizer))
        if stage.kind == "pretrain":
            length = self.measure_bits(stage, model)
            if model.mtp is not None and len(self.heldout.get("code", ())):
                value = mtp_acceptance(model, self.heldout["code"], length, config.heldout_tokens)
                self.log.write(MTPAcceptanceRecord(stage=name, value=value))
            for record in needles.measure(model, self.tokenizer, self.heldout, self.run, name):
                self.log.write(record)
        learned = [env for _, expert in post.experts() for env in expert.environments]
        if stage.kind in ("sft", "rl") and "." in name:
            self.score(generator, name, getattr(post, name.split(".")[0]).environments, (True,))
        elif stage.kind != "pretrain":
            self.score(generator, name, learned, (True, False))
        elif name == [s.name for s in self.stages if s.kind == "pretrain"][-1]:
            self.score(generator, name, learned, (True,))
        when = {"general_rl": Moment.BEFORE, "pathology_rl": Moment.AFTER}.get(name)
        if when is not None:
            played = self.score(generator, name, ["provocation"], (True, False))
            self.log.write(PathologyRecord(stage=name, when=when, **eval_tasks.faults(played)))

    def score(self, generator, stage, names, switches):
        """Evaluate environments under settings of the thinking switch; log scores and samples. Returns all episodes."""
        everything = []
        for name in names:
            for thinking in switches:
                record, played = eval_tasks.tasks(
                    generator,
                    self.tokenizer,
                    ENVIRONMENTS[name],
                    self.run.evaluation,
                    thinking,
                    self.run.seed,
                )
                self.log.write(EvaluationRecord(stage=stage, **record))
                mode = "thinking" if thinking else "direct"
                text = render_text(played[0].messages, None, thinking)
                self.log.write(SampleRecord(stage=stage, title=f"{name}, {mode}", text=text))
                everything += played
        return everything
