"""Ask for the next step of a conversation with tools: step-wise function calling (paper 3.4).

    user: Lend me book 417.    get_book(417) -> {"state": "in"}         the right step: lend_book(417)
    user: Lend me my book.                                              the right step: "Which book?"

    reward = 1  iff  the format is right, and the call is the annotated one: name, parameters, every field;
             or, where the right step is a reply,  no call, and the reply says what is due and nothing else

Every step is cut from a conversation that the oracle of a tool set had with its user (`minglm.envs.worlds`): single-turn
requests that take several steps, and conversations in which the user is asked. Difficulty 1: the first step. Difficulty 2:
any step. Difficulty 3: any step, with the tools of another set beside the right ones.

Choices
- Values are equal if their JSON is: 40 is neither "40" nor 40.0, true is not 1.
- The paper lets the right step be a plain reply and prints no reward for that case. Here a question must name the missing
  fact and no other; the last words must name the outcomes, and no other.
- The earlier steps keep their reasoning, as in an episode; with thinking off they have none.
- The sets are not those of end-to-end evaluation (`retail`, `airline`), so that steps teach nothing of their tasks.

Simplified: a right step is one call. Text beside the right call is not read.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from minglm.chat.messages import Message
from minglm.envs.base import Score, SingleTurn, Task, assistant, verdict
from minglm.envs.worlds.sets import TRAINED
from minglm.envs.worlds.tables import TableEnvironment

SETS = {specification.name: TableEnvironment(specification) for specification in TRAINED}
"""The environments whose conversations are cut into steps, by name."""
QUESTION = re.compile(r"\b(?:which|what)\b([^?.!]*)\?", re.IGNORECASE)


class Functions(SingleTurn):
    """One step of a conversation with tools.

    worlds: the environments whose conversations are cut, by name. name: of this environment.
    """

    group = "agentic"
    # "Which book?" is right where the first step of a library's task is to ask.
    chance = 0.15

    def __init__(
        self, worlds: Mapping[str, TableEnvironment] = SETS, name: str = "functions"
    ) -> None:
        self.worlds = worlds
        self.name = name
        specs = [world.specification for world in worlds.values()]
        facts = {fact.lower() for spec in specs for fact in (spec.noun, *spec.arguments)}
        self.facts = sorted(facts)
        """All that a user may be asked for."""

    def tools(self) -> tuple[dict[str, Any], ...]:
        """Return the schemas of all sets."""
        return tuple(schema for world in self.worlds.values() for schema in world.tools())

    def offered(self, label: Any) -> tuple[dict[str, Any], ...]:
        """Return the schemas of the sets that the label names, in its order."""
        by_name = {schema["name"]: schema for schema in self.tools()}
        return tuple(by_name[name] for name in label["offered"])

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], dict[str, Any]]:
        """Return one random step as (the conversation before it, label).

        Label: {"set", "offered": names of tools, "step": the annotated message, "outcomes": that it names, "number": of the
        record that they are about}.
        """
        world = rng.choice(list(self.worlds.values()))
        inner = rng.choice(world.difficulties)
        messages, about = world.draw(rng, inner)
        conversation = world.demonstrate(world.made(messages, about, inner))
        steps = [at for at, m in enumerate(conversation) if m["role"] == "assistant"]
        at = steps[0] if difficulty == 1 else rng.choice(steps)
        names = [schema["name"] for schema in world.tools()]
        if difficulty == 3:
            other = rng.choice([one for one in self.worlds.values() if one is not world])
            names += [schema["name"] for schema in other.tools()]
            rng.shuffle(names)
        step = conversation[at]
        outcomes = sorted(map(list, world.outcomes_named(step["content"])))
        label = {
            "set": world.name,
            "offered": names,
            "step": dict(step),
            "number": about["number"] if outcomes else None,
            "outcomes": outcomes,
        }
        return conversation[:at], label

    def problem(self, messages: list[Message], label: Any) -> list[Any]:
        """Return what is said, without the thoughts, and the right step: other tools beside it make no other problem."""
        said = [[m["role"], m["content"], m.get("tool_calls", [])] for m in messages]
        return [label["set"], said, label["step"]["content"], label["step"].get("tool_calls", [])]

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Return the annotated step."""
        return task.label["step"]

    def judge(self, task: Task, message: Message) -> Score:
        """Return 1 for the annotated step, else 0."""
        right = task.label["step"].get("tool_calls", [])
        calls = list(message.get("tool_calls") or [])
        if not right:
            return verdict(not calls and self._says(task, message["content"]), {"reply": 1.0})
        named = [call["name"] for call in calls] == [call["name"] for call in right]
        filled = named and _plain(calls) == _plain(right)
        return verdict(filled, {"reply": 0.0, "named": float(named)})

    def _says(self, task: Task, reply: str) -> bool:
        """Return whether a reply asks for the missing fact alone, or names the outcomes alone."""
        label = task.label
        named = self.worlds[label["set"]].outcomes_named(reply)
        questions = " ".join(QUESTION.findall(reply))
        numbers = set(re.findall(r"\b\d{3,}\b", reply))
        if label["outcomes"]:
            right = named == set(map(tuple, label["outcomes"]))
            return right and "?" not in reply and numbers <= {label["number"]}
        return not named and self._asked(questions) == self._asked(label["step"]["content"])

    def _asked(self, text: str) -> set[str]:
        """Return the facts that a text names."""
        return {fact for fact in self.facts if re.search(rf"\b{fact}\b", text.lower())}

    def hack_probes(self, task: Task) -> list[Message]:
        """Return a question about everything, every outcome, every call at once, and near misses of the right call."""
        spec = self.worlds[task.label["set"]].specification
        probes = super().hack_probes(task)
        probes.append(assistant(f"Which {' or which '.join(self.facts)}?"))
        words = [rule.done for rule in spec.rules.values()]
        probes.append(assistant(" ".join(f"{word}, not {word}." for word in words if word)))
        for call in task.label["step"].get("tool_calls", []):
            name, arguments = call["name"], call["arguments"]
            other = arguments | {spec.key: arguments[spec.key] + 1}
            probes += [
                assistant("", None, [(name, arguments), (name, arguments)]),
                assistant("", None, [(name, other)]),
                assistant(f"{name} {_plain(arguments)}"),
            ]
        return probes


def _plain(value: Any) -> str:
    """Return a value as JSON, equal for equal values of equal types."""
    return json.dumps(value, sort_keys=True)
