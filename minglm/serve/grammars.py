"""Write the grammar of an answer: a JSON format, a strict tool, a call that is required (paper 3.1, figure 4).

    turn = line <think> TEXT </think> ( line answer <|user|> | TEXT call (line call)* <|observation|> )
    call = <tool_call> name line { <arg_key> key </arg_key> line <arg_value> value </arg_value> line } </tool_call>

The notation is that of `minglm.inference.grammar`. Tags are special tokens by their ids, so text that spells
one is text. The value of an argument is written as the template writes it: a string as it is, everything else
as JSON. Arguments come in the order of the schema's properties, each at most once, the required ones always.

Of a tool that is not strict only the form is enforced: names, JSON of the right type; of a strict one the
whole schema, or the request is refused. A schema that has no plain list of properties cannot be strict.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from minglm.chat.schema import parameters_of
from minglm.chat.template import Dialect
from minglm.inference.grammar import json_rule, quoted

JSONObject = dict[str, Any]

MAX_REFERENCES = 32  # that lead to one another

TEXT = "/(?s:.*)/"
"""Any text that holds no special token."""

NOT_PLAIN = (
    "$ref",
    "allOf",
    "anyOf",
    "oneOf",
    "if",
    "not",
    "dependentSchemas",
    "dependentRequired",
)
"""Keywords of a tool's parameters that a list of properties does not cover."""

ANNOTATIONS = frozenset(
    {
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "$comment",
        "readOnly",
        "writeOnly",
    }
)

STRING_KEYWORDS = frozenset({"type", "enum", "const", "pattern", "minLength", "maxLength"})
"""What is enforced of a string that is written without quotes."""


@dataclass
class Rules:
    """The rules of a grammar, {name: right-hand side}, while it is written."""

    special: Mapping[str, int]
    """{name: id} of the special tokens."""
    line: str
    """What separates the parts of a turn, perhaps nothing."""
    rules: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, *parts: str) -> str:
        """Add a rule that is the sequence of its parts, and return its name."""
        self.rules[name] = " ".join(part for part in parts if part)
        return name

    def tag(self, name: str) -> str:
        """Return the terminal of a special token.

        Raises ValueError if the tokenizer has none of this name.
        """
        if name not in self.special:
            raise ValueError(f"this model's tokenizer has no {name}")
        return f"<[{self.special[name]}]>"

    @property
    def new_line(self) -> str:
        """Return the terminal of the separator."""
        return quoted(self.line) if self.line else ""

    def text(self, start: str) -> str:
        """Return the grammar that begins with a rule."""
        return "\n".join(f"{name}: {rule}" for name, rule in {"start": start, **self.rules}.items())


def plain_grammar(answer: str) -> str:
    """Return the grammar of a plain completion that is `answer`."""
    return f"start: answer\nanswer: {answer}\n"


def turn_grammar(
    special: Mapping[str, int],
    dialect: Dialect,
    thinking: bool,
    answer: str | None,
    tools: Sequence[JSONObject],
    several: bool,
) -> str:
    """Return the grammar of an assistant's turn after the generation prompt.

    answer: the rule of the content, None for any text. tools: those that may be called, more than once if
    `several`. Raises ValueError for a strict tool that cannot be enforced.
    """
    rules = Rules(special, dialect.line)
    head = ""
    if thinking:
        opening = "" if dialect.opens else f"{rules.new_line} {rules.tag('<think>')}"
        head = rules.add("reasoning", opening, "TEXT", rules.tag("</think>"))
    if answer is None:
        said = rules.add("content", "TEXT", rules.tag("<|user|>"))
    else:
        rules.add("answer", answer)
        said = rules.add("content", rules.new_line, "answer", rules.tag("<|user|>"))
    rules.add("TEXT", TEXT)
    if not tools:
        return rules.text(f"{head} {said}")
    _add_calls(rules, tools)
    before = "TEXT" if answer is None else rules.new_line
    more = f"({rules.new_line} call)*" if several else ""
    rules.add("calling", before, "call", more, rules.tag("<|observation|>"))
    return rules.text(f"{head} ({said} | calling)")


def forced_call_grammar(
    special: Mapping[str, int],
    dialect: Dialect,
    tools: Sequence[JSONObject],
    name: str,
    several: bool,
) -> str:
    """Return the grammar after a prompt that ends with `<tool_call>` and, unless it is "", a tool's name and a line.

    several: whether more calls may follow. Raises ValueError as `turn_grammar` does.
    """
    rules = Rules(special, dialect.line)
    rules.add("TEXT", TEXT)
    _add_calls(rules, tools)
    first = "called"
    if name:
        names = [tool["function"]["name"] for tool in tools]
        first = f"arguments_{names.index(name)}"
    more = f"({rules.new_line} call)*" if several else ""
    return rules.text(f"{first} {rules.tag('</tool_call>')} {more} {rules.tag('<|observation|>')}")


def _add_calls(rules: Rules, tools: Sequence[JSONObject]) -> None:
    """Add the rules `call`, `called` (a call without its tags) and `arguments_0`, `arguments_1` ..."""
    options: list[str] = []
    for index, tool in enumerate(tools):
        function = tool["function"]
        arguments = _arguments(rules, index, function)
        options.append(
            rules.add(f"tool_{index}", quoted(function["name"]), rules.new_line, arguments)
        )
    rules.add("called", " | ".join(options))
    rules.add("call", rules.tag("<tool_call>"), "called", rules.tag("</tool_call>"))


