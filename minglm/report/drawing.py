"""Draw in the project's style: colours of the stages, an empty canvas, direct labels, PNG files (no section).

A stage keeps its colour in every figure. Lines are labelled where they end and not in a box; thin lines are
measurements, thick ones running means. The same log gives the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minglm.common.files import atomic_path

if TYPE_CHECKING:  # matplotlib takes a second to import, and reading a log needs none of it
    from matplotlib.figure import Figure

Colour = str | tuple[float, float, float]

COLOURS = {
    "general": "#4c78a8",
    "code_reasoning": "#6f9fd0",
    "repository": "#2f8f83",
    "reasoning": "#5bb39b",
    "long_agent": "#9ad0b4",
    "reasoning.sft": "#f0a830",
    "reasoning.rl": "#d98200",
    "reasoning.control": "#b8a07a",
    "agent.sft": "#e58a76",
    "agent.rl": "#cc5a43",
    "agent.control": "#b59089",
    "chat.sft": "#c08fc4",
    "chat.rl": "#9a5ba3",
    "chat.control": "#a897ab",
    "unified": "#4a4a68",
    "general_rl": "#7a7a99",
    "pathology_rl": "#a8a8c0",
}
"""The colour of each stage."""
NAMES = {
    "general": "general",
    "code_reasoning": "code and\nreasoning",
    "repository": "repository\ncode",
    "reasoning": "synthetic\nreasoning",
    "long_agent": "long,\nagent",
    "unified": "unified\nSFT",
    "general_rl": "general\nRL",
    "pathology_rl": "pathology\nRL",
}
"""The name of a stage as readers see it, in two lines; experts' stages are named by `label`."""
INK = "#26262b"  # text and lines that matter
PALE = "#9a9aa2"  # axes, and lines that stay in the background


def colour(stage: str) -> str:
    """Return the colour of a stage."""
    return COLOURS.get(stage, PALE)


def dark(stage: str) -> tuple[float, ...]:
    """Return the stage's colour, dark enough for text."""
    from matplotlib.colors import to_rgb

    return tuple(0.72 * channel for channel in to_rgb(colour(stage)))


def label(stage: str, separator: str = " ") -> str:
    """Return the name of a stage as readers see it; `separator` stands between its two lines."""
    expert, _, phase = stage.partition(".")
    name = NAMES.get(stage)
    if name is None:
        written = phase if phase == "control" else phase.upper()
        name = f"{expert}\n{written}" if phase else stage
    return name.replace("\n", separator)


def thousands(tokens: float) -> str:
    """Format a count with three figures: 1234567 as '1.23 M'."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}"


def running_mean(values: Sequence[float], share: float = 0.06) -> list[float]:
    """Return the mean of the neighbours within `share` of the series on either side; as long as `values`."""
    reach = max(1, round(share * len(values)))
    means = []
    for i in range(len(values)):
        window = values[max(0, i - reach) : i + reach + 1]
        means.append(sum(window) / len(window))
    return means


def canvas(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 3.6), **options: Any
) -> tuple["Figure", Any]:
    """Return a figure and its (rows, columns) array of axes, in the style of the project.

    size: inches. options: those of `Figure.subplots`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": PALE,
        "axes.labelcolor": INK,
        "xtick.color": "#5c5c64",
        "ytick.color": "#5c5c64",
        "axes.grid": True,
        "grid.color": "#ececf0",
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
    }
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def title(axis: Any, text: str, shade: Colour | tuple[float, ...] = INK) -> None:
    """Write the heading of one panel."""
    axis.set_title(text, color=shade, fontsize=9.5, loc="left", weight="bold")


def save(figure: "Figure", path: str | Path) -> Path:
    """Write a figure as PNG, atomically and without a time stamp. Return the path."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
    return Path(path)


def spread(heights: Sequence[float], least: float) -> list[float]:
    """Move heights as little as needed to be at least `least` apart, in the order they were given."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [heights[i] for i in order]
    for _ in range(100):  # neighbours that are too close push each other apart
        for i in range(1, len(placed)):
            gap = placed[i] - placed[i - 1]
            push = max(0.0, least - gap) / 2
            placed[i - 1] -= push
            placed[i] += push
    return [placed[order.index(i)] for i in range(len(heights))]
