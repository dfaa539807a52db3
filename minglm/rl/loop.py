"""The synchronous loop: draw tasks, roll out, train, log, checkpoint (paper 3.2, 3.5)."""

import time
from statistics import fmean

from tqdm import tqdm

from minglm.parallel.replicas import Replicas
from minglm.report.records import RLRecord
from minglm.rewards.pathology import incidence
from minglm.rl.episode import Player, SamplingSettings
from minglm.rl.rollout import rollout
from minglm.rl.trainer import learn
from minglm.train.checkpoint import Interrupted, stop_between_steps


def summarize(groups):
    """Numbers of one rollout for the log: reward, by environment too, length, truncation, calls, faults."""
    everything = [t for group in groups for t in group]
    by_env = {}
    for t in everything:
        by_env.setdefault(t.task.environment, []).append(t.score.value)
    with_tools = [t.score.parts for t in everything if t.task.tools]
    calls, valid = (sum(parts[key] for parts in with_tools) for key in ("calls", "valid_calls"))
    flags = [trajectory.faults() for trajectory in everything]
    return {
        "reward": round(fmean(t.score.value for t in everything), 4),
        "reward_by_env": {name: round(fmean(values), 4) for name, values in by_env.items()},
        "length": round(fmean(t.length for t in everything), 2),
        "truncated": round(fmean(t.truncated for t in everything), 4),
        "switch_ok": round(fmean(t.switch_obeyed for t in everything), 4),
        "valid_calls": round(valid / calls, 4) if calls else None,
        "incidence": {key: round(value, 4) for key, value in incidence(flags).items()},
    }


def draw_tasks(environments, names, count, seed, step, thinking_share=1.0):
    """Training tasks for a step, the environments in `names` taking turns (a name may stand there twice), and thinking
    on or off for each, by whole turns: each environment gets both.
    """
    numbers = range(step * count, (step + 1) * count)
    tasks = [environments[names[n % len(names)]].task(n, seed, "train") for n in numbers]
    turns = [n // len(names) for n in numbers]
    return tasks, [int((turn + 1) * thinking_share) > int(turn * thinking_share) for turn in turns]


def reinforce(model, optimizer, generator, tokenizer, environments, config, name, checkpoints, log, seed=0,
              thinking_share=1.0, quiet=False, threads=1):  # fmt: skip
    """Run `config.steps` steps of GRPO without KL, resuming from `checkpoints`. Ctrl-C saves and raises Interrupted.

    environments: {name: Environment}, of which `config.environments` take turns. thinking_share: share of prompts with
    thinking on. threads: how many share the samples of each update (`minglm.parallel.replicas`).
    """
    first, replicas = 0, Replicas(model, threads)
    settings = SamplingSettings(
        config.max_new_tokens, config.temperature, max_turns=config.max_turns
    )
    player = Player(generator, tokenizer, settings)
    if (state := checkpoints.load()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    steps = range(first, config.steps)
    bar = tqdm(
        steps, initial=first, total=config.steps, desc=name, unit="step", disable=quiet or None
    )
    with stop_between_steps() as stop:
        for step in bar:
            began = time.perf_counter()
            tasks, thinking = draw_tasks(
                environments, config.environments, config.prompts, seed, step, thinking_share
            )
            groups = rollout(
                player,
                environments,
                tasks,
                config.samples,
                thinking,
                seed * 7919 + step,
            )
            metrics = summarize(groups) | learn(
                model, optimizer, groups, config, tokenizer.pad, step, replicas
            )
            seconds = round(time.perf_counter() - began, 3)
            log.write(RLRecord(stage=name, step=step + 1, seconds=seconds, **metrics))
            bar.set_postfix_str(
                f"reward {metrics['reward']:.3f}, live {metrics['live_groups']:.0%}", refresh=False
            )
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            try:
                stop()
            except Interrupted:
                checkpoints.save(state)
                raise
            if checkpoints.due():
                checkpoints.save(state)
