"""Compose the reward of RL from named parts: rules, critic, rubric, reward model (paper 3.4).

    reward = sum_k w_k part_k / sum_k w_k         over the parts that say something of the answer

    rules          the environment's own score: all constraints hold, or not
    critic         share of the constraints that hold
    rubric         share of the rubric's questions that hold
    reward_model   calibrated preference

Each can be fooled alone. Rules see only what a program can check; a critic pays a little for every answer; a
rubric may not look at the request; a reward model has learnt the manners of good answers as well. What fools
one of them loses with the others, and because all parts are logged, a part that rises while the others fall
is seen (reward hacking).

An answer whose judge fails has no reward: its status is named, and it leaves the statistics of its group.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from minglm.config.posttraining import RewardConfig
from minglm.rewards.critic import criticise
from minglm.rewards.judge import Item, Judge, Judged, Judgement, JudgeStatus, ProgramJudge
from minglm.rewards.reward_model import RewardModel
from minglm.rewards.rubric import judge_by_rubric

PARTS = ("rules", "critic", "rubric", "reward_model")
"""Names of the parts, which are those of their weights in the config."""


class Graded(NamedTuple):
    """The reward of one answer."""

    value: float | None
    """None where a judge failed."""
    parts: dict[str, float]
    failed: tuple[str, ...] = ()
    """The constraints that the critic says are broken."""
    status: JudgeStatus = JudgeStatus.OK
    detail: str = ""


class Grader:
    """Grades answers by the parts that a config names.

    reward_model: needed where its weight is not 0. judge: of rubric and critic. rubric: its items; None:
    those that fit the answer.
    """

    def __init__(
        self,
        config: RewardConfig,
        reward_model: RewardModel | None = None,
        judge: Judge | None = None,
        rubric: Sequence[Item] | None = None,
    ) -> None:
        self.config = config
        self.reward_model = reward_model
        self.judge = judge or ProgramJudge()
        self.rubric = rubric
        if config.reward_model and reward_model is None:
            raise ValueError("a reward with the part reward_model needs a reward model")

    def grade(self, answers: Sequence[Judged]) -> list[Graded]:
        """Return the reward of each answer, from code without an event loop."""
        values: Sequence[float | None] = [None] * len(answers)
        if self.config.reward_model and self.reward_model is not None:
            values = self.reward_model.values([answer.tokens for answer in answers])
        return asyncio.run(self._grade_all(answers, values))

    async def _grade_all(
        self, answers: Sequence[Judged], values: Sequence[float | None]
    ) -> list[Graded]:
        """Grade all answers at once."""
        return list(
            await asyncio.gather(
                *(self._grade(*pair) for pair in zip(answers, values, strict=True))
            )
        )

    async def _grade(self, answer: Judged, preferred: float | None) -> Graded:
        """Grade one answer; preferred: what the reward model says."""
        judgements: dict[str, Judgement] = {}
        if self.config.critic:
            judgements["critic"] = await criticise(self.judge, answer)
        if self.config.rubric:
            judgements["rubric"] = await judge_by_rubric(self.judge, answer, self.rubric)
        for name, judgement in judgements.items():
            if judgement.status != JudgeStatus.OK:
                return Graded(
                    None,
                    {},
                    (),
                    judgement.status,
                    f"{name}, {judgement.status}: {judgement.detail}",
                )
        found = {"rules": answer.score, "reward_model": preferred}
        found |= {name: judgement.value for name, judgement in judgements.items()}
        parts = {name: value for name, value in found.items() if value is not None}
        failed = judgements["critic"].failed if "critic" in judgements else ()
        return Graded(weighted(parts, self.config), parts, failed)


def weighted(parts: Mapping[str, float], config: RewardConfig) -> float:
    """Return the weighted mean of the parts that are there; 0 where none of them has a weight."""
    weights = {name: getattr(config, name) for name in parts}
    total = sum(weights.values())
    if not total:
        return 0.0
    return sum(weights[name] * value for name, value in parts.items()) / total
