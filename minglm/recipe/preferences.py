"""Make the grader of a stage whose reward has several parts, and train its reward model (paper 3.4).

    preference pairs = (the oracle's answer, an answer that breaks one constraint) to training tasks

The paper collects human preferences; here the better answer is the oracle's, and the worse one is spoilt in
one place, so that the reward model has to read the request. It starts from the weights that the stage starts
from, and is a function of the stage's seed, so a resumed stage trains the same one again.
"""

import math
import random
import time
from collections.abc import Sequence

from minglm.config.posttraining import Judge
from minglm.data.tokenizer import Tokenizer
from minglm.envs.base import Environment
from minglm.model.glm import GLM
from minglm.recipe.context import RunContext
from minglm.recipe.stages import RLStage
from minglm.report.records import RewardModelRecord
from minglm.rewards import reward_model
from minglm.rewards.hybrid import Grader
from minglm.rewards.judge import ModelJudge
from minglm.rewards.reward_model import Pair, RewardModel, judged_tokens

HELD_OUT = 4
"""Pairs that train for one that calibrates, and one that measures."""
PREFERENCES_SEED = 7 * 10**6
"""Added to the seed of a stage, so that its prompts are other ones."""
LIVELY = "Great question! "
"""What is put before a worse answer, to see whether style is taken for quality."""


def grader_of(context: RunContext, stage: RLStage, model: GLM) -> Grader | None:
    """Return the grader of a stage; None where the environments' scores are the reward. model: its first weights.

    Raises ValueError where a reward model is asked for and no environment knows a worse answer.
    """
    config = stage.config.reward
    if not config.composed:
        return None
    judge = None
    if config.judge == Judge.MODEL:
        generator = context.rollout_generator(context.load_model(stage.base))
        judge = ModelJudge(generator, context.tokenizer)
    if not config.reward_model:
        return Grader(config, judge=judge)
    began = time.perf_counter()
    held_out = math.ceil(config.pairs / HELD_OUT)
    wanted = config.pairs + 2 * held_out
    pairs = preference_pairs(
        context.tokenizer,
        [context.environments[name] for name in dict.fromkeys(stage.config.environments)],
        wanted,
        stage.seed + PREFERENCES_SEED,
    )
    if len(pairs) < 3:
        names = ", ".join(dict.fromkeys(stage.config.environments))
        raise ValueError(
            f"posttraining.{stage.name}.reward.reward_model: no environment of {names} knows a worse answer; use 0"
        )
    held_out = min(held_out, len(pairs) // 3)
    trained, rest = pairs[2 * held_out :], pairs[: 2 * held_out]
    preferring = RewardModel(context.whole(model), context.tokenizer.pad)
    reward_model.train(preferring, trained, config.pairs_lr, stage.seed)
    reward_model.calibrate(preferring, rest[:held_out])
    quality = reward_model.measure(preferring, rest[held_out:])
    if not context.checkpoints.is_interrupted(stage.name):  # a resumed stage has logged it already
        numbers = {name: shown(value) for name, value in quality._asdict().items()}
        context.log.write(
            RewardModelRecord(
                stage=stage.name,
                pairs=len(trained),
                measured=len(rest) - held_out,
                seconds=round(time.perf_counter() - began, 3),
                **numbers,
            )
        )
    return Grader(config, preferring, judge)


def shown(value: float) -> float | None:
    """Return a number for the log, None for one that could not be measured."""
    return None if math.isnan(value) else round(value, 4)


def preference_pairs(
    tokenizer: Tokenizer, environments: Sequence[Environment], count: int, seed: int
) -> list[Pair]:
    """Return up to `count` pairs from these environments in turn; one without worse answers gives none."""
    rng = random.Random(seed)
    pairs = []
    for number in range(count):
        environment = environments[number % len(environments)]
        task = environment.task(number, seed)
        worse = environment.spoilt(task, rng)
        if worse is None:
            continue
        better = environment.oracle(task, task.messages, rng)
        lively = {**worse, "content": LIVELY + worse["content"]}
        texts = [
            judged_tokens(tokenizer, task.messages, answer) for answer in (better, worse, lively)
        ]
        pairs.append(Pair(*texts))
    return pairs
