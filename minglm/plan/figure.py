"""Draw plans side by side: memory of a GPU by term, what a micro-batch is made of, the expected speed (no section).

Everything in it is expected, by arithmetic; the title of each panel says so.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minglm.plan.memory import GIB
from minglm.report.drawing import INK, PALE, canvas, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHADES = {
    "weights": "#1f5fa8",
    "gradients": "#4c78a8",
    "muon": "#6f9fd0",
    "adamw": "#a9c8e8",
    "working copies": "#2f8f83",
    "activations": "#d98200",
    "exchange": "#f0a830",
    "head": "#9a5ba3",
}
EXPOSED = {"products": "#1f5fa8", "exchange": "#f0a830", "context": "#9a5ba3"}
HIDDEN = {"gather": "#2f8f83", "reduce": "#5bb39b", "replicas": "#9ad0b4"}
LENGTHS = {4096: "#9ad0b4", 32_768: "#2f8f83", 131_072: "#1b4f49"}


def draw(plans: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw the results of `minglm.plan.summary.plan` that have stages. Raises ValueError where none has."""
    shown = [plan for plan in plans if plan["stages"]]
    if not shown:
        raise ValueError("--figure: this layout is impossible, so there is nothing to draw")
    figure, axes = canvas(1, 3, (12, 1.8 + 0.55 * len(shown)))
    memory, time, speed = axes[0]
    for axis in (memory, time, speed):
        axis.grid(False, axis="y")
    names = [f"{plan['run']}\n{plan['gpus']} x {plan['gpu']}" for plan in shown]
    _draw_memory(memory, shown)
    _draw_time(time, shown)
    _draw_speed(speed, shown)
    memory.set_yticks(range(len(shown)), names)
    for axis in (time, speed):
        axis.set_yticks([])
    for axis in (memory, time, speed):
        axis.set_ylim(len(shown) - 0.4, -0.6)
    return figure


def _legend(axis: Any, columns: int) -> None:
    """Write the names of the colours below a panel."""
    axis.legend(
        frameon=False,
        fontsize=7.5,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=columns,
        columnspacing=1.0,
        handlelength=1.2,
    )


def _draw_memory(axis: Any, plans: Sequence[Mapping[str, Any]]) -> None:
    """Draw the terms of the stage that needs most memory."""
    for row, plan in enumerate(plans):
        stage = max(plan["stages"], key=lambda stage: stage["memory"]["total"])
        left = 0.0
        for term, shade in SHADES.items():
            width = stage["memory"][term] / GIB
            label = term if row == 0 else None
            axis.barh(row, width, left=left, color=shade, height=0.55, label=label)
            left += width
        usable = plan["usable"] / GIB
        axis.plot([usable, usable], [row - 0.4, row + 0.4], color=INK, linewidth=1.5)
    axis.set_xlabel("GiB (line: usable)")
    _legend(axis, 4)
    title(axis, "Memory of a GPU, estimate")


def _draw_time(axis: Any, plans: Sequence[Mapping[str, Any]]) -> None:
    """Draw a micro-batch of the longest stage: what adds up above, what hides behind it below."""
    drawn: set[str] = set()
    for row, plan in enumerate(plans):
        stage = max(plan["stages"], key=lambda stage: stage["days"][0])
        seconds = stage["seconds"]
        for offset, shades in ((-0.15, EXPOSED), (0.18, HIDDEN)):
            left = 0.0
            for name, shade in shades.items():
                spent = sum(value for key, value in seconds.items() if key.split()[0] == name)
                width = 100 * spent / seconds["micro-batch"]
                label = name if spent and name not in drawn else None
                drawn |= {name} if label else set()
                axis.barh(row + offset, width, left=left, color=shade, height=0.28, label=label)
                left += width
    axis.set_xlabel("% of a micro-batch; the lower bar hides behind the upper one")
    _legend(axis, 3)
    title(axis, "Where the time goes, at the bound")


def _draw_speed(axis: Any, plans: Sequence[Mapping[str, Any]]) -> None:
    """Draw the range of the MFU for each length of rows."""
    drawn: set[int] = set()
    for row, plan in enumerate(plans):
        stages = {stage["sequence_length"]: stage for stage in plan["stages"]}
        for place, (length, stage) in enumerate(sorted(stages.items())):
            low, high = stage["mfu"]
            y = row - 0.22 + 0.22 * place
            label = f"rows of {length:,}" if length not in drawn else None
            drawn.add(length)
            shade = LENGTHS.get(length, PALE)
            axis.barh(y, 100 * (high - low), left=100 * low, color=shade, height=0.18, label=label)
    axis.set_xlim(0, 50)
    axis.set_xlabel("MFU in %, of the data sheet's bfloat16 peak")
    _legend(axis, 3)
    title(axis, "Expected speed, equal loads, not measured")
