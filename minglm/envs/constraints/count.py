"""Constrain how many numbers there are (paper 3.4: one of seven major kinds).

Every request has one of these.
"""

from minglm.envs.constraints.kind import Kind

SLOTS = ("count",)


def _distinct(answer):
    """Return how many different numbers an answer has."""
    return len(set(answer.numbers))


KINDS = (
    Kind(
        "count",
        "Write {} numbers.",
        "写{}个数。",
        "two six",
        "two six one",
        lambda answer, value: len(answer.words) == value,
        values=(2, 3, 4, 5),
        example=2,
        slots=SLOTS,
    ),
    Kind(
        "at_least",
        "Write {} or more numbers.",
        "写{}个或更多的数。",
        "two six one",
        "two six",
        lambda answer, value: len(answer.words) >= value,
        values=(2, 3, 4),
        example=3,
        slots=SLOTS,
    ),
    Kind(
        "from_to",
        "Write {} to {} numbers.",
        "写{}到{}个数。",
        "two six one",
        "two",
        lambda answer, value: value[0] <= len(answer.words) <= value[1],
        values=([2, 3], [2, 4], [3, 4], [3, 5], [4, 5]),
        example=[2, 3],
        slots=SLOTS,
    ),
    Kind(
        "either",
        "Write {} or {} numbers.",
        "写{}个或{}个数。",
        "two six one two",
        "two six one",
        lambda answer, value: len(answer.words) in value,
        values=([2, 4], [2, 5], [3, 5]),
        example=[2, 4],
        slots=SLOTS,
    ),
    Kind(
        "even_count",
        "Write an even count of numbers.",
        "写双数个数。",
        "two six",
        "two six one",
        lambda answer, value: len(answer.words) % 2 == 0,
        slots=SLOTS,
    ),
    Kind(
        "odd_count",
        "Write an odd count of numbers, not one.",
        "写单数个数，不要一个。",
        "two six one",
        "two six",
        lambda answer, value: len(answer.words) % 2 == 1 and len(answer.words) > 1,
        slots=SLOTS,
    ),
    Kind(
        "different",
        "Write {} different numbers.",
        "写{}个不同的数。",
        "two six one",
        "two six two",
        lambda answer, value: len(answer.words) == _distinct(answer) == value,
        values=(2, 3, 4, 5),
        example=3,
        slots=("count", "equal"),
    ),
    Kind(
        "copies",
        "Write one number {} times.",
        "一个数写{}遍。",
        "six six",
        "six two",
        lambda answer, value: len(answer.words) == value and _distinct(answer) == 1,
        values=(2, 3, 4),
        example=2,
        slots=("count", "equal", "order"),
        arrange=lambda rng, numbers: numbers[:1] * min(len(numbers), 4),
    ),
    Kind(
        "kinds_of_numbers",
        "Write {} numbers, {} of them different.",
        "写{}个数，其中{}个不同。",
        "two six two",
        "two six one",
        lambda answer, value: [len(answer.words), _distinct(answer)] == value,
        values=([3, 2], [4, 2], [4, 3]),
        example=[3, 2],
        slots=("count", "equal"),
        arrange=lambda rng, numbers: [*numbers[:3], rng.choice(numbers[:3])],
    ),
)
