"""Solved tasks for mid-training, and the texts that training data must not contain (paper 2.3)."""

from minglm.config.run import RunConfig
from minglm.data.build import Conversation, TaskData
from minglm.envs import ENVIRONMENTS
from minglm.eval.tasks import TEST_SEED

TASK_SEED = 1


def check_environments(run):
    """Raises ValueError for a stage of post-training without tasks, or with tasks that do not exist."""
    post = run.posttraining
    named = {f"{name}.environments": expert.environments for name, expert in post.experts()}
    named |= {f"{name}.rl.environments": expert.rl.environments for name, expert in post.experts()}
    named |= {
        f"{name}.environments": getattr(post, name).environments
        for name in ("general_rl", "pathology_rl")
    }
    for name, environments in named.items():
        if not environments or not set(environments) <= set(ENVIRONMENTS):
            given = " ".join(environments) or "nothing"
            raise ValueError(
                f"posttraining.{name} = {given}: must be some of {', '.join(ENVIRONMENTS)}"
            )


def evaluation_texts(run: RunConfig) -> dict[str, list[str]]:
    """Return the prompts of the test tasks of every environment, {"tasks:ENVIRONMENT": texts}."""
    sets = {}
    for name, environment in ENVIRONMENTS.items():
        tasks = environment.test_tasks(run.evaluation.problems, TEST_SEED)
        sets[f"tasks:{name}"] = [
            "\n".join(m["content"] for m in t.messages if m["role"] == "user") for t in tasks
        ]
    return sets


def task_data(run: RunConfig) -> TaskData:
    """Return what the environments contribute to the data of a run; nothing is computed before it is asked for."""
    return TaskData(
        solved=lambda: solutions(run),
        evaluation_texts=lambda: evaluation_texts(run),
    )


def solutions(run: RunConfig) -> dict[str, list[Conversation]]:
    """Return solved tasks for mid-training, {environment: conversations}; three in four are solved with thinking.

    Only one trajectory in four lists its tools: the block is longer than the conversation, and always the same.
    """
    post, found = run.posttraining, {}
    names = [name for _, expert in post.experts() for name in expert.environments]
    for name in dict.fromkeys([*names, *post.pathology_rl.environments]):
        found[name] = []
        for number, task in enumerate(
            ENVIRONMENTS[name].tasks(run.data.trajectories, run.seed * 100 + TASK_SEED)
        ):
            thinking, tools = number % 4 != 3, task.tools if number % 8 < 2 else ()
            found[name].append((ENVIRONMENTS[name].demonstrate(task, thinking), tools, thinking))
    return found
