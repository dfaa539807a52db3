"""Grade trajectories by a reward of several parts, in the place of the environment's own score (paper 3.4).

The score keeps its status and its parts; its value becomes that of the grader, and the grader's parts are
added by name. Whatever reads scores later (groups, logs, recorded rollouts) therefore needs to know nothing
of graders. A trajectory whose judge failed gets the status "infrastructure", as if the environment had
failed: it leaves all statistics.

A trajectory that the environment itself could not judge stays as it is, and so does one that was halted for
its format (paper 3.3.2: halt and zero): no part of the reward may pay for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from minglm.data.tokenizer import Tokenizer
from minglm.envs.base import Environment, Score, ScoreStatus
from minglm.rewards.hybrid import Grader
from minglm.rewards.judge import Judged
from minglm.rewards.reward_model import judged_tokens
from minglm.rl.episode import Trajectory


def grade(
    grader: Grader,
    environments: Mapping[str, Environment],
    tokenizer: Tokenizer,
    trajectories: Sequence[Trajectory],
) -> None:
    """Give trajectories their reward, in place."""
    graded = [t for t in trajectories if t.score.status in (ScoreStatus.OK, ScoreStatus.WRONG)]
    # Only a reward model reads tokens.
    reader = None if grader.reward_model is None else tokenizer
    answers = [judged(t, environments[t.task.environment].objective, reader) for t in graded]
    for trajectory, found in zip(graded, grader.grade(answers), strict=True):
        score = trajectory.score
        parts = {**score.parts, **found.parts}
        if found.value is None:
            trajectory.score = Score(0.0, ScoreStatus.INFRASTRUCTURE, parts, found.detail)
        else:
            detail = ", ".join(found.failed) or score.detail
            trajectory.score = replace(score, value=found.value, parts=parts, detail=detail)


def judged(trajectory: Trajectory, objective: bool, tokenizer: Tokenizer | None = None) -> Judged:
    """Return what a judge sees of a trajectory: its last answer, what was asked, and what the environment says of it.

    tokenizer: for prompt and answer as token ids; None: without them.
    """
    task = trajectory.task
    prompt, message = trajectory.last_answer()
    return Judged(
        prompt,
        message,
        () if tokenizer is None else judged_tokens(tokenizer, prompt, message),
        trajectory.score.value if objective else None,
        trajectory.score.parts,
        task.criteria,
        trajectory.faults(),
    )
