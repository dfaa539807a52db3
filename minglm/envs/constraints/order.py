"""Constrain the order of the numbers (paper 3.4: one of seven major kinds)."""

from itertools import pairwise

from minglm.envs.constraints.kind import ENGLISH, Kind
from minglm.envs.instructions import WORDS


def _spelled(numbers):
    """Return numbers as English words."""
    return [WORDS["en"][number - 1] for number in numbers if number]


def _neighbours(test):
    """Return a checker of every pair of neighbours."""
    return lambda answer, value: all(test(a, b) for a, b in pairwise(answer.numbers))


def _zigzag(answer, value):
    """Return whether the numbers rise and fall in turn, and rise first."""
    steps = [b - a for a, b in pairwise(answer.numbers)]
    return all(step > 0 if place % 2 == 0 else step < 0 for place, step in enumerate(steps))


def _alternate(rng, numbers):
    """Return even and odd numbers in turn: those given, moved by one where needed."""
    first = rng.randrange(2)
    moved = []
    for place, number in enumerate(numbers):
        fits = (number + place + first) % 2 == 0
        moved.append(number if fits else number - 1 or 2)
    return moved


def _mirrored(rng, numbers):
    """Return the first half of some numbers and its mirror image."""
    half = numbers[: (len(numbers) + 1) // 2]
    return half + half[: len(numbers) // 2][::-1]


KINDS = (
    Kind(
        "up",
        "Smallest first.",
        "从小到大。",
        "one six",
        "six one",
        _neighbours(lambda a, b: a <= b),
        slots=("order", "first", "last"),
        arrange=lambda rng, numbers: sorted(numbers),
    ),
    Kind(
        "down",
        "Largest first.",
        "从大到小。",
        "six one",
        "one six",
        _neighbours(lambda a, b: a >= b),
        slots=("order", "first", "last"),
        arrange=lambda rng, numbers: sorted(numbers, reverse=True),
    ),
    Kind(
        "in_turn",
        "Even and odd in turn.",
        "单双交替。",
        "one six three",
        "one three six",
        _neighbours(lambda a, b: a % 2 != b % 2),
        slots=("order", "parity"),
        arrange=_alternate,
    ),
    Kind(
        "even_first",
        "Even before odd.",
        "双数在单数前面。",
        "six one",
        "one six",
        _neighbours(lambda a, b: a % 2 <= b % 2),
        slots=("order",),
        arrange=lambda rng, numbers: sorted(numbers, key=lambda number: number % 2),
    ),
    Kind(
        "odd_first",
        "Odd before even.",
        "单数在双数前面。",
        "one six",
        "six one",
        _neighbours(lambda a, b: a % 2 >= b % 2),
        slots=("order",),
        arrange=lambda rng, numbers: sorted(numbers, key=lambda number: -(number % 2)),
    ),
    Kind(
        "mirror",
        "The same in both directions.",
        "正反相同。",
        "one six one",
        "one one six",
        lambda answer, value: answer.numbers == answer.numbers[::-1],
        slots=("order", "equal"),
        arrange=_mirrored,
    ),
    Kind(
        "largest_last",
        "The largest last.",
        "最大的在最后。",
        "six one nine",
        "nine one six",
        lambda answer, value: answer.numbers[-1] == max(answer.numbers),
        slots=("order", "last"),
        arrange=lambda rng, numbers: [*(n for n in numbers if n < max(numbers)), max(numbers)],
    ),
    Kind(
        "smallest_last",
        "The smallest last.",
        "最小的在最后。",
        "six nine one",
        "one nine six",
        lambda answer, value: answer.numbers[-1] == min(answer.numbers),
        slots=("order", "last"),
        arrange=lambda rng, numbers: [*(n for n in numbers if n > min(numbers)), min(numbers)],
    ),
    Kind(
        "near",
        "Each within two of the last.",
        "相邻的数最多差二。",
        "six five seven",
        "six one seven",
        _neighbours(lambda a, b: abs(a - b) <= 2),
        slots=("distance",),
        arrange=lambda rng, numbers: sorted(numbers),
    ),
    Kind(
        "far",
        "Each three or more from the last.",
        "相邻的数至少差三。",
        "six one nine",
        "six five one",
        _neighbours(lambda a, b: abs(a - b) >= 3),
        slots=("distance",),
    ),
    Kind(
        "count_up",
        "Each one more than the last.",
        "每个数比前一个大一。",
        "five six seven",
        "five seven eight",
        _neighbours(lambda a, b: b == a + 1),
        slots=("order", "distance", "first", "last"),
        arrange=lambda rng, numbers: list(range(min(numbers), min(numbers) + len(numbers))),
    ),
    Kind(
        "count_down",
        "Each one less than the last.",
        "每个数比前一个小一。",
        "seven six five",
        "seven five four",
        _neighbours(lambda a, b: b == a - 1),
        slots=("order", "distance", "first", "last"),
        arrange=lambda rng, numbers: list(range(max(numbers), max(numbers) - len(numbers), -1)),
    ),
    Kind(
        "zigzag",
        "Up, then down, in turn.",
        "先大后小，交替。",
        "one six five",
        "six one five",
        _zigzag,
        slots=("order",),
    ),
    Kind(
        "alphabet",
        "In the order of the alphabet.",
        "按字母顺序。",
        "five one two",
        "one five two",
        lambda answer, value: _spelled(answer.numbers) == sorted(_spelled(answer.numbers)),
        slots=("order", "first", "last"),
        languages=ENGLISH,
        arrange=lambda rng, numbers: sorted(numbers, key=lambda number: WORDS["en"][number - 1]),
    ),
    Kind(
        "longer",
        "Short words first.",
        "短的词在前。",
        "two four seven",
        "seven two four",
        _neighbours(lambda a, b: len(WORDS["en"][a - 1]) <= len(WORDS["en"][b - 1])),
        slots=("order",),
        languages=ENGLISH,
        arrange=lambda rng, numbers: sorted(
            numbers, key=lambda number: len(WORDS["en"][number - 1])
        ),
    ),
)
