"""Check a plain value, as JSON holds it, against a type hint (no section in the paper)."""

import functools
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


@functools.cache
def types_of(section: type) -> dict[str, Any]:
    """Return the types of the fields of a dataclass, by name."""
    return get_type_hints(section)


def has_type(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type. A whole number is a float too; True is no number.

    kind: a class, Any, A | B, list[A], tuple[A, ...] or dict[A, B].
    """
    origin = get_origin(kind)
    inside = get_args(kind)
    if kind is Any:
        return True
    if origin is UnionType:
        return any(has_type(value, one) for one in inside)
    if origin is dict:
        return isinstance(value, dict) and all(
            has_type(key, inside[0]) and has_type(held, inside[1]) for key, held in value.items()
        )
    if origin is not None:
        return isinstance(value, origin) and all(has_type(part, inside[0]) for part in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def type_name(kind: Any) -> str:
    """Return a type as it is written in a dataclass."""
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
