"""Write plain values as text: equal values have equal text, so two of them are compared and none is ever parsed.

    encode([2.0, {"b": 1, "a": True}])  ->  ("[2, {'a': 1, 'b': 1}]", "fbi")

A pair is the text and the type of each number in it. Numbers that are equal in Python have one text (2, 2.0,
2+0j), sets and dicts are in the order of their texts, and everything else reads as in Python. So equality is
Python's, and the types are compared beside it: `fits` asks for those of the expected value and takes an int
where a float is expected.

A value of a subclass counts as the value of the plain type that it holds: a Counter is a dict, a namedtuple a tuple.

Both sides of the sandbox use this module. Nothing of the jail's text is read by a parser, so no answer,
however deep or long, can do more than differ. No counterpart in the paper.
"""

import math
from typing import Any, NamedTuple

TYPES_THAT_FIT = {"i": "i", "f": "fi", "c": "cfi", "b": "b"}
"""Type of an expected number -> the types of the numbers that may stand for it: int, float, complex, bool."""
NOT_A_NUMBER = "n"
"""Type of a NaN, which equals nothing."""


class Encoded(NamedTuple):
    """A plain value in the form that is compared."""

    text: str
    """ASCII without line breaks; equal values have equal text."""
    types: str
    """A letter for each number in the text."""


def encode(value: Any) -> Encoded:
    """Return the Encoded form of a plain value.

    Raises TypeError for any other value, RecursionError for one that is nested too deeply or contains itself.
    """
    if value is None:
        return Encoded("None", "")
    if isinstance(value, bool | int | float | complex):
        return _encode_number(value)
    # The methods are those of the plain types, whatever a subclass makes of them.
    if isinstance(value, str):
        return Encoded(ascii(str.__str__(value)), "")
    if isinstance(value, bytes):
        return Encoded(repr(bytes.__getitem__(value, slice(None))), "")
    if isinstance(value, bytearray):
        return Encoded(f"bytearray({bytes(value)!r})", "")
    if isinstance(value, list):
        return _join("[", [encode(item) for item in list.__iter__(value)], "]")
    if isinstance(value, tuple):
        return _join("(", [encode(item) for item in tuple.__iter__(value)], ",)")
    if isinstance(value, set):
        return _join("{", sorted(encode(item) for item in set.__iter__(value)), ",}")
    if isinstance(value, frozenset):
        return _join("<", sorted(encode(item) for item in frozenset.__iter__(value)), ",>")
    if isinstance(value, dict):
        items = sorted((encode(key), encode(item)) for key, item in dict.items(value))
        return _join("{", [_join("", [key, item], "", ": ") for key, item in items], "}")
    raise TypeError(f"{type(value).__name__} is not a plain type")


def _join(opening: str, parts: list[Encoded], closing: str, separator: str = ", ") -> Encoded:
    """Return the Encoded form of a container of these parts."""
    text = separator.join(part.text for part in parts)
    return Encoded(opening + text + closing, "".join(part.types for part in parts))


def _encode_number(value: complex) -> Encoded:
    if isinstance(value, bool):
        return Encoded(str(int(value)), "b")
    if isinstance(value, int):
        return Encoded(_real_text(int.__index__(value)), "i")
    if isinstance(value, float):
        return Encoded(_real_text(float.__float__(value)), NOT_A_NUMBER if value != value else "f")
    text = _real_text(value.real)
    if value.imag != 0:
        text = f"({text}+{_real_text(value.imag)}j)"
    return Encoded(text, NOT_A_NUMBER if value != value else "c")


def _real_text(value: float) -> str:
    """Return the text of a real number, the same for an int and for a float that equals it."""
    if isinstance(value, float):
        if not math.isfinite(value) or value % 1:
            return repr(value)
        value = int(value)
    # Decimal digits take quadratic time, and Python refuses more than 4,300 of them.
    return str(value) if abs(value) < 10**18 else hex(value)


def fits(answer: Encoded, expected: Encoded) -> bool:
    """Return whether an answer equals the expected value, with numbers of the types that may stand for its own."""
    if answer.text != expected.text or len(answer.types) != len(expected.types):
        return False
    if answer.types == expected.types:
        return NOT_A_NUMBER not in expected.types
    pairs = zip(answer.types, expected.types, strict=True)
    return all(given in TYPES_THAT_FIT.get(wanted, "") for given, wanted in pairs)
