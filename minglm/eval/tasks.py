"""Score a checkpoint on held-out tasks: avg@k and pass@k with intervals (paper section 4)."""

from statistics import fmean

from minglm.common.statistics import interval, pass_at_k
from minglm.rewards.pathology import FAULTS
from minglm.rl.episode import Player, SamplingSettings
from minglm.rl.rollout import rollout

TEST_SEED = 20_250_728  # problems are the same for every run and stage; the paper's release day


def tasks(generator, tokenizer, environment, config, thinking=True, seed=0):
    """Play held-out tasks of one environment.

    config: EvaluationConfig. Returns (record, trajectories): the record has avg, its interval low and high, pass_k, k,
    n, valid_calls (share of tool calls without a format fault, or None), switch_ok (share of answers that obey the
    thinking switch) and length (mean tokens produced).
    """
    problems = environment.test_tasks(config.problems, TEST_SEED)
    settings = SamplingSettings(config.max_new_tokens, config.temperature, config.top_p)
    groups = rollout(
        Player(generator, tokenizer, settings),
        {environment.name: environment},
        problems,
        config.samples,
        [thinking] * len(problems),
        seed,
    )
    everything = [t for group in groups for t in group]
    means = [fmean(t.score.value for t in group) for group in groups]
    low, high = interval(means)
    calls = sum(t.score.parts.get("calls", 0) for t in everything)
    valid = sum(t.score.parts.get("valid_calls", 0) for t in everything)
    return {
        "env": environment.name,
        "group": environment.group,
        "thinking": thinking,
        "avg": fmean(means),
        "low": low,
        "high": high,
        "pass_k": fmean(
            pass_at_k(len(g), sum(t.score.value >= 1 for t in g), len(g)) for g in groups
        ),
        "k": config.samples,
        "n": len(problems),
        "valid_calls": valid / calls if calls and environment.tools() else None,
        "switch_ok": fmean(t.switch_obeyed for t in everything),
        "length": fmean(t.length for t in everything),
    }, everything


def faults(trajectories):
    """Incidence of each pathology in the last turns of episodes, and the interval of any of them."""
    flags = [t.faults() for t in trajectories]
    found = {name: fmean(flag[name] for flag in flags) for name in FAULTS}
    any_fault = [float(any(flag.values())) for flag in flags]
    by_task = {}
    for trajectory, fault in zip(trajectories, any_fault, strict=True):
        by_task.setdefault(trajectory.task.id, []).append(fault)
    low, high = interval([fmean(values) for values in by_task.values()])
    return {
        "incidence": found | {"any": fmean(any_fault)},
        "n": len(flags),
        "low": low,
        "high": high,
    }
