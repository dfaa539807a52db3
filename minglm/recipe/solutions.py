"""Draw solved tasks for mid-training, and the texts that training data must not contain (paper 2.3)."""

from minglm.config import RunConfig
from minglm.data.build import TaskData
from minglm.data.dialogues import Conversation
from minglm.envs import ENVIRONMENTS
from minglm.eval.tasks import TEST_SEED

TASK_STREAM = 1  # the stages after mid-training have others (`minglm.recipe.stages`)


def check_environments(run: RunConfig) -> None:
    """Raise ValueError for a stage of post-training without tasks, or with tasks that do not exist."""
    post = run.posttraining
    named = {name: expert.environments for name, expert in post.experts()}
    named |= {name: config.environments for name, config in post.reinforcements().items()}
    for name, environments in named.items():
        if not environments or not set(environments) <= set(ENVIRONMENTS):
            given = " ".join(environments) or "nothing"
            raise ValueError(
                f"posttraining.{name}.environments = {given}: must be some of {', '.join(ENVIRONMENTS)}"
            )


def evaluation_texts(run: RunConfig) -> dict[str, list[str]]:
    """Return the prompts of the test tasks of every environment, {"tasks:ENVIRONMENT": texts}."""
    sets = {}
    for name, environment in ENVIRONMENTS.items():
        texts = []
        for task in environment.test_tasks(run.evaluation.problems, TEST_SEED):
            prompts = [m["content"] for m in task.messages if m["role"] == "user"]
            texts.append("\n".join(prompts))
        sets[f"tasks:{name}"] = texts
    return sets


def task_data(run: RunConfig) -> TaskData:
    """Return what the environments contribute to the data of a run; nothing is computed before it is asked for."""
    return TaskData(
        solved=lambda: solutions(run),
        evaluation_texts=lambda: evaluation_texts(run),
    )


def solved_environments(run: RunConfig) -> list[str]:
    """Return the environments whose solved tasks are sources of mid-training, named tasks:ENVIRONMENT in a mixture."""
    post = run.posttraining
    learned = [name for _, expert in post.experts() for name in expert.environments]
    return list(dict.fromkeys([*learned, *post.pathology_rl.environments]))


def solutions(run: RunConfig) -> dict[str, list[Conversation]]:
    """Return solved tasks for mid-training, {environment: conversations}; three in four are solved with thinking.

    Only one trajectory in four lists its tools: the block is longer than the conversation, and always the same.
    """
    solved: dict[str, list[Conversation]] = {}
    for name in solved_environments(run):
        environment = ENVIRONMENTS[name]
        conversations = []
        tasks = environment.tasks(run.data.trajectories, run.seed * 100 + TASK_STREAM)
        for number, task in enumerate(tasks):
            thinking = number % 4 != 3
            tools = task.tools if number % 8 < 2 else ()
            messages = environment.demonstrate(task, thinking)
            conversations.append((messages, tools, thinking))
        solved[name] = conversations
    return solved
