"""Score a checkpoint on held-out tasks: avg@k and pass@k with intervals (paper section 4).

    avg@k  = mean over problems of the mean score of their k answers
    pass@k = share of problems with a right answer among k

A sample whose environment failed says nothing about the model: it leaves every statistic and is counted.
"""

from collections import Counter
from statistics import fmean
from typing import Any, NamedTuple

from minglm.common.ranks import Ranks
from minglm.common.statistics import interval, pass_at_k
from minglm.config.posttraining import EvaluationConfig
from minglm.data.tokenizer import Tokenizer
from minglm.envs.base import Environment
from minglm.inference.client import Generator
from minglm.rl.episode import Player, SamplingSettings, Trajectory
from minglm.rl.rollout import rollout

TEST_SEED = 20_250_728  # problems are the same for every run and stage; the paper's release day


class Evaluation(NamedTuple):
    """The outcome of an evaluation."""

    record: dict[str, Any]
    """The fields of an `EvaluationRecord`, without the stage."""
    trajectories: list[Trajectory]
    """Every episode, in the order of the problems."""


def tasks(
    generator: Generator,
    tokenizer: Tokenizer,
    environment: Environment,
    config: EvaluationConfig,
    thinking: bool = True,
    seed: int = 0,
    ranks: Ranks | None = None,
    thinking_budget: int | None = None,
) -> Evaluation:
    """Play held-out tasks of one environment.

    Args:
        generator: answers the requests.
        tokenizer: its tokenizer.
        environment: where the tasks come from.
        config: number of problems and samples, and the sampler.
        thinking: the thinking switch.
        seed: decides every draw; the problems are always the same.
        ranks: divide the episodes, each with a generator of its own; None: one process plays them all.
        thinking_budget: most tokens of reasoning in a turn; None: no bound.

    Raises ValueError when the environment failed in every sample.
    """
    problems = environment.distinct_tasks(config.problems, TEST_SEED, config.split)
    settings = SamplingSettings(
        config.max_new_tokens, config.temperature, config.top_p, thinking_budget
    )
    groups = rollout(
        Player(generator, tokenizer, settings, ranks or Ranks()),
        {environment.name: environment},
        problems,
        config.samples,
        [thinking] * len(problems),
        seed,
    )
    everything = [t for group in groups for t in group]

    by_problem = []
    for group in groups:
        values = [t.score.value for t in group if t.valid]
        by_problem.append(round(fmean(values), 4) if values else None)

    # Samples whose environment failed leave the statistics, and problems without any other sample with them.
    groups = [[t for t in group if t.valid] for group in groups]
    groups = [group for group in groups if group]
    valid = [t for group in groups for t in group]
    if not valid:
        detail = everything[0].score.detail
        raise ValueError(f"evaluation of {environment.name}: every environment failed: {detail}")

    means = [fmean(t.score.value for t in group) for group in groups]
    low, high = interval(means)
    passed = []
    for group in groups:
        right = sum(t.score.value >= 1 for t in group)
        passed.append(pass_at_k(len(group), right, len(group)))
    calls = sum(t.score.parts.get("calls", 0) for t in valid)
    valid_calls = sum(t.score.parts.get("valid_calls", 0) for t in valid)
    shown = Counter(environment.shown_difficulties or environment.default_difficulties)
    record = {
        "env": environment.name,
        "group": environment.group,
        "thinking": thinking,
        "avg": fmean(means),
        "low": low,
        "high": high,
        "pass_k": fmean(passed),
        "k": config.samples,
        "n": len(groups),
        "valid_calls": valid_calls / calls if calls and environment.tools() else None,
        "switch_ok": fmean(t.switch_obeyed for t in valid),
        "length": fmean(t.length for t in valid),
        "by_problem": by_problem,
        "levels": [task.difficulty for task in problems],
        "shown_shares": {
            str(level): round(count / shown.total(), 4) for level, count in sorted(shown.items())
        },
    }
    if len(valid) < len(everything):
        record["infrastructure"] = len(everything) - len(valid)
    return Evaluation(record, everything)
