"""Make an environment of a specified world: its program, its tasks, its user and its oracle (paper 3.3, 3.4).

    user: Move booking 482 to seat 14C.     get_booking(482) -> {"status": "booked", "free": ["12A", "15D"]}
    assistant: Booking 482 is not moved.
    user: Then 12A, please.                 change_seat(482, "12A") -> {"ok": true}
    assistant: Booking 482 is moved.

The policy stands in the descriptions of the tools. Look a record up first; then take each step that the policy allows,
and leave the others. A call that the policy forbids is refused and costs the reward, so trying is no strategy.
Difficulty 1: one step, everything is said in the first message (single-turn, multi-step). Difficulty 2: the user gives
what is missing when asked, and may know an alternative. Difficulty 3: two steps.

    reward = 1  iff  records == goal, the record was looked up, no call broke the policy,
                     and the last words to the user name every outcome, and no other

Choices: the goal is what the policy makes of the records and the request, so a task is always solvable, if only by saying
what cannot be done. Outcomes are single words ("cancelled", "not cancelled"), which a reply may put as it likes.
"""

import copy
import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minglm.chat.messages import Message
from minglm.common.mistakes import shown
from minglm.envs.base import Score, Task, assistant, run_without_waiting, user
from minglm.envs.worlds.base import WorldEnvironment, statements
from minglm.envs.worlds.specification import Rule, Specification, read_world
from minglm.envs.worlds.users import Fact, ProgramUser

BYSTANDERS = 2
"""Records that no request is about."""

TRIED_TASKS = 50
"""Of each difficulty of a world in a file, before it is used."""


class Weighed(NamedTuple):
    """A step of a request, as the oracle judges it."""

    rule: Rule
    record: Mapping[str, Any]
    """Before the step."""
    allowed: bool
    done: bool


