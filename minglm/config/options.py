"""Declare the bounds of an option beside its default, and check them (no section in the paper).

    peak_lr: float = option(2.5e-4)              finite and not negative, as every number of a config
    problems: int = positive(198)                not 0 either
    fim_rate: float = share(0.5)                 between 0 and 1
    threads: int = option(0, runtime=True)       changes where or how fast a run is computed, never its result

A field whose type is a `StrEnum` takes the values of that enum. What concerns two fields is checked by the
`check` method of their dataclass.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from minglm.common.mistakes import shown
from minglm.common.types import has_type, types_of

LARGEST = 10**18
"""Largest number of a field that declares no other maximum. What is computed from it still fits 64 bits."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Option:
    """What is known of one field of a config, beside its type, default and docstring."""

    positive: bool = False
    """Refuse 0."""
    maximum: float = LARGEST
    """Largest value that is allowed."""
    runtime: bool = False
    """The field does not change the result, so it is not part of the config's hash."""
    formerly: str = ""
    """Name of the field in the config.json of older runs; "../NAME" where it was a field of the section around."""


def option(
    default: Value,
    *,
    positive: bool = False,
    maximum: float = LARGEST,
    runtime: bool = False,
    formerly: str = "",
) -> Value:
    """Declare a dataclass field with a default and an `Option`."""
    about = Option(positive, maximum, runtime, formerly)
    return dataclasses.field(default=default, metadata={"option": about})


def positive(default: Value, *, maximum: float = LARGEST) -> Value:
    """Declare a number that must be above 0."""
    return option(default, positive=True, maximum=maximum)


def share(default: Value, *, formerly: str = "") -> Value:
    """Declare a number between 0 and 1."""
    return option(default, maximum=1.0, formerly=formerly)


def about(field: dataclasses.Field) -> Option:
    """Return the `Option` of a dataclass field; the default one where none was declared."""
    return field.metadata.get("option", Option())


def choices(values: type[StrEnum]) -> str:
    """List the values of an enum for an error message: "a, b or c"."""
    *first, last = [value.value or "empty" for value in values]
    return f"{', '.join(first)} or {last}" if first else last


def must_be(kind: Any) -> str:
    """Say what a value of a field's type must be, for a message."""
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return choices(kind)
    names = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "text",
        tuple[str, ...]: "texts",
        dict[str, float]: "numbers by name",
    }
    return names.get(kind) or f"a {kind.__name__}"


def mismatch(name: str, value: Any, kind: Any) -> str:
    """Return the line for a value that is not of its field's type."""
    return f"{name} = {shown(value, quoted=True)}: must be {must_be(kind)}"


def check_fields(config: Any, prefix: str = "") -> None:
    """Check every field of a tree of dataclasses against its type and its `Option`.

    prefix: dotted name of `config` with a final dot, for the message. Raises ValueError, in one line.
    """
    for name, value, field, kind in _leaves(config, prefix):
        if not has_type(value, kind):
            raise ValueError(mismatch(name, value, kind))
        texts: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
        for text in texts:
            if isinstance(text, str) and not text.isprintable():
                raise ValueError(
                    f"{name} = {shown(text, quoted=True)}: must be printable text in one line"
                )
        if kind in (int, float) and isinstance(value, int | float):
            _check_bounds(name, value, about(field))


def _check_bounds(name: str, value: float, limits: Option) -> None:
    """Refuse a number that is not finite, is negative, or is beyond the bounds of its field."""
    number = f"{name} = {shown(value)}"
    finite = isinstance(value, int) or math.isfinite(value)
    if not finite or value < 0:
        raise ValueError(f"{number}: must be a finite number, not negative")
    if value == 0 and limits.positive:
        raise ValueError(f"{number}: must be positive")
    if value > limits.maximum:
        raise ValueError(f"{number}: must lie between 0 and {limits.maximum:,}")


def _leaves(config: Any, prefix: str) -> Iterator[tuple[str, Any, dataclasses.Field, Any]]:
    """Yield (dotted name, value, field, type) of every field that is not a dataclass itself."""
    types = types_of(type(config))
    for field in dataclasses.fields(config):
        name = prefix + field.name
        value = getattr(config, field.name)
        kind = types[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, kind):
            yield from _leaves(value, name + ".")
        else:
            yield name, value, field, kind
