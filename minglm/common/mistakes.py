"""Tell a user of a mistake in one line: field or file, value, remedy (no section in the paper).

A mistake is a ValueError whose message is that line. The command line prints it (`minglm.cli.main`), so every
verb speaks alike; `one_line` guards the form, `shown` keeps a value readable, however long or strange it is,
and `read_from` says which file is damaged.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LONGEST_VALUE = 80
LONGEST_LINE = 600


def shown(value: Any, quoted: bool = False) -> str:
    """Return a value for a message: unprintable characters escaped, long ones cut. quoted: text in quotes."""
    # Python refuses to print thousands of digits.
    if isinstance(value, int) and value.bit_length() > 128:
        digits = int(value.bit_length() * math.log10(2)) + 1
        return f"a number of about {digits} digits"
    text = repr(value) if quoted or not isinstance(value, str) else value
    return _printable(_shortened(text, LONGEST_VALUE))


def one_line(message: str) -> str:
    """Return a message as one printable line."""
    return _shortened(_printable(" ".join(message.split())), LONGEST_LINE)


@contextlib.contextmanager
def read_from(path: str | Path) -> Iterator[None]:
    """Raise ValueError, in one line, that names the file whose content was not what is expected of it.

    A file that could not be written meanwhile stays a mistake of its own.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error.__cause__, OSError):
            raise
        kind = type(error).__name__
        raise ValueError(
            f"{path} holds what this version does not write ({kind}: {error}); restore it"
        ) from error


def _shortened(text: str, length: int) -> str:
    """Cut a long text in its middle: what is wrong stands at the beginning, the remedy at the end."""
    if len(text) <= length:
        return text
    half = (length - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def _printable(text: str) -> str:
    """Escape what a terminal would not print."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


def _first_of_this_machine() -> bool:
    """Return whether this process speaks before the ranks know one another: one on each machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


_ask: Callable[[], bool] = _first_of_this_machine
_answer: bool | None = None


def ask_before_speaking(ask: Callable[[], bool]) -> None:
    """Let `ask` decide which of many ranks tells of a mistake, so that the user reads one line and not one a rank."""
    global _ask
    _ask = ask


def may_speak() -> bool:
    """Return whether this process is to tell the user of what ended it. One process alone always is.

    The answer stays the same: a rank may ask before it closes its connections, and speak afterwards.
    """
    global _answer
    if _answer is None:
        try:
            _answer = _ask()
        except Exception:  # the ranks can no longer ask one another; another one has spoken
            _answer = False
    return _answer
