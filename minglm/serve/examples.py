"""Suggest what to ask a model: tasks of the environments that it was trained on (no section in the paper).

    arithmetic, code, retail, instructions  ->  "4+3-2=", "Write f(x): add 3.", "Cancel order 123." with its tools, ...

A small model knows its tasks and little else, so a visitor should meet those first. The tasks are of the test
split: the model was not trained on them. Of a released checkpoint the environments are not known; the
suggestions are general then.
"""

from collections.abc import Sequence
from typing import Any

from minglm.envs import ENVIRONMENTS
from minglm.envs.base import Environment, Task

JSONObject = dict[str, Any]

MOST = 4
"""Suggestions on the page."""
TASKS = 20
"""Tasks of an environment to choose from."""
GENERAL = (
    "What is a mixture of experts?",
    "Write a Python function that reverses a list.",
    "Name three colours, as a list.",
)


def examples(environments: Sequence[str]) -> JSONObject:
    """Return {"about": a sentence, "examples": [{"text", "kind", "tools"}, ...]}, the easiest tasks of each environment.

    environments: names of those that the model was trained on; without any, the examples are general.
    """
    if not environments:
        general = [{"text": text, "kind": "", "tools": []} for text in GENERAL]
        return {"about": "", "examples": general}
    found: list[JSONObject] = []
    for place in range(MOST):
        environment = ENVIRONMENTS[environments[place % len(environments)]]
        task = _easy_task(environment, [idea["text"] for idea in found])
        text = task.messages[-1]["content"]
        found.append({"text": text, "kind": environment.name, "tools": list(task.tools)})
    return {"about": f"This model was trained on {_listed(environments)}.", "examples": found}


def _easy_task(environment: Environment, taken: Sequence[str]) -> Task:
    """Return a test task of the least difficulty that is not taken, in English as the page is if there is one."""
    easiest = [min(environment.default_difficulties)]
    tasks = [environment.task(index, 0, "test", easiest) for index in range(TASKS)]
    for task in tasks:
        text = task.messages[-1]["content"]
        if text.isascii() and text not in taken:
            return task
    return tasks[0]


def _listed(names: Sequence[str]) -> str:
    """Return names as words: `a, b and c`."""
    *first, last = dict.fromkeys(names)
    return f"{', '.join(first)} and {last}" if first else last
