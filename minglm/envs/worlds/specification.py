"""Read the specification of a world: records, tools with their rules, and what users ask for (paper 3.3, 3.4).

    {"name": "library", "noun": "book", "key": "book_id",
     "fields": {"state": ["in", "out", "lost"]},              every field of a record, with its possible values
     "arguments": {"room": ["A", "B"]},                       values that a user may want for an argument
     "tools": [
       {"name": "get_book", "description": "state", "inputSchema": {...}, "shows": ["state"]},
       {"name": "lend_book", "description": "if in", "inputSchema": {...},
        "requires": {"state": ["in"]}, "sets": {"state": "out"}, "done": "lent"}],
     "requests": [{"steps": ["lend_book"], "texts": ["Lend me {record}."]}]}

Name, description and inputSchema of a tool are those of the Model Context Protocol. Beside them stands its
rule: one tool, the look-up, `shows` fields of a record; every other one `requires` that a field has one of
some values, and then `sets` fields. "$room" is the argument `room`: as a requirement the field is a list that
must hold it, as a value it is written. `done` is the word that tells the user of it; "not done" tells that it
was refused.

From a specification `minglm.envs.worlds.tables` makes the world, its tasks, its user and its oracle. So a
world of one's own is a file: `world:PATH` is the name of its environment. A file that does not parse is
refused in one line, which names the field.

Simplified: a world has one kind of records, known by a number from 100 to 999, and a rule looks at one record alone.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minglm.chat.messages import Tool
from minglm.chat.schema import schema_mistake
from minglm.common.files import read_text
from minglm.common.mistakes import shown


@dataclass(frozen=True)
class Rule:
    """A tool of a world, and what it does to a record."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """Its JSON schema."""
    shows: tuple[str, ...]
    """Fields that it returns; only the look-up has some."""
    requires: Mapping[str, Any]
    """{field: values of which it must have one, or "$argument", which it must hold}."""
    sets: Mapping[str, Any]
    """{field: its new value, or "$argument"}."""
    done: str
    """The word for what it has done."""

    @property
    def schema(self) -> dict[str, Any]:
        """Return the tool as it is shown to the model."""
        parameters = dict(self.parameters)
        return {"name": self.name, "description": self.description, "parameters": parameters}

    def allows(self, record: Mapping[str, Any], arguments: Mapping[str, Any]) -> bool:
        """Return whether the policy allows a call on this record."""
        for field, wanted in self.requires.items():
            if isinstance(wanted, str):
                if arguments[wanted[1:]] not in record[field]:
                    return False
            elif record[field] not in wanted:
                return False
        return True

    def apply(self, record: dict[str, Any], arguments: Mapping[str, Any]) -> None:
        """Change a record as a call does."""
        for field, value in self.sets.items():
            is_argument = isinstance(value, str) and value.startswith("$")
            record[field] = arguments[value[1:]] if is_argument else value


@dataclass(frozen=True)
class Wish:
    """Something that users ask for."""

    steps: tuple[str, ...]
    """Tools, in this order, each used if the policy allows it."""
    texts: tuple[str, ...]
    """Ways to say it, with {record} and {argument} for what it is about."""


@dataclass(frozen=True)
class Specification:
    """A world, as its file describes it."""

    name: str
    noun: str
    """What a record is called."""
    key: str
    """The argument that holds the number of a record."""
    fields: Mapping[str, Sequence[Any]]
    arguments: Mapping[str, Sequence[Any]]
    rules: Mapping[str, Rule]
    """By name of the tool."""
    wishes: tuple[Wish, ...]

    @property
    def look_up(self) -> Rule:
        """Return the tool that shows a record."""
        return next(rule for rule in self.rules.values() if rule.shows)

    @property
    def tools(self) -> tuple[Tool, ...]:
        """Return the schemas of all tools."""
        return tuple(rule.schema for rule in self.rules.values())

    def arguments_of(self, rule: Rule) -> list[str]:
        """Return the arguments of a tool beside the number of the record."""
        return [name for name in rule.parameters["properties"] if name != self.key]


def read_world(path: str) -> Specification:
    """Return the specification in a file. Raises ValueError, in one line, for what is none."""
    try:
        values = json.loads(read_text(path))
    except OSError as error:
        raise ValueError(f"world {shown(path)}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"world {shown(path)}: is not JSON: {error}") from None
    try:
        return specification(values)
    except ValueError as error:
        raise ValueError(f"world {shown(path)}: {error}") from None


def specification(values: Any) -> Specification:
    """Return a specification from plain JSON values. Raises ValueError, in one line that names the field."""
    top = _fields(
        values,
        "",
        {"name": str, "noun": str, "key": str, "fields": dict, "tools": list, "requests": list},
        {"arguments": dict},
    )
    for part in ("fields", "arguments"):
        for name, choices in top.get(part, {}).items():
            if not isinstance(choices, list) or not choices:
                raise ValueError(f"{part}.{name}: must be a list of its possible values")
    rules = [_rule(tool, f"tools[{n}]", top) for n, tool in enumerate(top["tools"])]
    by_name = {rule.name: rule for rule in rules}
    if len(by_name) < len(rules):
        raise ValueError("tools: two of them have the same name")
    look_ups = [rule for rule in rules if rule.shows]
    if len(look_ups) != 1:
        raise ValueError("tools: exactly one must be the look-up, with the fields that it shows")
    for rule in rules:
        hidden = [field for field in rule.requires if field not in look_ups[0].shows]
        if hidden:
            raise ValueError(f"tools: {rule.name} requires {hidden[0]}, which the look-up hides")
    wishes = [_wish(wish, f"requests[{n}]", by_name, top) for n, wish in enumerate(top["requests"])]
    if not any(len(wish.steps) == 1 for wish in wishes):
        raise ValueError("requests: at least one must have a single step")
    return Specification(
        name=top["name"],
        noun=top["noun"],
        key=top["key"],
        fields=top["fields"],
        arguments=top.get("arguments", {}),
        rules=by_name,
        wishes=tuple(wishes),
    )


def _fields(
    values: Any, place: str, required: Mapping[str, type], optional: Mapping[str, type]
) -> dict[str, Any]:
    """Return a JSON object whose fields have these types. place: in the file, empty for all of it.

    Raises ValueError for any other.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{place or 'the file'}: must be an object")
    prefix = f"{place}." if place else ""
    for name, value in values.items():
        kind = required.get(name) or optional.get(name)
        if kind is None:
            known = ", ".join([*required, *optional])
            raise ValueError(f"{prefix}{shown(name)}: is not supported; there are {known}")
        if not isinstance(value, kind) or (kind is str and not value.strip()):
            raise ValueError(f"{prefix}{name} = {shown(value)}: must be a {_NAMES[kind]}")
    for name in required:
        if name not in values:
            raise ValueError(f"{prefix}{name}: is missing")
    return values


