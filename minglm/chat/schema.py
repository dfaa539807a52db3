"""Read a call's arguments by the JSON schema of its tool (paper section 3.1, figure 4).

    "10001" and {"properties": {"zip": {"$ref": "#/$defs/Code"}}}  ->  "10001" if a code is a string, 10001 if a number

The model writes every argument as text: strings as they are, anything else as JSON. Only the schema tells
which. Which JSON types it allows is asked of the `jsonschema` library, with one example of each type, so that
references, unions, constants and nested models mean here what they mean everywhere.

Choices, and why:
- Where text and JSON both fit (a union, or no schema) it is the JSON value.
- An argument that the schema does not declare is passed on, typed as JSON, unless the schema is closed
  (`additionalProperties: false`). Strict reading also refuses it where the schema declares others and does not say that
  more are welcome.
- Lenient reading tries a few more spellings of a value that does not fit: Python's True and None, quotes around a
  number. The value is taken and the fault is named all the same.
- Names of types that JSON schema does not know allow everything, and so does a reference that leads nowhere.

Simplified: of a value only its type, `enum` and `const` are checked, not ranges, patterns or what is inside an object.
"""

import ast
import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import UnknownType
from jsonschema.validators import create, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

EXAMPLES: dict[str, Any] = {
    "null": None,
    "boolean": True,
    "integer": 0,
    "number": 0.5,
    "string": "",
    "array": [],
    "object": {},
}
"""One value of each JSON type."""

TEXT = frozenset({"string"})
MAX_KEPT = 256  # arguments of one schema that are kept ready
MAX_LITERAL = 10_000  # characters of a Python literal that is tried

_FIRST_CHARACTERS = {
    "null": "n",
    "boolean": "tf",
    "integer": "-0123456789",
    "number": "-0123456789",
    "array": "[",
    "object": "{",
}