def _arguments(rules: Rules, index: int, function: JSONObject) -> str:
    """Add the rule of a tool's arguments, and return its name."""
    name = f"arguments_{index}"
    strict = function.get("strict") is True
    schema = function.get("parameters") or {}
    properties = schema.get("properties") or {}
    is_plain = not any(keyword in schema for keyword in NOT_PLAIN)
    if strict and not is_plain:
        raise ValueError(
            f"the strict tool {function['name']} needs parameters with plain properties,"
            f" without {', '.join(NOT_PLAIN)}"
        )
    required = schema.get("required") or []
    closed = strict or schema.get("additionalProperties") is False
    if not is_plain or not (properties or closed):
        # Nothing is known of the names: any, each with a value that is text.
        rules.add("KEY", r"/[^\s](?s:.*)/")
        return rules.add(name, f"({_pair(rules, 'KEY', 'TEXT')})*")
    missing = [key for key in required if key not in properties]
    if strict and missing:
        raise ValueError(
            f"the strict tool {function['name']} requires {missing[0]}, not a property"
        )
    pairs: list[str] = []
    for number, (key, option) in enumerate(properties.items()):
        value = f"value_{index}_{number}"
        _add_value(rules, value, schema, key, option, strict)
        pair = _pair(rules, quoted(key), value)
        pairs.append(pair if key in required else f"({pair})?")
    return rules.add(name, *(pairs or ['""']))


def _pair(rules: Rules, key: str, value: str) -> str:
    parts = (
        *(rules.tag("<arg_key>"), key, rules.tag("</arg_key>"), rules.new_line),
        *(rules.tag("<arg_value>"), value, rules.tag("</arg_value>"), rules.new_line),
    )
    return " ".join(part for part in parts if part)


def _add_value(
    rules: Rules, name: str, root: JSONObject, key: str, schema: Any, strict: bool
) -> None:
    """Add the rule of an argument's value, as the template writes it."""
    types = parameters_of(root).argument(key).types
    schema = _target(root, schema)
    members = _members(schema)
    if members is not None:
        spelled = [
            one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in members
        ]
        rules.add(name, " | ".join(map(quoted, spelled)) or '""')
    elif "string" not in types:
        # References lead to the definitions beside the properties.
        shared = {word: root[word] for word in ("$defs", "definitions") if word in root}
        document = {**shared, **schema} if isinstance(schema, dict) else schema
        rules.add(name, json_rule(document, lenient=not strict))
    elif types == {"string"} and isinstance(schema, dict):
        rules.add(name.upper(), _string(key, schema, strict))
        rules.add(name, name.upper())
    elif strict and isinstance(schema, dict) and not _only_types(schema):
        raise ValueError(
            f"the argument {key!r:.60} of a strict tool mixes text with other types;"
            " give one type, a list of types, or an enum"
        )
    else:
        rules.add(name, "TEXT")


def _target(root: JSONObject, schema: Any) -> Any:
    """Return what a schema that is only a reference leads to, itself if it leads nowhere."""
    resolver = Registry().resolver_with_root(DRAFT202012.create_resource(root))
    for _ in range(MAX_REFERENCES):
        if not isinstance(schema, dict) or schema.keys() - ANNOTATIONS != {"$ref"}:
            break
        try:
            schema = resolver.lookup(schema["$ref"]).contents
        except Unresolvable:
            break
    return schema


def _only_types(schema: JSONObject) -> bool:
    """Return whether a schema says no more than which types a value may have, or nothing at all."""
    for word in ("anyOf", "oneOf"):
        for option in schema.get(word, []):
            if not isinstance(option, dict) or not _only_types(option):
                return False
    return schema.keys() <= {"type", "anyOf", "oneOf"} | ANNOTATIONS and not (
        {"object", "array"} & _type_names(schema)
    )


def _type_names(schema: JSONObject) -> set[str]:
    names = schema.get("type") or []
    return {names} if isinstance(names, str) else set(names)


def _members(schema: Any) -> list[Any] | None:
    """Return the values that a schema lists, or None if it lists none."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return [schema["const"]]
    return schema.get("enum")


def _string(key: str, schema: JSONObject, strict: bool) -> str:
    """Return the terminal of a string without quotes.

    Raises ValueError for a keyword that cannot be enforced.
    """
    if not strict:
        return TEXT
    more = sorted(schema.keys() - STRING_KEYWORDS - ANNOTATIONS)
    if more:
        raise ValueError(f"the argument {key!r:.60} of a strict tool: {more[0]} cannot be enforced")
    shortest = schema.get("minLength", 0)
    longest = schema.get("maxLength", "")
    terminals: list[str] = []
    if shortest or longest != "":
        terminals.append(f"/(?s:.){{{shortest},{longest}}}/")
    if "pattern" in schema:
        terminals.append(pattern_terminal(schema["pattern"], anchored=False))
    return " & ".join(terminals) or TEXT


def pattern_terminal(pattern: str, anchored: bool = True) -> str:
    """Return a regular expression as a terminal. anchored: it has to match the whole text, as for `guided_regex`."""
    begins = anchored or pattern.startswith("^")
    ends = anchored or (pattern.endswith("$") and not pattern.endswith(r"\$"))
    core = pattern.removeprefix("^")
    if core.endswith("$") and not core.endswith(r"\$"):
        core = core[:-1]
    # A slash would end the terminal, and so would a line.
    core = re.sub(r"(?s)(\\.)|/", lambda match: match[1] or r"\/", core)
    core = core.replace("\n", r"\n").replace("\r", r"\r")
    before = "" if begins else "(?s:.*)"
    after = "" if ends else "(?s:.*)"
    return f"/{before}({core}){after}/"
