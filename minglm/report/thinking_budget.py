"""Draw accuracy over the thinking budget, from the records of `eval --thinking-budget` (paper 4; arXiv 2501.19393).

One panel for each task: avg@k with its 95% interval over problems, by the number of tokens that a thought may
have. The points are evenly spaced, so that a budget of 0 has a place beside powers of two.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minglm.report import drawing


def draw_thinking_budgets(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write the figure, and return its path. records: those of `EvaluationRecord`, with their `thinking_budget`."""
    budgets = sorted({record["thinking_budget"] for record in records})
    names = list(dict.fromkeys(record["env"] for record in records))
    figure, axes = drawing.canvas(1, len(names), size=(1.2 + 2.4 * len(names), 3.0), sharey=True)
    for name, axis in zip(names, axes[0], strict=True):
        by_budget = {r["thinking_budget"]: r for r in records if r["env"] == name}
        own = [by_budget[budget] for budget in budgets]
        places = range(len(own))
        shade = drawing.colour("reasoning.rl")
        low = [record["low"] for record in own]
        high = [record["high"] for record in own]
        axis.fill_between(places, low, high, color=shade, alpha=0.2, linewidth=0)
        axis.plot(places, [record["avg"] for record in own], "o-", color=shade, markersize=4)
        axis.set_xticks(places, [str(budget) for budget in budgets])
        axis.set(xlabel="most tokens of a thought", ylim=(0, 1))
        drawing.title(axis, name)
    axes[0][0].set_ylabel(f"avg@{records[0]['k']}, 95% interval")
    return drawing.save(figure, path)
