"""What every contract draws from and how hypothesis runs it: settings, seeds, random generators, shapes, texts.

Contracts and tests share these, so that a test of one component imports nothing of another. No counterpart in the paper.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

seeds: st.SearchStrategy[int] = st.integers(0, 2**32 - 1)
shapes: st.SearchStrategy[tuple[int, int]] = st.tuples(st.integers(1, 6), st.integers(1, 9))

# The first failing example is raised as it was drawn, as one plain AssertionError. Its message names the property;
# shrinking it to a smaller example would take seconds and say little more.
contract = settings(
    deadline=None, report_multiple_bugs=False, phases=[Phase.generate], database=None
)


def numbers(seed: int) -> torch.Generator:
    """Return a CPU generator with this seed."""
    return torch.Generator().manual_seed(seed)


def holds(shrink: bool = True, **drawn: st.SearchStrategy[Any]) -> Callable[[Callable], None]:
    """Decorate a property: run it at once on drawn examples, and raise its first failure.

    Unlike `contract`, it shrinks the failing example first.

    Args:
        shrink: False to raise the example as it was drawn, for properties that are slow.
        drawn: the strategy of each argument of the property.
    """
    skipped = {Phase.explain} if shrink else {Phase.explain, Phase.shrink}
    chosen = settings(deadline=None, report_multiple_bugs=False, phases=set(Phase) - skipped)

    def run(test: Callable) -> None:
        chosen(given(**drawn)(test))()

    return run


def for_all(**drawn: st.SearchStrategy[Any]) -> Callable[[Callable], None]:
    """Decorate a property: run it at once on drawn examples under `contract`, and raise the first failure.

    Args:
        drawn: the strategy of each argument of the property.
    """

    def run(test: Callable) -> None:
        contract(given(**drawn)(test))()

    return run


def texts(names: Sequence[str] = ()) -> st.SearchStrategy[str]:
    """Return a strategy for texts: any characters, digits, Chinese, code, emoji, and `names` of special tokens."""
    pieces = [
        "def f(x):\n    return 1\n",
        "1234",
        "  ",
        "\r\n",
        "\t",
        "你好，世界",
        "é",
        "e\u0301",
        "🙂",
        "\0",
        *names,
    ]
    return st.lists(st.text(max_size=8) | st.sampled_from(pieces), max_size=8).map("".join)