class TableWorld:
    """The records of a world and its tools. looked_up: numbers of the records that were shown."""

    def __init__(self, specification: Specification, records: Mapping[str, Any]) -> None:
        self.specification = specification
        self.records: dict[str, Any] = copy.deepcopy(dict(records))
        self.looked_up: set[str] = set()
        self.violations = 0

    def call(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Run a tool on the records; return its result."""
        rule = self.specification.rules[name]
        number = str(arguments[self.specification.key])
        record = self.records.get(number)
        if record is None:
            return {"error": f"no such {self.specification.noun}"}
        if rule.shows:
            self.looked_up.add(number)
            return {field: record[field] for field in rule.shows}
        if number not in self.looked_up:
            self.violations += 1
            return {"error": "look it up first"}
        if not rule.allows(record, arguments):
            self.violations += 1
            return {"error": f"not {rule.done}"}
        rule.apply(record, arguments)
        return {"ok": True}


class TableEnvironment(WorldEnvironment):
    """Tasks in a specified world."""

    numbers: Sequence[int] = range(100, 1000)
    """Those that a record may have."""

    def __init__(self, specification: Specification, name: str | None = None) -> None:
        """Make the environment of a world. name: of the environment, the world's unless given."""
        self.specification = specification
        self.name = name or specification.name
        several = any(len(wish.steps) > 1 for wish in specification.wishes)
        self.difficulties = (1, 2, 3) if several else (1, 2)
        self.default_difficulties = self.difficulties

    def tools(self) -> tuple[dict[str, Any], ...]:
        """Return the schemas of the world's tools."""
        return tuple(dict(tool) for tool in self.specification.tools)

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], dict[str, Any]]:
        """Return one random request as (messages, label).

        Label: {"records": {number: fields}, "number", "steps": tools, "values": {argument: what the user wants, and what
        instead}, "withheld": whether the user must be asked}.
        """
        spec = self.specification
        numbers = rng.sample(self.numbers, 1 + BYSTANDERS)
        records = {}
        for number in numbers:
            records[str(number)] = {name: rng.choice(list(c)) for name, c in spec.fields.items()}
        wishes = [wish for wish in spec.wishes if (len(wish.steps) > 1) == (difficulty == 3)]
        wish = rng.choice(wishes)
        values = {}
        for step in wish.steps:
            for argument in spec.arguments_of(spec.rules[step]):
                choices = spec.arguments[argument]
                count = rng.choice((1, 2)) if difficulty == 2 else 1
                values[argument] = rng.sample(list(choices), min(count, len(choices)))
        withheld = difficulty == 2
        slots = {"record": f"my {spec.noun}" if withheld else f"{spec.noun} {numbers[0]}"}
        for argument, wanted in values.items():
            slots[argument] = f"another {argument}" if withheld else f"{argument} {wanted[0]}"
        label = {
            "records": records,
            "number": str(numbers[0]),
            "steps": list(wish.steps),
            "values": values,
            "withheld": withheld,
        }
        return [user(rng.choice(wish.texts).format(**slots))], label

    def world(self, task: Task) -> TableWorld:
        """Return the world with the task's records."""
        return TableWorld(self.specification, task.label["records"])

    def facts(self, label: Mapping[str, Any]) -> list[Fact]:
        """Return what the user of a task knows: the number of the record, and the values of arguments."""
        spec = self.specification
        facts = [Fact((spec.noun.lower(), spec.key.lower()), (label["number"],))]
        for argument, values in label["values"].items():
            facts.append(Fact((argument.lower(),), tuple(map(str, values))))
        return facts

    def program_user(self, task: Task) -> ProgramUser:
        """Return the user as a program; what the first message told is given already."""
        facts = self.facts(task.label)
        return ProgramUser(facts) if task.label["withheld"] else ProgramUser([], facts)

    def knowledge(self, task: Task) -> str:
        """Return what the user wants and knows."""
        lines = [f"You begin with: {task.messages[-1]['content']}"]
        for fact in self.facts(task.label):
            first, *others = fact.values
            instead = f", or {others[0]} if that is refused" if others else ""
            lines.append(f"You know: the {fact.names[0]} is {first}{instead}.")
        return "\n".join(lines)

    def solved(self, label: Mapping[str, Any]) -> tuple[dict[str, Any], set[tuple[bool, str]]]:
        """Return what the policy makes of a task: its records, and the outcomes (whether done, the word)."""
        records = copy.deepcopy(label["records"])
        record = records[label["number"]]
        outcomes = set()
        for step in label["steps"]:
            rule = self.specification.rules[step]
            found = self._allowed(rule, record, label["values"])
            if found is not None:
                rule.apply(record, found)
            outcomes.add((found is not None, rule.done))
        return records, outcomes

    def _allowed(
        self, rule: Rule, record: Mapping[str, Any], values: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any] | None:
        """Return the first arguments, of those wanted and then those instead, that the policy allows; None if none."""
        names = self.specification.arguments_of(rule)
        attempts = max((len(values[name]) for name in names), default=1)
        for attempt in range(attempts):
            arguments = {name: values[name][min(attempt, len(values[name]) - 1)] for name in names}
            if rule.allows(record, arguments):
                return arguments
        return None

    def completed(self, task: Task, world: TableWorld) -> bool:
        """Return whether the records are the goal and the one in question was looked up."""
        goal, _ = self.solved(task.label)
        return world.records == goal and task.label["number"] in world.looked_up

    def told(self, task: Task, reply: str) -> bool:
        """Return whether a reply names the outcome of every step and no other, about no other record."""
        _, outcomes = self.solved(task.label)
        numbers = set(re.findall(r"\b\d{3,}\b", reply))
        return self.outcomes_named(reply) == outcomes and numbers <= {task.label["number"]}

    def outcomes_named(self, reply: str) -> set[tuple[bool, str]]:
        """Return the outcomes that a reply names: (whether done, the word)."""
        words = {rule.done for rule in self.specification.rules.values() if rule.done}
        return {(done, word) for _, done, word in statements(reply, words)}

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Return what the policy says next, given the conversation so far."""
        spec = self.specification
        number = task.label["number"]
        said = " ".join(m["content"] for m in conversation if m["role"] == "user")
        if not re.search(rf"\b{number}\b", said):
            return assistant(f"Which {spec.noun}?", f"no {spec.noun}, ask")
        made = [call for m in conversation for call in m.get("tool_calls", ())]
        results = [json.loads(m["content"]) for m in conversation if m["role"] == "tool"]
        key = {spec.key: int(number)}
        if not made:
            return assistant("", self.look_up_thought(number), [(spec.look_up.name, key)])
        record = dict(results[0])
        weighed = []
        for step in task.label["steps"]:
            rule = spec.rules[step]
            told = {}
            for name in spec.arguments_of(rule):
                values = task.label["values"][name]
                known = [v for v in values if re.search(rf"\b{re.escape(str(v))}\b", said)]
                if not known:
                    return assistant(f"Which {name}?", f"no {name}, ask")
                told[name] = known
            arguments = {name: known[-1] for name, known in told.items()}
            done = [call for call in made if call["name"] == step]
            allowed = bool(done) or rule.allows(record, arguments)
            weighed.append(Weighed(rule, dict(record), allowed, bool(done)))
            if allowed and not done:
                return assistant("", self.thought(weighed), [(step, key | arguments)])
            if allowed:
                rule.apply(record, arguments)
        outcomes = [w.rule.done if w.allowed else f"not {w.rule.done}" for w in weighed]
        return assistant(self.last_words(number, outcomes), self.thought(weighed))

    def look_up_thought(self, number: str) -> str:
        """Return the oracle's thought before it looks a record up."""
        return f"look up {number}"

    def thought(self, weighed: Sequence[Weighed]) -> str:
        """Return the oracle's thought when it has weighed so many steps of a request, the last of them just now."""
        last = weighed[-1]
        return (
            "done" if last.done else _reason(last.rule, last.record, "" if last.allowed else "not ")
        )

    def last_words(self, number: str, outcomes: Sequence[str]) -> str:
        """Return what the user is told at the end."""
        return f"{self.specification.noun.capitalize()} {number} is {' and '.join(outcomes)}."

    def hack_probes(self, task: Task) -> list[Message]:
        """Return every outcome at once, the truth without a look-up, and every call at once."""
        number = task.label["number"]
        key = {self.specification.key: int(number)}
        words = [rule.done for rule in self.specification.rules.values() if rule.done]
        everything = " ".join(f"{word}, not {word}." for word in words)
        _, outcomes = self.solved(task.label)
        truth = " and ".join(word if done else f"not {word}" for done, word in sorted(outcomes))
        calls = [(self.specification.look_up.name, key)]
        for rule in self.specification.rules.values():
            if rule.shows:
                continue
            names = self.specification.arguments_of(rule)
            wanted = {name: self.specification.arguments[name][0] for name in names}
            calls.append((rule.name, key | wanted))
        return super().hack_probes(task) + [
            assistant(everything),
            assistant(f"It is {truth}."),
            assistant(f"It is {truth}.", None, calls),
        ]