_NAMES = {str: "text", dict: "object", list: "list"}


def _rule(values: Any, place: str, top: Mapping[str, Any]) -> Rule:
    """Return one tool. Raises ValueError for one that the world cannot run."""
    tool = _fields(
        values,
        place,
        {"name": str, "description": str, "inputSchema": dict},
        {"shows": list, "requires": dict, "sets": dict, "done": str},
    )
    schema = tool["inputSchema"]
    mistake = schema_mistake(schema)
    if mistake is not None:
        raise ValueError(f"{place}.inputSchema: {mistake}")
    properties = schema.get("properties", {})
    if set(schema.get("required", ())) != set(properties) or top["key"] not in properties:
        raise ValueError(
            f"{place}.inputSchema: must require each of its properties, {top['key']} among them"
        )
    for name in properties:
        if name not in top.get("arguments", {}) and name != top["key"]:
            raise ValueError(f"arguments.{name}: is missing, the values that a user may want")
    for part in ("shows", "requires", "sets"):
        for field in tool.get(part, ()):
            if not isinstance(field, str) or field not in top["fields"]:
                raise ValueError(f"{place}.{part}: {shown(field)} is not among the fields")
    for field, wanted in (tool.get("requires", {}) | tool.get("sets", {})).items():
        if isinstance(wanted, str) and wanted.startswith("$") and wanted[1:] not in properties:
            raise ValueError(f"{place}: {field} refers to {wanted}, which is no argument")
    for field, wanted in tool.get("requires", {}).items():
        lists = all(isinstance(value, list) for value in top["fields"][field])
        if not (isinstance(wanted, list) or (str(wanted).startswith("$") and lists)):
            raise ValueError(
                f"{place}.requires.{field}: must be a list of values, or $argument where all values are lists"
            )
    if "shows" not in tool and not ("sets" in tool and "done" in tool):
        raise ValueError(f"{place}: must have shows, or sets and done")
    return Rule(
        name=tool["name"],
        description=tool["description"],
        parameters=schema,
        shows=tuple(tool.get("shows", ())),
        requires=tool.get("requires", {}),
        sets=tool.get("sets", {}),
        done=tool.get("done", "").lower(),
    )


def _wish(values: Any, place: str, rules: Mapping[str, Rule], top: Mapping[str, Any]) -> Wish:
    """Return one request of users. Raises ValueError for one that names unknown tools or arguments."""
    wish = _fields(values, place, {"steps": list, "texts": list}, {})
    if not wish["steps"] or not wish["texts"]:
        raise ValueError(f"{place}: must have steps and texts")
    properties = set()
    for step in wish["steps"]:
        if not isinstance(step, str) or step not in rules or rules[step].shows:
            raise ValueError(f"{place}.steps: {shown(step)} is no tool that changes a record")
        properties |= set(rules[step].parameters["properties"])
    slots = {"record"} | properties - {top["key"]}
    for text in wish["texts"]:
        if not isinstance(text, str) or set(re.findall(r"\{(.*?)\}", text)) != slots:
            names = ", ".join(f"{{{slot}}}" for slot in sorted(slots))
            raise ValueError(f"{place}.texts: {shown(text)} must name {names}")
    return Wish(tuple(wish["steps"]), tuple(wish["texts"]))
