"""Constrain the letters of English number words (paper 3.4: one of seven major kinds)."""

from minglm.envs.constraints.kind import DIGITS, ENGLISH, Kind
from minglm.envs.instructions import WORDS


def _word(number):
    """Return a number as an English word."""
    return WORDS["en"][number - 1]


def _relatives(number):
    """Return the numbers whose words start with the same letter."""
    return [other for other in DIGITS if _word(other)[0] == _word(number)[0]]


def _starts(answer):
    """Return the first letter of every word, nothing for a piece that is all decoration."""
    return [word[:1].lower() for word in answer.words]


KINDS = (
    Kind(
        "start",
        "Start each with {}.",
        "每个以{}开头。",
        "four five",
        "four six",
        each=lambda number, value: _word(number).startswith(value),
        values=("f", "s", "t"),
        example="f",
        slots=("starts",),
        languages=ENGLISH,
    ),
    Kind(
        "last_letter",
        "End each with {}.",
        "每个以{}结束。",
        "five one",
        "five six",
        each=lambda number, value: _word(number).endswith(value),
        values=("e", "n"),
        example="e",
        languages=ENGLISH,
    ),
    Kind(
        "letter",
        "Each with letter {}.",
        "每个有字母{}。",
        "one two",
        "one six",
        each=lambda number, value: value in _word(number),
        values=("e", "i", "n", "o", "t"),
        example="o",
        languages=ENGLISH,
    ),
    Kind(
        "forbid",
        "No letter {}.",
        "不用字母{}。",
        "six two",
        "six one",
        each=lambda number, value: value not in _word(number),
        values=tuple("efinost"),
        example="e",
        languages=ENGLISH,
    ),
    Kind(
        "letters",
        "Each with {} letters.",
        "每个有{}个字母。",
        "one six",
        "one four",
        each=lambda number, value: len(_word(number)) == value,
        values=(3, 4, 5),
        example=3,
        slots=("letters",),
        languages=ENGLISH,
    ),
    Kind(
        "most_letters",
        "Each with {} letters or less.",
        "每个最多{}个字母。",
        "one four",
        "one three",
        each=lambda number, value: len(_word(number)) <= value,
        values=(3, 4),
        example=4,
        slots=("letters",),
        languages=ENGLISH,
    ),
    Kind(
        "least_letters",
        "Each with {} letters or more.",
        "每个至少{}个字母。",
        "four three",
        "one three",
        each=lambda number, value: len(_word(number)) >= value,
        values=(4, 5),
        example=4,
        slots=("letters",),
        languages=ENGLISH,
    ),
    Kind(
        "all_letters",
        "Use {} letters in all.",
        "一共{}个字母。",
        "one four",
        "one six",
        lambda answer, value: sum(map(len, answer.words)) == value,
        values=tuple(range(6, 22)),
        example=7,
        languages=ENGLISH,
    ),
    Kind(
        "same_start",
        "All start with the same letter.",
        "开头字母都相同。",
        "six seven",
        "six one",
        lambda answer, value: len(set(_starts(answer))) == 1,
        slots=("starts",),
        languages=ENGLISH,
        arrange=lambda rng, numbers: [rng.choice(_relatives(numbers[0])) for _ in numbers],
    ),
    Kind(
        "different_starts",
        "All start with different letters.",
        "开头字母都不同。",
        "six one",
        "six seven",
        lambda answer, value: len(set(_starts(answer))) == len(answer.words),
        slots=("starts", "equal"),
        languages=ENGLISH,
    ),
)
