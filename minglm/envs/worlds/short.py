"""Deal worlds in single characters, another one in every conversation, so that tools can only be read from their list.

    system     ?KANO dLAPUNOq aMONOr       look up with KA(NO); d: LA(PU, NO), allowed in state q; a: MO(NO), in state r
    user       d b 7 PU k                  do d to record 7, with k as PU
    model      ?KANO                       KA(NO=7)                  ->  {"s": "q"}
               dLAPUNOqq+                  LA(PU="k", NO=7)          ->  {"s": "t"}
               d+                          d

Program, user, policy and reward are those of `tables`. Names of tools and arguments are two capitals, what users ask for
and the states of a record are small letters, records have one digit. A thought copies the line of the tool from the list, adds
the state as it is, and says whether the policy allows the call.

Choices
- `Worlds` draws a specification for every task, from a number in its label: names, letters, which tool is allowed in which
  state and what it leads to, and which tools have an argument. A model that answers must have read them.
- `shop`, `airline`, and the three sets of the step-wise calls always have the same names, and no drawn world has one of
  them. The policies are those of their namesakes, with one state in place of several fields.
- The result of a call is the record as the call left it, because what a tool of a new world leads to cannot be known.
- The line of a tool begins with the letter that users say, so that reading it is induction: find the letter, go on as there.
- The list is a turn of the system (`Listed`). The published form takes 130 tokens a tool where a byte is a token.
"""

import functools
import random
import string
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from minglm.chat.messages import Message
from minglm.envs.base import Environment, Episode, Task
from minglm.envs.functions import Functions
from minglm.envs.worlds.sets import schema
from minglm.envs.worlds.specification import Rule, Specification, Wish
from minglm.envs.worlds.tables import TableEnvironment, TableWorld, Weighed

LETTERS = string.ascii_lowercase
LOOK_UP = "?"


def short(
    name: str,
    noun: str,
    key: str,
    states: str,
    look_up: str,
    actions: Mapping[str, tuple[str, str, str, str]],
    values: Mapping[str, str] = MappingProxyType({}),
    pairs: Mapping[str, str] = MappingProxyType({}),
) -> Specification:
    """Return a specification in single characters.

    actions: {letter: (tool, its argument beside the key or "", the state that it requires, the state that it leads to)}.
    values: {argument: letters}. pairs: {what users say: letters of two actions, in this order}.
    """
    rules = {look_up: Rule(look_up, LOOK_UP, schema(key), ("s",), {}, {}, "")}
    for letter, (called, argument, required, reached) in actions.items():
        inputs = schema(key, **({argument: "string"} if argument else {}))
        description = f"{letter} {required}"
        rules[called] = Rule(
            called, description, inputs, (), {"s": [required]}, {"s": reached}, letter
        )
    wishes = []
    for said, letters in (dict(zip(actions, actions, strict=True)) | dict(pairs)).items():
        arguments = dict.fromkeys(actions[letter][1] for letter in letters if actions[letter][1])
        text = f"{said} {{record}}" + "".join(f" {{{argument}}}" for argument in arguments)
        wishes.append(Wish(tuple(actions[letter][0] for letter in letters), (text,)))
    fields = {"s": tuple(states)}
    choices = {argument: tuple(letters) for argument, letters in values.items()}
    return Specification(name, noun, key, fields, choices, rules, tuple(wishes))


SHOP = short(
    "shop",
    noun="o",
    key="OR",
    states="pds",
    look_up="GE",
    actions={"c": ("CA", "", "p", "x"), "r": ("RE", "", "d", "y")},
    pairs={"u": "cr"},
)
"""Cancel what is pending, return what is delivered, and leave alone what is shipped. "u": undo it, whatever that takes."""
AIRLINE = short(
    "airline",
    noun="b",
    key="BI",
    states="nf",
    look_up="WU",
    actions={
        "m": ("SY", "ST", "n", "n"),
        "c": ("FH", "DY", "n", "n"),
        "x": ("XO", "", "n", "o"),
        "r": ("VQ", "", "o", "p"),
    },
    values={"ST": "ijk", "DY": "tuw"},
    pairs={"xr": "xr"},
)
"""Move, change or cancel a booking that is not flown, and refund one that is cancelled."""
LIBRARY = short(
    "library",
    noun="v",
    key="ZU",
    states="iol",
    look_up="JE",
    actions={"k": ("LD", "", "i", "o"), "e": ("RW", "UT", "o", "o"), "b": ("BX", "", "l", "q")},
    values={"UT": "mfs"},
)
BANK = short(
    "bank",
    noun="a",
    key="QC",
    states="of",
    look_up="HB",
    actions={"t": ("TW", "", "f", "o"), "d": ("KV", "", "o", "x"), "h": ("CR", "", "o", "g")},
    pairs={"td": "td"},
)
HOME = short(
    "home",
    noun="l",
    key="PM",
    states="nfb",
    look_up="EG",
    actions={"g": ("DI", "LV", "n", "n"), "j": ("IT", "", "f", "n"), "y": ("MN", "", "b", "f")},
    values={"LV": "prs"},
    pairs={"yj": "yj"},
)
FIXED = (SHOP, AIRLINE, LIBRARY, BANK, HOME)
KNOWN = {
    name
    for spec in FIXED
    for rule in spec.rules.values()
    for name in (rule.name, *rule.parameters["properties"])
}
"""Names of tools and arguments that no drawn world has."""
MOST_ACTIONS = 3  # of a drawn world
MOST_WORLDS = 4096  # kept in memory


