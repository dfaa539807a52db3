"""Draw the stages of a run as one picture, beside the paper's (paper Figure 3, section 3.1).

Figure 3 has pre- and mid-training (15 : 7 : 0.5 : 0.5 : 0.1 trillion tokens), section 3.1 the three experts
and the unified model. Drawn from the config, so that it cannot disagree with what is run.

Simplified: a stage's width follows the paper's tokens, and the small ones are widened until their text fits.
"""

from pathlib import Path
from typing import Any

from minglm.config import RunConfig, StagesConfig
from minglm.report.drawing import INK, PALE, canvas, colour, dark, label, save, thousands

Axis = Any  # matplotlib's Axes, which has no usable types


def box(
    axis: Axis,
    left: float,
    bottom: float,
    width: float,
    height: float,
    stage: str,
    text: str,
    size: float = 8.5,
    **options: Any,
) -> None:
    """Draw a rounded box in the stage's colour with text in its middle. options: those of the text."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import FancyBboxPatch

    shape = FancyBboxPatch(
        (left, bottom),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.8",
        linewidth=1.1,
        facecolor=(*to_rgb(colour(stage)), 0.16),
        edgecolor=colour(stage),
    )
    axis.add_patch(shape)
    options = {"ha": "center", "va": "center", "color": INK, "linespacing": 1.25} | options
    axis.text(left + width / 2, bottom + height / 2, text, fontsize=size, **options)


def arrow(axis: Axis, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw a thin arrow between two points."""
    axis.annotate(
        "",
        end,
        start,
        arrowprops={"arrowstyle": "-|>", "color": PALE, "linewidth": 1.1, "shrinkA": 1},
    )


def draw_training(axis: Axis, run: RunConfig, least: float = 0.21) -> None:
    """Draw five columns, one a stage: heading, the paper's tokens and length, and this run's."""
    paper = dict(StagesConfig().items())
    shares = {}
    for name, stage in paper.items():
        shares[name] = max(least, stage.tokens / StagesConfig().total_tokens)

    left = 10.0
    gap = 0.8
    scale = 90 / sum(shares.values())
    edges = []  # (left, right) of each column
    for name, share in shares.items():
        width = share * scale - gap
        axis.text(
            left + width / 2,
            46.2,
            label(name, "\n"),
            ha="center",
            va="bottom",
            fontsize=9,
            weight="bold",
            color=dark(name),
            linespacing=1.05,
        )
        for bottom, stage in ((38.7, paper[name]), (31, getattr(run.stages, name))):
            text = f"{thousands(stage.tokens)} tokens\n{stage.sequence_length:,} positions"
            box(axis, left, bottom, width, 6.6, name, text, 8)
        edges.append((left, left + width))
        left += width + gap

    note = "widths: the paper's tokens, small stages widened"
    axis.text(99.2, 29.4, note, ha="right", fontsize=7.5, color=PALE)
    row_name = {"ha": "right", "va": "center", "fontsize": 9.5, "color": INK}
    axis.text(9, 42, "paper", **row_name)
    axis.text(9, 34.3, run.name, weight="bold", **row_name)
    draw_bracket(axis, edges[0][0], edges[1][1], "pre-training: documents cut at random")
    draw_bracket(axis, edges[2][0], edges[4][1], "mid-training: whole documents, longer sequences")


def draw_bracket(axis: Axis, left: float, right: float, text: str) -> None:
    """Draw a line over some columns, with text above it."""
    axis.plot([left, right], [51.4, 51.4], color=PALE, linewidth=1)
    axis.text((left + right) / 2, 52, text, ha="center", va="bottom", fontsize=9, color=INK)


def draw_finishing(axis: Axis, run: RunConfig) -> None:
    """Draw what follows the base: three experts (cold start, then RL), unified model, general RL, pathology RL."""
    heights = {"reasoning": 17.6, "agent": 9.8, "chat": 2.0}
    box(axis, 0, 9.8, 7.5, 5.8, "general", "base", 9.5)
    arrow(axis, (4, 30), (4, 15.8))
    for name, expert in run.posttraining.experts():
        y = heights[name]
        middle = y + 2.9
        arrow(axis, (7.6, 12.7), (10.9, middle))
        box(axis, 11, y, 15, 5.8, f"{name}.sft", f"{name} expert\ncold-start SFT")
        arrow(axis, (26.1, middle), (29.4, middle))
        box(axis, 29.5, y, 15, 5.8, f"{name}.rl", "RL\n" + ", ".join(expert.rl.environments[:2]))
        arrow(axis, (44.6, middle), (48.4, 12.7 + (middle - 12.7) / 3))

    left = 48.5
    width = 15.2
    direct = f"{1 - run.posttraining.thinking_share:.0%}"
    finish = {
        "unified": f"the experts' best\nanswers, {direct}\nwithout thinking",
        "general_rl": "all tasks",
        "pathology_rl": "mixing, repetition,\nbroken format",
    }
    for number, (name, text) in enumerate(finish.items()):
        if number:
            arrow(axis, (left - 3, 12.7), (left - 0.1, 12.7))
        box(axis, left, 6.2, width, 13, name, "")
        axis.text(
            left + width / 2,
            11.2,
            text,
            ha="center",
            va="center",
            fontsize=8.5,
            color=INK,
            linespacing=1.25,
        )
        axis.text(
            left + width / 2,
            17.6,
            label(name),
            ha="center",
            va="top",
            fontsize=9,
            weight="bold",
            color=dark(name),
        )
        left += width + 3
    axis.text(
        100,
        3.4,
        "the result: one model that thinks or answers at once",
        fontsize=9,
        color=INK,
        va="center",
        ha="right",
    )


def draw_stages(run: RunConfig, path: str | Path) -> Path:
    """Draw the stages of a run beside the paper's, as a PNG at `path`. Return the path."""
    figure, axes = canvas(1, 1, (10, 5.2))
    figure.set_layout_engine("none")
    axis = axes[0][0]
    axis.set(position=(0, 0, 1, 1), xlim=(-1, 101), ylim=(0.5, 56.5))
    axis.axis("off")
    draw_training(axis, run)
    draw_finishing(axis, run)
    return save(figure, path)
