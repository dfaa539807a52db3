"""Draw solved tasks for mid-training, and the texts that training data must not contain (paper 2.3)."""

from minglm.config import RunConfig
from minglm.data.build import TaskData
from minglm.data.dialogues import Conversation
from minglm.envs import ENVIRONMENTS
from minglm.eval.tasks import TEST_SEED
from minglm.recipe.inputs import TASKS, environments_of, named_environments, provoking_kinds

TASK_STREAM = 1  # the stages after mid-training have others (`minglm.recipe.stages`)


def evaluation_texts(run: RunConfig) -> dict[str, list[str]]:
    """Return the prompts of the test tasks, {"tasks:ENVIRONMENT": texts}, of ours and of all that the run names."""
    named = [name for names in named_environments(run).values() for name in names]
    environments = environments_of(run)
    asked = {name: [environments[name]] for name in dict.fromkeys([*environments, *named])}
    for config in run.posttraining.reinforcements().values():
        for name, kind in provoking_kinds(run, config).items():
            asked.setdefault(name, []).append(kind)
    sets = {}
    for name, kinds in asked.items():
        texts = []
        for kind in kinds:
            for task in kind.distinct_tasks(run.evaluation.problems, TEST_SEED):
                prompts = [m["content"] for m in task.messages if m["role"] == "user"]
                texts.append("\n".join(prompts))
        sets[TASKS + name] = list(dict.fromkeys(texts))
    return sets


def task_data(run: RunConfig) -> TaskData:
    """Return what the environments contribute to the data of a run; nothing is computed before it is asked for."""
    return TaskData(
        solved=lambda: solutions(run),
        evaluation_texts=lambda: evaluation_texts(run),
    )


def solved_environments(run: RunConfig) -> list[str]:
    """Return the environments whose solved tasks are sources of mid-training, named tasks:ENVIRONMENT in a mixture."""
    named = []
    for _, stage in run.stages.items():
        for source in stage.mixture if stage.tokens else ():
            if source.startswith(TASKS):
                named.append(source.removeprefix(TASKS))
    learned = [name for _, expert in run.posttraining.experts() for name in expert.environments]
    return [name for name in dict.fromkeys([*learned, *named]) if name in named]


def solutions(run: RunConfig) -> dict[str, list[Conversation]]:
    """Return solved tasks for mid-training, {environment: conversations}; three in four are solved with thinking.

    Only one trajectory in four lists its tools: the block is longer than the conversation, and always the same.
    """
    solved: dict[str, list[Conversation]] = {}
    for name in solved_environments(run):
        environment = ENVIRONMENTS[name]
        conversations = []
        tasks = environment.shown_tasks(run.data.trajectories, run.seed * 100 + TASK_STREAM)
        for number, task in enumerate(tasks):
            thinking = number % 4 != 3
            tools = task.tools if number % 8 < 2 else ()
            messages = environment.demonstrate(task, thinking)
            conversations.append((messages, tools, thinking))
        solved[name] = conversations
    return solved