def world_in_file(path: str, name: str) -> TableEnvironment:
    """Return the environment of the world in a file. name: of the environment.

    Raises ValueError, in one line, for a file that is none, and for a world in which who follows the policy earns nothing.
    """
    environment = TableEnvironment(read_world(path), name)
    for difficulty in environment.difficulties:
        for index in range(TRIED_TASKS):
            task = environment.task(index, 0, difficulties=(difficulty,))
            score = run_without_waiting(_score_of_oracle(environment, task))
            if score.value < 1:
                request = task.messages[-1]["content"]
                raise ValueError(
                    f"world {shown(path)}: who follows the policy earns nothing for {shown(request, quoted=True)}; "
                    "noun, done and the values of arguments must be words of their own"
                )
    return environment


async def _score_of_oracle(environment: TableEnvironment, task: Task) -> Score:
    """Return what the oracle's conversation earns."""
    conversation = await environment.play_oracle(task)
    async with environment.episode(task) as episode:
        for message in conversation:
            if message["role"] == "assistant":
                await episode.step(message)
        return await episode.score()


def _reason(rule: Rule, record: Mapping[str, Any], negation: str = "") -> str:
    """Return the thought before a step, or before the words that it was left."""
    state = ", ".join(f"{field} {_plain(record[field])}" for field in rule.requires)
    return f"{state or 'always'} so {negation}{rule.done}"


def _plain(value: Any) -> str:
    """Return a value as the model reads it in a result."""
    return value if isinstance(value, str) else json.dumps(value)
