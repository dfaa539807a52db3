"""Declare the bounds of an option beside its default, and check them (no section in the paper).

    peak_lr: float = option(2.5e-4)              finite and not negative, as every number of a config
    problems: int = positive(198)                not 0 either
    fim_rate: float = share(0.5)                 between 0 and 1
    threads: int = option(0, runtime=True)       changes where or how fast a run is computed, never its result

A field whose type is a `StrEnum` takes the values of that enum. What concerns two fields is checked by the `check`
method of their dataclass.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar, get_type_hints

Value = TypeVar("Value")


@dataclass(frozen=True)
class Option:
    """What is known of one field of a config, beside its type, default and docstring."""

    positive: bool = False
    """Refuse 0."""
    maximum: float = math.inf
    """Largest value that is allowed."""
    runtime: bool = False
    """The field does not change the result, so it is not part of the config's hash."""
    formerly: str = ""
    """Name of the field in the config.json of older runs."""


def option(
    default: Value,
    *,
    positive: bool = False,
    maximum: float = math.inf,
    runtime: bool = False,
    formerly: str = "",
) -> Value:
    """Declare a dataclass field with a default and an `Option`."""
    about = Option(positive, maximum, runtime, formerly)
    return dataclasses.field(default=default, metadata={"option": about})


def positive(default: Value, *, maximum: float = math.inf) -> Value:
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


def check_fields(config: Any, prefix: str = "") -> None:
    """Check every field of a tree of dataclasses against its type and its `Option`.

    prefix: dotted name of `config` with a final dot, for the message. Raises ValueError, in one line.
    """
    for name, value, field, kind in _leaves(config, prefix):
        if isinstance(kind, type) and issubclass(kind, StrEnum):
            if value not in list(kind):
                raise ValueError(f"{name} = {value!r}: must be {choices(kind)}")
        elif isinstance(value, int | float):
            limits = about(field)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} = {value}: must be a finite number, not negative")
            if value == 0 and limits.positive:
                raise ValueError(f"{name} = {value}: must be positive")
            if value > limits.maximum:
                raise ValueError(f"{name} = {value}: must lie between 0 and {limits.maximum:g}")


def _leaves(config: Any, prefix: str) -> Iterator[tuple[str, Any, dataclasses.Field, Any]]:
    """Yield (dotted name, value, field, type) of every field that is not a dataclass itself."""
    types = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name = prefix + field.name
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, name + ".")
        else:
            yield name, value, field, types[field.name]