def _type(validator: Any, names: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    """Check `type`; a name that JSON schema does not know allows every value."""
    for name in [names] if isinstance(names, str) else names:
        try:
            if validator.is_type(value, name):
                return
        except UnknownType:
            return
    yield ValidationError(f"not of type {names}")


def _type_of_enum(validator: Any, members: Any, value: Any, schema: Any) -> Iterator[Any]:
    """Check that the value has the JSON type of one of the members, whichever it equals."""
    if not any(_json_type(member) == _json_type(value) for member in members):
        yield ValidationError("no member has this type")


def _type_of_const(validator: Any, member: Any, value: Any, schema: Any) -> Iterator[Any]:
    return _type_of_enum(validator, [member], value, schema)


_KNOWN = Draft202012Validator.VALIDATORS
_COMBINATIONS = {
    "$ref": _KNOWN["$ref"],
    "$dynamicRef": _KNOWN["$dynamicRef"],
    "allOf": _KNOWN["allOf"],
    "anyOf": _KNOWN["anyOf"],
    # Without the other keywords two options may both fit.
    "oneOf": _KNOWN["anyOf"],
}
_META = Draft202012Validator.META_SCHEMA
_Values = create(
    _META, {**_COMBINATIONS, "type": _type, "enum": _KNOWN["enum"], "const": _KNOWN["const"]}
)
_Types = create(
    _META, {**_COMBINATIONS, "type": _type, "enum": _type_of_enum, "const": _type_of_const}
)
_Required = create(_META, {**_COMBINATIONS, "required": _KNOWN["required"]})

_READ = {
    *("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "then", "else"),
    *("type", "enum", "const", "required", "properties", "patternProperties"),
    *("additionalProperties", "unevaluatedProperties", "$defs", "definitions"),
}
_NO_REFERENCE = (Unresolvable, RecursionError)


class Value(NamedTuple):
    """An argument's value."""

    value: Any
    fits: bool
    """Whether it is what the schema asks for."""


@dataclass(frozen=True)
class Argument:
    """What a tool's schema says about one argument."""

    declared: bool
    """Whether the schema names it, or a pattern of its name."""
    welcome: bool
    """Whether it may be there at all."""
    types: frozenset[str]
    """The JSON types that are allowed."""
    checker: Any
    """A validator of the value."""

    def read(self, text: str, strict: bool = True) -> Value:
        """Return the value that `text` stands for.

        One that fits no type stays text, or is JSON where text is no option.
        """
        if self.types == TEXT:
            return Value(text, self.accepts(text))
        untyped = self.types == EXAMPLES.keys()
        value: Any = text
        try:
            value = self._whole(_from_json(text))
            if (untyped or not isinstance(value, str)) and self.accepts(value):
                return Value(value, True)
        except ValueError:
            pass
        if "string" in self.types and self.accepts(text):
            return Value(text, True)
        if not strict:
            for other in map(self._whole, _other_spellings(text)):
                if not isinstance(other, str) and self.accepts(other):
                    return Value(other, False)
        # Of the right type, and not one of the values that are listed.
        listed = not isinstance(value, str) and _json_type(value) in self.types
        return Value(value if listed else text, False)

    def is_text(self, beginning: str) -> bool:
        """Return whether a value that begins like this is a string, however it goes on."""
        if self.types == TEXT:
            return True
        if "string" not in self.types:
            return False
        beginning = beginning.lstrip()
        if not beginning:
            return False
        if beginning[0] in "ntf":
            words = ("null", "true", "false")
            return not any(
                word.startswith(beginning.rstrip()) and set(self.types) & {"null", "boolean"}
                for word in words
            )
        untyped = self.types == EXAMPLES.keys()
        first = '"' if untyped else ""
        first += "".join(_FIRST_CHARACTERS.get(name, "") for name in self.types)
        return beginning[0] not in first

    def accepts(self, value: Any) -> bool:
        """Return whether a value fits the schema."""
        try:
            return self.checker.is_valid(value)
        except _NO_REFERENCE:
            return True

    def _whole(self, value: Any) -> Any:
        """Return 12 for 12.0 where only integers are allowed."""
        only_integers = "integer" in self.types and "number" not in self.types
        if only_integers and isinstance(value, float) and value.is_integer():
            return int(value)
        return value


class Parameters:
    """The schema of a tool's arguments."""

    def __init__(self, schema: Any) -> None:
        self.schema: dict[str, Any] = schema if isinstance(schema, dict) else {"properties": {}}
        resource = DRAFT202012.create_resource(self.schema)
        self._resolver = Registry().resolver_with_root(resource)
        self._arguments: dict[str, Argument] = {}

    def argument(self, key: str) -> Argument:
        """Return what the schema says about an argument."""
        if key not in self._arguments:
            if len(self._arguments) >= MAX_KEPT:
                self._arguments.clear()
            self._arguments[key] = self._argument(key)
        return self._arguments[key]

    def lacks(self, arguments: Mapping[str, Any]) -> bool:
        """Return whether a required argument is absent."""
        try:
            return not self._required.is_valid(dict(arguments))
        except _NO_REFERENCE:
            return False

    @cached_property
    def _required(self) -> Any:
        return _Required(self.schema)

    @cached_property
    def _roots(self) -> tuple[Any, Any]:
        return _Types(self.schema), _Values(self.schema)

    def _argument(self, key: str) -> Argument:
        schema = self._schema_of(self.schema, key, frozenset())
        welcome = True
        if schema is None:
            objects = list(self._objects(self.schema, frozenset()))
            more = [o[k] for o in objects for k in _MORE if k in o]
            welcome = False not in more
            declares_others = any("properties" in o or "patternProperties" in o for o in objects)
            declared = welcome and (bool(more) or not declares_others)
        else:
            declared = True
        types, values = self._roots
        # `evolve` keeps the root, so that references inside the argument's schema still resolve.
        asked = types.evolve(schema=True if schema is None else schema)
        allowed = frozenset(name for name, value in EXAMPLES.items() if _is_valid(asked, value))
        return Argument(
            declared, welcome, allowed, values.evolve(schema=True if schema is None else schema)
        )

    def _schema_of(self, schema: Any, key: str, seen: frozenset[str]) -> Any:
        """Return the schema of an argument, joined from all places that declare it; None if there is none."""
        if not isinstance(schema, dict):
            return None
        found = []
        properties = schema.get("properties") or {}
        if key in properties:
            found.append(properties[key])
        for pattern, option in (schema.get("patternProperties") or {}).items():
            if _matches(pattern, key):
                found.append(option)
        target, seen = self._target(schema, seen)
        for option in (target, *(schema.get("allOf") or ())):
            found.append(self._schema_of(option, key, seen))
        for name in ("anyOf", "oneOf"):
            options = [self._schema_of(option, key, seen) for option in schema.get(name) or ()]
            options = [option for option in options if option is not None]
            if options:
                found.append({"anyOf": options})
        branches = [self._schema_of(schema.get(name), key, seen) for name in ("then", "else")]
        branches = [branch for branch in branches if branch is not None]
        if branches:
            found.append({"anyOf": branches})
        found = [option for option in found if option is not None]
        if not found:
            found = [schema[name] for name in _MORE if isinstance(schema.get(name), dict)]
        if len(found) < 2:
            return found[0] if found else None
        return {"allOf": found}

    def _objects(self, schema: Any, seen: frozenset[str]) -> Iterator[dict[str, Any]]:
        """Yield the schema and those that it combines."""
        if not isinstance(schema, dict):
            return
        yield schema
        target, seen = self._target(schema, seen)
        parts = [target, schema.get("then"), schema.get("else")]
        for name in ("allOf", "anyOf", "oneOf"):
            parts += schema.get(name) or ()
        for part in parts:
            yield from self._objects(part, seen)

    def _target(self, schema: dict[str, Any], seen: frozenset[str]) -> tuple[Any, frozenset[str]]:
        """Return what `$ref` points to, None if nothing or where it leads in a circle, and the references followed."""
        reference = schema.get("$ref")
        if not isinstance(reference, str) or reference in seen:
            return None, seen
        try:
            return self._resolver.lookup(reference).contents, seen | {reference}
        except _NO_REFERENCE:
            return None, seen


_MORE = ("additionalProperties", "unevaluatedProperties")


def parameters_of(schema: Any) -> Parameters:
    """Return the `Parameters` of a schema; those of the schemas used last are kept."""
    try:
        return _parameters_of_json(json.dumps(schema))
    except (TypeError, ValueError, RecursionError):
        return Parameters(schema)


@lru_cache(maxsize=1024)
def _parameters_of_json(schema: str) -> Parameters:
    return Parameters(json.loads(schema))


def schema_mistake(schema: Any) -> str | None:
    """Return in one line why arguments cannot be read by this schema, or None.

    What is never read is not checked.
    """
    if not isinstance(schema, dict):
        return "must be a JSON schema of an object"
    try:
        cls = validator_for(schema, default=Draft202012Validator)
        for error in cls(cls.META_SCHEMA).iter_errors(schema):
            path = [str(part) for part in error.absolute_path]
            keyword = next((part for part in reversed(path) if not part.isdecimal()), "")
            if keyword == "type" and _are_names(error.instance):
                continue
            if keyword in _READ or (len(path) > 1 and path[-2] in _READ) or not path:
                return f"{'.'.join(path) or 'the schema'}: {error.message:.200}"
    except RecursionError:
        return "is nested too deeply"
    return None


def _are_names(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _is_valid(validator: Any, value: Any) -> bool:
    try:
        return validator.is_valid(value)
    except _NO_REFERENCE:
        return True


def _matches(pattern: str, key: str) -> bool:
    try:
        return re.search(pattern, key) is not None
    except re.error:
        return False


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):  # in Python a bool is an int
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def _from_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises ValueError also for what could not be written back as JSON and UTF-8.
    """
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        # An escaped half of a surrogate pair could never be written as UTF-8.
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:  # brackets nested thousands deep
        raise ValueError("nested too deeply") from None
    return value


def _finite(text: str) -> float:
    """Convert a JSON number; refuse NaN, infinity and 1e999, which Python would read and JSON does not have."""
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)


def _other_spellings(text: str) -> Iterator[Any]:
    """Yield what else a text may mean: a Python literal, a word in other letters, a value in quotes."""
    stripped = text.strip()
    for candidate in (stripped.lower(), stripped.strip("\"'"), stripped.strip("\"'").lower()):
        with contextlib.suppress(ValueError):
            yield _from_json("null" if candidate == "none" else candidate)
    if len(stripped) > MAX_LITERAL:
        return
    with contextlib.suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        yield _from_json(json.dumps(ast.literal_eval(stripped), allow_nan=False))
