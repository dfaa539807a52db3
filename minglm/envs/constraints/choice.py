"""Constrain which numbers occur, and where (paper 3.4: one of seven major kinds)."""

from minglm.envs.constraints.kind import DIGITS, Kind, pairs

TRIPLES = [[a, b, c] for a in DIGITS for b in DIGITS for c in DIGITS if a < b < c]


def _places(answer, number):
    """Return where a number occurs."""
    return [place for place, other in enumerate(answer.numbers) if other == number]


def _follows(answer, value):
    """Return whether each of one number is directly followed by the other, and there is one."""
    places = _places(answer, value[0])
    after = [answer.numbers[place + 1 : place + 2] for place in places]
    return bool(places) and all(found == [value[1]] for found in after)


KINDS = (
    Kind(
        "include",
        "Use {}.",
        "要有{}。",
        "one two",
        "one three",
        lambda answer, value: value in answer.numbers,
        values=DIGITS,
        example=2,
        spelled=True,
    ),
    Kind(
        "avoid",
        "Without {}.",
        "不要{}。",
        "one three",
        "one two",
        each=lambda number, value: number != value,
        values=DIGITS,
        example=2,
        spelled=True,
    ),
    Kind(
        "both",
        "Use {} and {}.",
        "要有{}和{}。",
        "five two",
        "two two",
        lambda answer, value: {*value} <= {*answer.numbers},
        values=pairs(),
        example=[2, 5],
        spelled=True,
    ),
    Kind(
        "neither",
        "Without {} and {}.",
        "不要{}和{}。",
        "one three",
        "one five",
        each=lambda number, value: number not in value,
        values=pairs(),
        example=[2, 5],
        spelled=True,
    ),
    Kind(
        "exactly_one",
        "Use {} or {}, not both.",
        "{}和{}只要一个。",
        "two three",
        "two five",
        lambda answer, value: len({*value} & {*answer.numbers}) == 1,
        values=pairs(),
        example=[2, 5],
        spelled=True,
    ),
    Kind(
        "only",
        "Only from {}, {}, {}.",
        "只用{}、{}、{}。",
        "two six",
        "two one",
        each=lambda number, value: number in value,
        values=TRIPLES,
        example=[2, 5, 6],
        spelled=True,
    ),
    Kind(
        "first",
        "First {}.",
        "第一个是{}。",
        "two one",
        "one two",
        lambda answer, value: answer.numbers[0] == value,
        values=DIGITS,
        example=2,
        slots=("first",),
        spelled=True,
    ),
    Kind(
        "second",
        "Second {}.",
        "第二个是{}。",
        "one two",
        "two one",
        lambda answer, value: answer.numbers[1:2] == [value],
        values=DIGITS,
        example=2,
        spelled=True,
    ),
    Kind(
        "last",
        "Last {}.",
        "最后一个是{}。",
        "one two",
        "two one",
        lambda answer, value: answer.numbers[-1] == value,
        values=DIGITS,
        example=2,
        slots=("last",),
        spelled=True,
    ),
    Kind(
        "twice",
        "Use {} two times.",
        "{}用两次。",
        "two two one",
        "two one",
        lambda answer, value: len(_places(answer, value)) == 2,
        values=DIGITS,
        example=2,
        slots=("equal",),
        arrange=lambda rng, numbers: [*numbers[:3], rng.choice(numbers[:3])],
        spelled=True,
    ),
    Kind(
        "once",
        "Use {} only one time.",
        "{}只用一次。",
        "two one",
        "two two",
        lambda answer, value: len(_places(answer, value)) == 1,
        values=DIGITS,
        example=2,
        spelled=True,
    ),
    Kind(
        "before",
        "Use {} before {}.",
        "{}在{}前面。",
        "two one five",
        "five two",
        lambda answer, value: (
            {*value} <= {*answer.numbers}
            and max(_places(answer, value[0])) < min(_places(answer, value[1]))
        ),
        values=pairs(),
        example=[2, 5],
        spelled=True,
    ),
    Kind(
        "follows",
        "After {} comes {}.",
        "{}后面是{}。",
        "one two five",
        "two one five",
        _follows,
        values=pairs(),
        example=[2, 5],
        slots=("follows",),
        spelled=True,
    ),
    Kind(
        "same_ends",
        "First and last the same.",
        "第一个和最后一个相同。",
        "two one two",
        "two one five",
        lambda answer, value: answer.numbers[0] == answer.numbers[-1],
        slots=("equal", "order"),
        arrange=lambda rng, numbers: [*numbers[:-1], numbers[0]],
    ),
    Kind(
        "no_twins",
        "Never the same two times in a row.",
        "不要连续两个相同。",
        "two one two",
        "two two one",
        lambda answer, value: all(a != b for a, b in zip(answer.numbers, answer.numbers[1:])),
        slots=("equal",),
    ),
)
