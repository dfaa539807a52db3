"""Composed rewards: parts have names, the critic says what is broken, and a judge that fails leaves the statistics."""

import asyncio
import random

import pytest
from helpers.scripted import ScriptedGenerator, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import RewardConfig
from minglm.envs import ENVIRONMENTS
from minglm.envs.base import Score, ScoreStatus, assistant
from minglm.rewards.critic import criticise
from minglm.rewards.hybrid import PARTS, Grader, weighted
from minglm.rewards.judge import Item, Judged, JudgeFailed, JudgeStatus, ModelJudge, ProgramJudge
from minglm.rewards.rubric import judge_by_rubric
from minglm.rl.episode import Trajectory
from minglm.rl.grading import grade, judged
from minglm.testing.strategies import seeds

shares = st.floats(0, 1)
TASK = ENVIRONMENTS["constraints"].task(0, 3)
RIGHT = ENVIRONMENTS["constraints"].demonstrate(TASK)[-1]


def said(judged):
    """Return the text of an answer."""
    return judged.message["content"]


HACKABLE = (
    Item("thorough", "Is it thorough?", lambda judged: len(said(judged).split()) >= 4),
    Item("lively", "Is it lively?", lambda judged: said(judged).endswith("!")),
    Item("structured", "Is it structured?", lambda judged: said(judged)[:1] in "-*#1(["),
)


def answered(message, score=1.0, parts=None):
    """Return an answer to TASK for a judge."""
    parts = dict.fromkeys(TASK.criteria, 1.0) if parts is None else parts
    return Judged(TASK.messages, message, (), score, parts, TASK.criteria)


def trajectory(message):
    """Return a scored trajectory of TASK that ends with a message."""
    found = Trajectory(TASK, False, [*TASK.messages, message], texts=[message["content"]])
    found.score = ENVIRONMENTS["constraints"].judge(TASK, message)
    return found


def model_judge(reply):
    """Return a judge whose model always gives this reply."""
    tokenizer = byte_tokenizer()
    return ModelJudge(ScriptedGenerator(tokenizer, lambda prompt: f"{reply}<|user|>"), tokenizer)


@given(st.dictionaries(st.sampled_from(PARTS), shares), st.lists(shares, min_size=4, max_size=4))
def test_a_reward_lies_between_its_parts(parts, weights):
    """The weighted mean is within the parts that have a weight; without any it is 0."""
    config = RewardConfig(**dict(zip(PARTS, weights, strict=True)))
    counted = [value for name, value in parts.items() if getattr(config, name) > 0]
    value = weighted(parts, config)
    if counted:
        assert min(counted) - 1e-9 <= value <= max(counted) + 1e-9
    else:
        assert value == 0


@given(seeds)
def test_the_critic_names_what_is_broken(seed):
    """A spoilt answer breaks one constraint: the critic says which, and takes off its share."""
    env = ENVIRONMENTS["constraints"]
    task = env.task(0, seed)

    spoilt = env.spoilt(task, random.Random(seed))
    if spoilt is None:
        return
    parts = env.judge(task, spoilt).parts
    found = asyncio.run(
        criticise(
            ProgramJudge(), Judged(task.messages, spoilt, parts=parts, criteria=task.criteria)
        )
    )
    assert found.failed == tuple(name for name in task.criteria if not parts[name])
    assert found.value == pytest.approx(1 - len(found.failed) / len(task.criteria))


def test_rubrics_differ_with_and_without_a_right_answer():
    """A wrong answer in good form loses with an objective rubric, and not with the other."""
    wrong = asyncio.run(judge_by_rubric(ProgramJudge(), answered(RIGHT, 0.0)))
    assert wrong.failed == ("right",)
    open_ended = asyncio.run(judge_by_rubric(ProgramJudge(), answered(RIGHT, None)))
    assert open_ended.value == 1
    said_nothing = asyncio.run(judge_by_rubric(ProgramJudge(), answered(assistant(" "), None)))
    assert "substance" in said_nothing.failed