@functools.lru_cache(maxsize=MOST_WORLDS)
def drawn(seed: int) -> "ShortWorld":
    """Return the environment of a world that is drawn from a number."""
    rng = random.Random(f"worlds/{seed}")
    count = rng.randint(2, MOST_ACTIONS)
    while True:
        capitals = rng.sample(string.ascii_uppercase, 2 * (count + 4))
        names = [one + other for one, other in zip(capitals[::2], capitals[1::2], strict=True)]
        if not KNOWN & set(names):
            break
    look_up, key, *arguments = names[count:]
    noun, *letters = rng.sample(LETTERS, 1 + count + 4 + 6)
    verbs = letters[:count]
    states = letters[count : count + 4]
    values = letters[count + 4 :]
    actions = {
        verb: (
            called,
            rng.choice(("", "", *arguments)),
            rng.choice(states[:3]),
            rng.choice(states),
        )
        for verb, called in zip(verbs, names, strict=False)
    }
    used = {argument for _, argument, _, _ in actions.values() if argument}
    one, other = rng.sample(verbs, 2)
    spec = short(
        "worlds:short",
        noun,
        key,
        "".join(states[:3]),
        look_up,
        actions,
        {
            a: "".join(v)
            for a, v in zip(arguments, (values[:3], values[3:]), strict=True)
            if a in used
        },
        {one + other: one + other},
    )
    return ShortWorld(spec)


def line(schema: Mapping[str, Any]) -> str:
    """Return a tool as it is listed: what users say, its name, its arguments, and the state that it requires."""
    said, _, required = schema.get("description", "").partition(" ")
    return f"{said}{schema['name']}{''.join(schema['parameters']['properties'])}{required}"


class Listed(Environment):
    """A mixin: tasks begin with a turn of the system that lists their tools."""

    def made(self, messages: Sequence[Message], label: Any, difficulty: int) -> Task:
        """Return a drawn problem as a task."""
        listed = " ".join(map(line, self.offered(label)))
        system: Message = {"role": "system", "content": listed}
        return super().made([system, *messages], label, difficulty)


class ShortTable(TableWorld):
    """A world whose calls return the record as they left it."""

    def call(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Run a tool on the records; return its result."""
        result = super().call(name, arguments)
        return self.records[str(arguments[self.specification.key])] if "ok" in result else result


class ShortWorld(TableEnvironment):
    """Tasks in one world in single characters."""

    numbers = range(1, 10)

    def world(self, task: Task) -> TableWorld:
        """Return the world with the task's records."""
        return ShortTable(self.specification, task.label["records"])

    def look_up_thought(self, number: str) -> str:
        """Return the line of the look-up."""
        return line(self.specification.look_up.schema)

    def thought(self, weighed: Sequence[Weighed]) -> str:
        """Return the letters of the steps that were settled before, and of the others the lines, with the state and a sign."""
        settled = max((place for place, w in enumerate(weighed, 1) if w.done), default=0)
        parts = []
        for place, (rule, record, allowed, _) in enumerate(weighed):
            copied = rule.done if place < settled else f"{line(rule.schema)}{record['s']}"
            parts.append(copied + ("+" if allowed else "-"))
        return "".join(parts)

    def last_words(self, number: str, outcomes: Sequence[str]) -> str:
        """Return the outcomes alone."""
        return ", ".join(outcomes)


class Worlds(Environment):
    """Tasks of drawn worlds, each in a world of its own."""

    name = "worlds:short"
    group = "agentic"
    max_turns = 8

    def within(self, label: Mapping[str, Any]) -> ShortWorld:
        """Return the world of a task."""
        return drawn(label["world"])

    def offered(self, label: Any) -> tuple[dict[str, Any], ...]:
        """Return the schemas of the tools of a task."""
        return self.within(label).tools()

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], dict[str, Any]]:
        """Return one random request in a fresh world as (messages, label). Label: that of the world, and its number."""
        seed = rng.randrange(2**40)
        messages, label = drawn(seed).draw(rng, difficulty)
        return messages, label | {"world": seed}

    def episode(self, task: Task) -> Episode:
        """Return a fresh episode of `task`."""
        return self.within(task.label).episode(task)

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Return what the policy of the task's world says next."""
        return self.within(task.label).oracle(task, conversation, rng)

    def hack_probes(self, task: Task) -> list[Message]:
        """Return those of the task's world."""
        return self.within(task.label).hack_probes(task)


class ListedWorld(Listed, ShortWorld):
    """Tasks in one world, with the list of its tools."""


class ListedWorlds(Listed, Worlds):
    """Tasks of drawn worlds, with the lists of their tools."""


class ListedSteps(Listed, Functions):
    """Single steps of conversations, with the list of the tools on offer."""


STEPPED = {spec.name: ShortWorld(spec) for spec in (LIBRARY, BANK, HOME)}
"""The worlds whose conversations are cut into steps, by name."""
