"""Suggest what to ask a model: tasks of the environments that it was trained on (no section in the paper).

    arithmetic, code, retail, instructions  ->  "4+3-2=", "Write f(x): add 3.", "Cancel order 123." with its tools, ...

A small model knows its tasks and little else, so a visitor should meet those first. The tasks are of the test split: the
model was not trained on them. Of a released checkpoint the environments are not known; the suggestions are general then.
"""

from collections.abc import Sequence
from typing import Any

from minglm.envs import ENVIRONMENTS

JSONObject = dict[str, Any]

MOST = 4
"""Suggestions on the page."""
MOST_DRAWS = 40
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
    found: dict[str, JSONObject] = {}  # by text: small environments repeat themselves
    for index in range(MOST_DRAWS):
        environment = ENVIRONMENTS[environments[index % len(environments)]]
        easiest = min(environment.default_difficulties)
        task = environment.task(index, seed=0, split="test", difficulties=[easiest])
        text = task.messages[-1]["content"]
        idea = {"text": text, "kind": environment.name, "tools": list(task.tools)}
        if len(found) < MOST and text.isascii():  # in the language of the page
            found.setdefault(text, idea)
    return {
        "about": f"This model was trained on {_listed(environments)}.",
        "examples": list(found.values()),
    }


def _listed(names: Sequence[str]) -> str:
    """Return names as words: `a, b and c`."""
    *first, last = dict.fromkeys(names)
    return f"{', '.join(first)} and {last}" if first else last
