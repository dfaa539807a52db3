"""Read an answer: its numbers, and what stands around and between them (paper 3.4, deterministic verification rules).

    Answer: (two, four)!   ->   opening "Answer:", wrapper "(", inside "two, four", words two and four, closing "!"

An answer is peeled from the outside: heading, opening or sign-off, closing mark, wrapper. What remains is the
inside, and its words are what is left of its pieces without list marks, separators and decoration. Every
checker of the taxonomy reads one of these parts, so that a constraint can be met or missed whatever else is
asked for. `write` is the inverse: numbers in a given form.

Choice: reading and writing share no code. The checkers judge what a model wrote, and `write` serves the oracle.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minglm.envs.instructions import VALUE, WORDS

OPENINGS = {"en": ("Answer:", "List:", "Result:"), "zh": ("答：", "列表：", "结果：")}
HEADINGS = {"en": ("# Numbers", "# List"), "zh": ("# 数字", "# 列表")}
SIGN_OFFS = {"en": ("Done", "Bye", "End"), "zh": ("完毕", "再见", "结束")}
WRAPPERS = {
    "(": ")",
    "（": "）",
    "[": "]",
    "{": "}",
    '"': '"',
    "“": "”",
    "**": "**",
    "`": "`",
}

_OPENING = re.compile("|".join(OPENINGS["en"] + OPENINGS["zh"]))
_HEADING = re.compile(r"(# [^\n]*)\n+")
_SIGN_OFF = re.compile("[ \n](" + "|".join(SIGN_OFFS["en"] + SIGN_OFFS["zh"]) + r")\Z")
_CLOSING = re.compile(r"(\.\.\.|…|[.!?。！？])\Z")
_MARKER = re.compile(r"^(?:- |\* |\d+\. |[a-z]\) )", re.MULTILINE)
_SEPARATOR = re.compile(r"(?:->|[\s,，、;；/|+])+")
DECORATION = '()（）[]{}<>"“”*`'


@dataclass(frozen=True)
class Answer:
    """The parts of an answer; a part that is missing is empty."""

    text: str
    """All of it, stripped."""
    heading: str
    opening: str
    closing: str
    """The mark at the end, or the sign-off."""
    wrapper: str
    """What opens around all numbers."""
    body: str
    """Without heading, opening and closing."""
    inside: str
    """The body without its wrapper."""
    pieces: list[str]
    """The words with their decoration."""
    words: list[str]
    """The words in the case in which they were written."""

    @functools.cached_property
    def numbers(self) -> list[int]:
        """Return what the words mean; a word that is no number word gives 0."""
        return [VALUE.get(word.lower(), 0) for word in self.words]


def clean(piece: str) -> str:
    """Return a piece without its decoration; spaces stay."""
    return piece.strip(DECORATION)


def read(text: str) -> Answer:
    """Return the parts of an answer."""
    text = text.strip()
    rest = text
    heading = ""
    if found := _HEADING.match(rest):
        heading = found[1]
        rest = rest[found.end() :]
    opening = ""
    if found := _OPENING.match(rest):
        opening = found[0]
        rest = rest[found.end() :].lstrip()
    closing = ""
    if found := _SIGN_OFF.search(rest) or _CLOSING.search(rest):
        closing = found[1]
        rest = rest[: found.start()]
    body = rest

    wrapper = ""
    inside = body
    for begin, end in WRAPPERS.items():
        inner = body[len(begin) : -len(end)]
        wraps = body.startswith(begin) and body.endswith(end)
        if wraps and inner and begin not in inner and end not in inner:
            wrapper = begin
            inside = inner
            break
    pieces = [piece for piece in _SEPARATOR.split(_MARKER.sub("", inside)) if piece]
    words = [clean(piece) for piece in pieces]
    return Answer(text, heading, opening, closing, wrapper, body, inside, pieces, words)


@dataclass(frozen=True)
class Form:
    """How numbers are written. The default is words with spaces between them, and nothing around them."""

    separator: str = " "
    marker: Callable[[int], str] = lambda place: ""
    """What stands before the word at a place, from 0."""
    around_each: tuple[str, str] = ("", "")
    around_all: tuple[str, str] = ("", "")
    case: Callable[[list[str]], list[str]] = lambda words: words
    before: str = ""
    after: str = ""


def write(numbers: Sequence[int], language: str, form: Form) -> str:
    """Return numbers from 1 to 9 as words of a language, in a form."""
    words = form.case([WORDS[language][number - 1] for number in numbers])
    begin, end = form.around_each
    pieces = [f"{form.marker(place)}{begin}{word}{end}" for place, word in enumerate(words)]
    begin, end = form.around_all
    return f"{form.before}{begin}{form.separator.join(pieces)}{end}{form.after}"
