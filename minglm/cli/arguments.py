"""Arguments that several verbs share, and the one parser of all verbs (no section in the paper).

    --problems many    ->    minglm: --problems: 'many': must be a whole number from 1 to 100,000

A mistake in any word is a ValueError in one line. Types refuse what is out of bounds, so it is refused before
a verb does anything.
"""

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import NoReturn

from minglm.common.mistakes import shown
from minglm.config.posttraining import MOST_DRAFTS


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are ValueErrors; an option must be written out."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with argparse's message."""
        message = message.removeprefix("argument ")
        raise ValueError(f"{message} (see {self.prog} --help)")


def whole(minimum: int, maximum: int = 10**9) -> Callable[[str], int]:
    """Return the type of a whole number between these bounds."""

    def convert(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(
                f"{shown(word, quoted=True)}: must be a whole number from {minimum:,} to {maximum:,}"
            )
        return value

    return convert


def number(minimum: float, maximum: float, above: bool = False) -> Callable[[str], float]:
    """Return the type of a number between these bounds. above: refuse the minimum itself."""

    def convert(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not minimum <= value <= maximum or (above and value == minimum):
            first = f"above {minimum:,}" if above else f"from {minimum:,}"
            raise argparse.ArgumentTypeError(
                f"{shown(word, quoted=True)}: must be a number {first} to {maximum:,}"
            )
        return value

    return convert


def path(word: str) -> str:
    """Return a path; the type of what may be a file or a folder. Raises ArgumentTypeError for one that cannot be."""
    if not word or "\0" in word:
        raise argparse.ArgumentTypeError(
            f"{shown(word, quoted=True)}: must be the path of a file or folder"
        )
    return word


def folder(word: str) -> str:
    """Return the path of a folder, which need not be there. Raises ArgumentTypeError for a file."""
    if os.path.exists(path(word)) and not os.path.isdir(word):
        raise argparse.ArgumentTypeError(f"{shown(word, quoted=True)}: is a file; give a folder")
    return word


def file(word: str) -> str:
    """Return the path of a file, which need not be there. Raises ArgumentTypeError for a folder."""
    if os.path.isdir(path(word)):
        raise argparse.ArgumentTypeError(f"{shown(word, quoted=True)}: is a folder; give a file")
    return word


def word(text: str) -> str:
    """Return a name that stands in a script as it is.

    Raises ArgumentTypeError for one that would need quotes there.
    """
    if not re.fullmatch(r"[\w.,:@/+=-]+", text):
        raise argparse.ArgumentTypeError(
            f"{shown(text, quoted=True)}: must be one word of letters, digits and . , : @ / + = -"
        )
    return text


def refuse_idle(given: Mapping[str, object], where: str) -> None:
    """Raise ValueError for an option that changes nothing. given: {option: its value; None, False: it was not given}."""
    for option, value in given.items():
        if value is not None and value is not False:
            raise ValueError(f"{option} changes nothing {where}; leave it out")


def add_config(parser: argparse.ArgumentParser, example: str = "configs/toy.py") -> None:
    """Add the positional argument CONFIG, and accept overrides of its fields."""
    parser.add_argument(
        "config", help=f"a config file, such as {example}, or FILE:FUNCTION for a variant in it"
    )
    parser.set_defaults(overrides=(), config_comes_first=True)


def add_drafts(parser: argparse.ArgumentParser, default: int | None = 0) -> None:
    """Add the option --draft-tokens, for verbs that generate. default: None for what the run's config says."""
    shown_default = "the config's" if default is None else default
    parser.add_argument(
        "--draft-tokens",
        type=whole(0, MOST_DRAFTS),
        default=default,
        help="tokens that the MTP layer drafts for each pass of the model; answers follow the same distribution "
        f"(default: {shown_default})",
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument RUN and the option --stage."""
    parser.add_argument("run", type=folder, help="folder of a run, or of a released checkpoint")
    parser.add_argument(
        "--stage", help="use the model as this stage left it (default: the last complete one)"
    )
