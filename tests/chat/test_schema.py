"""Types of arguments come from the tool's JSON schema, however it says them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.chat import parse
from minglm.chat.schema import EXAMPLES, parameters_of, schema_mistake

# A text, and its value as each JSON type that can hold it.
READINGS = {
    "10001": {"string": "10001", "integer": 10001, "number": 10001},
    "0.5": {"string": "0.5", "number": 0.5},
    "null": {"string": "null", "null": None},
    "true": {"string": "true", "boolean": True},
    "[1]": {"string": "[1]", "array": [1]},
    '{"a": 1}': {"string": '{"a": 1}', "object": {"a": 1}},
    "Paris": {"string": "Paris"},
}

# Ways to say a schema in other words: schema -> (schema that means the same, definitions it needs).
SAME = {
    "itself": lambda s: (s, {}),
    "$ref": lambda s: ({"$ref": "#/$defs/T"}, {"T": s}),
    "$ref of $ref": lambda s: ({"$ref": "#/$defs/U"}, {"U": {"$ref": "#/$defs/T"}, "T": s}),
    "allOf": lambda s: ({"allOf": [s]}, {}),
    "allOf of $ref": lambda s: ({"allOf": [{"$ref": "#/$defs/T"}], "default": 1}, {"T": s}),
    "anyOf": lambda s: ({"anyOf": [s]}, {}),
    "oneOf": lambda s: ({"oneOf": [s, s]}, {}),
    "with bounds": lambda s: ({"allOf": [s, {"description": "bounds", "minLength": 0}]}, {}),
}

# Ways to place an argument's schema in that of the tool: (name, schema, definitions) -> parameters.
PLACES = {
    "properties": lambda key, s, d: {"properties": {key: s}, "$defs": d},
    "root anyOf": lambda key, s, d: {
        "anyOf": [{"properties": {key: s}}, {"properties": {"other": {"type": "array"}}}],
        "$defs": d,
    },
    "root oneOf": lambda key, s, d: {
        "oneOf": [{"properties": {"other": {}}}, {"properties": {key: s}}],
        "$defs": d,
    },
    "root allOf": lambda key, s, d: {
        "allOf": [{"properties": {key: s}}, {"properties": {key: {"title": "x"}}}],
        "$defs": d,
    },
    "root $ref": lambda key, s, d: {
        "$ref": "#/$defs/Root",
        "$defs": {**d, "Root": {"type": "object", "properties": {key: s}}},
    },
    "patternProperties": lambda key, s, d: {"patternProperties": {f"^{key}$": s}, "$defs": d},
    "additionalProperties": lambda key, s, d: {"additionalProperties": s, "$defs": d},
    "then": lambda key, s, d: {"if": {}, "then": {"properties": {key: s}}, "$defs": d},
}


def read(parameters, text, strict=True, key="zip"):
    """Return the argument that a call with this text has, and the error."""
    call = f"<tool_call>f<arg_key>{key}</arg_key><arg_value>{text}</arg_value></tool_call>"
    message = parse(call, [{"name": "f", "parameters": parameters}], strict=strict)
    return message["tool_calls"][0]["arguments"][key], message["error"]


@given(
    text=st.sampled_from(sorted(READINGS)),
    name=st.sampled_from(sorted(EXAMPLES)),
    nullable=st.booleans(),
)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("same", SAME)
def test_a_type_means_the_same_wherever_it_is_said(same, place, text, name, nullable):
    """The value is the text read as the type; where that is impossible the text stays, and the fault is named."""
    types = [name, "null"] if nullable else [name]
    schema, definitions = SAME[same]({"type": types})
    value, error = read(PLACES[place]("zip", schema, definitions), text)
    readings = READINGS[text]
    fitting = [readings[t] for t in ("null", name) if t in types and t in readings]
    if fitting:
        assert value == fitting[0]
        assert type(value) is type(fitting[0])
        assert error is None
    else:
        assert (value, error) == (text, "bad_argument")


@pytest.mark.parametrize(
    "schema, text, value",
    [
        ({"const": "null"}, "null", "null"),
        ({"const": None}, "null", None),
        ({"const": 5}, "5", 5),
        ({"const": "5"}, "5", "5"),
        ({"enum": ["5", "6"]}, "5", "5"),
        ({"enum": [5, "6"]}, "6", "6"),
        ({"anyOf": [{"const": "auto"}, {"type": "integer"}]}, "7", 7),
        ({"anyOf": [{"const": "auto"}, {"type": "integer"}]}, "auto", "auto"),
        (True, "7", 7),
        ({}, "seven", "seven"),
        ({"type": "any"}, "7", 7),
        ({"$ref": "https://example.com/none"}, "7", 7),
        ({"$ref": "#/properties/zip"}, "7", 7),
    ],
)
def test_constants_and_free_schemas(schema, text, value):
    """Constants decide the type; what says nothing, or leads nowhere, allows everything."""
    found, error = read({"properties": {"zip": schema}}, text)
    assert found == value
    assert type(found) is type(value)
    assert error is None


def test_a_nested_model_is_an_object():
    """Optional[Address], as pydantic writes it."""
    address = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    parameters = {
        "$defs": {"Address": address},
        "properties": {"zip": {"anyOf": [{"$ref": "#/$defs/Address"}, {"type": "null"}]}},
    }
    assert read(parameters, '{"city": "Paris"}') == ({"city": "Paris"}, None)
    assert read(parameters, "null") == (None, None)


@pytest.mark.parametrize(
    "parameters, served, rewarded",
    [
        ({"type": "object"}, None, None),
        ({"properties": {"q": {}}}, None, "unknown_argument"),
        ({"properties": {"q": {}}, "additionalProperties": True}, None, None),
        ({"properties": {}}, None, "unknown_argument"),
        ({"patternProperties": {"^q": {}}}, None, "unknown_argument"),
        (
            {"properties": {"q": {}}, "additionalProperties": False},
            "unknown_argument",
            "unknown_argument",
        ),
        (
            {"allOf": [{"properties": {"q": {}}}], "unevaluatedProperties": False},
            "unknown_argument",
            "unknown_argument",
        ),
    ],
)
def test_arguments_that_are_not_declared(parameters, served, rewarded):
    """They are passed on, typed as JSON; a closed schema names them, and a reward does where others are declared."""
    assert read(parameters, "7", strict=False) == (7, served)
    assert read(parameters, "7", strict=True) == (7, rewarded)


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("boolean", "True", True),
        ("boolean", "FALSE", False),
        ("null", "None", None),
        ("integer", '"5"', 5),
        ("array", "['a', True]", ["a", True]),
        ("object", "{'a': None}", {"a": None}),
    ],
)
def test_a_client_is_read_leniently(name, text, value):
    """Another spelling is taken, and named; a reward keeps the text."""
    parameters = {"properties": {"zip": {"type": name}}}
    found, error = read(parameters, text, strict=False)
    assert found == value
    assert type(found) is type(value)
    assert error == "bad_argument"
    assert read(parameters, text, strict=True) == (text, "bad_argument")


def test_required_arguments_of_alternatives():
    """One of the alternatives has to be complete."""
    parameters = parameters_of({"anyOf": [{"required": ["a"]}, {"required": ["b"]}]})
    assert not parameters.lacks({"b": 1}) and parameters.lacks({"c": 1})


@pytest.mark.parametrize("schema", [{"properties": {"x": True}}, {"type": "object"}, {"x": 1}, {}])
def test_schemas_that_can_be_read(schema):
    """What the parser does not read may be anything."""
    assert schema_mistake(schema) is None


@pytest.mark.parametrize(
    "schema",
    [
        [],
        {"properties": []},
        {"properties": {"x": 5}},
        {"properties": {"x": {"type": 5}}},
        {"properties": {"x": {"anyOf": {}}}},
        {"properties": {"x": {"enum": 5}}},
        {"required": "x"},
        {"$ref": 5},
    ],
)
def test_schemas_that_cannot_be_read(schema):
    """Each is one line."""
    mistake = schema_mistake(schema)
    assert mistake and "\n" not in mistake