def test_a_hackable_rubric_pays_for_an_answer_to_nothing():
    """One text earns everything on every request; with rules and critic beside it, it does not."""
    text = assistant("- wow so very good!")
    env = ENVIRONMENTS["constraints"]
    alone = Grader(RewardConfig(rules=0, rubric=1), rubric=HACKABLE)
    hybrid = Grader(RewardConfig(critic=1, rubric=1), rubric=HACKABLE)
    for task in env.tasks(20, 0):
        score = env.judge(task, text)
        found = Judged(task.messages, text, (), score.value, score.parts, task.criteria)
        assert alone.grade([found])[0].value == 1
        assert hybrid.grade([found])[0].value < 0.7


@pytest.mark.parametrize(("reply", "expected"), [("yes", True), ("No.", False), ("是", True)])
def test_a_model_judge_is_heard(reply, expected):
    """Yes and no count, in both languages, whatever their case."""
    judge = model_judge(reply)
    assert asyncio.run(judge.ask(HACKABLE[0], answered(RIGHT))) is expected
    prompt = judge.tokenizer.decode(judge.generator.asked[0].prompt)
    assert TASK.messages[-1]["content"] in prompt and HACKABLE[0].question in prompt


@pytest.mark.parametrize("reply", ["maybe", "", "yes and no", "yes, no, yes!"])
def test_a_judge_that_answers_nonsense_is_named(reply):
    """Anything else than one word is nonsense."""
    with pytest.raises(JudgeFailed) as failure:
        asyncio.run(model_judge(reply).ask(HACKABLE[0], answered(RIGHT)))
    assert failure.value.status == JudgeStatus.NONSENSE


class Dead:
    """A generator that raises."""

    async def generate(self, request):
        raise ConnectionError("no judge")


class Silent:
    """A generator that never answers."""

    async def generate(self, request):
        await asyncio.sleep(60)


@pytest.mark.parametrize("generator", [Dead(), Silent()])
def test_a_judge_that_does_not_answer_leaves_the_statistics(generator):
    """The sample has the status of a failure of the infrastructure, with the reason; the others keep their rewards."""
    judge = ModelJudge(generator, byte_tokenizer(), patience=0.01)
    found = trajectory(RIGHT)
    halted = trajectory(RIGHT)
    halted.score = Score(0.0, ScoreStatus.FORMAT)
    grade(
        Grader(RewardConfig(rubric=1), judge=judge), ENVIRONMENTS, byte_tokenizer(), [found, halted]
    )
    assert not found.valid and "unanswered" in found.score.detail
    assert halted.score == Score(0.0, ScoreStatus.FORMAT), (
        "a halted episode earns 0, whoever judges"
    )


def test_a_graded_trajectory_logs_its_parts():
    """The value is the composed reward, the status is that of the rules, and every part is there by its name."""
    wrong = trajectory(assistant("no number"))
    right = trajectory(RIGHT)
    grade(Grader(RewardConfig(critic=1, rubric=1)), ENVIRONMENTS, byte_tokenizer(), [right, wrong])
    assert right.score.value == 1 and right.score.status == ScoreStatus.OK
    assert wrong.score.status == ScoreStatus.WRONG and 0 < wrong.score.value < 1
    assert {"rules", "critic", "rubric"} <= {*wrong.score.parts}
    assert "language" in wrong.score.detail or wrong.score.detail


def test_a_reward_without_parts_is_refused():
    """The message names the field."""
    with pytest.raises(ValueError, match=r"chat\.reward: every weight is 0"):
        RewardConfig(rules=0).check("chat.reward")
    with pytest.raises(ValueError, match="needs a reward model"):
        Grader(RewardConfig(reward_model=1))


def test_what_the_world_said_last_is_not_the_answer():
    """An episode that a bound on its turns cut off ends with a tool's result: judged is what the model said before it."""
    call = assistant("", calls=[("f", {})])
    result = {"role": "tool", "content": "a long and friendly result!"}
    cut = trajectory(assistant("one two"))
    cut.messages = [*TASK.messages, call, result, assistant("one two"), result]
    found = judged(cut, objective=True)
    assert found.message["content"] == "one two"
    assert found.prompt == [*TASK.messages, call, result]
