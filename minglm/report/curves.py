"""Draw the figures of a run from the records of its log alone (paper Figures 3 to 9 have such curves).

Every function takes the records of `RUN/log.jsonl` (`minglm.report.records.read_records`) and the path of a PNG, and
returns the path, or None when the log holds nothing to draw.

Choices: stages that are small beside the first (the paper's last one is 0.4% of its tokens) are drawn wider than their
share, so that they can be read, and their tokens are written below.

Simplified: one run, so one seed; the bars of a score are the interval over problems and samples, not over seeds. Only
`draw_rl_seeds` takes several runs.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minglm.common.log import Record
from minglm.report.claims import pathologies
from minglm.report.drawing import (
    INK,
    PALE,
    Colour,
    canvas,
    colour,
    dark,
    label,
    running_mean,
    save,
    spread,
    thousands,
    title,
)
from minglm.report.records import (
    EvaluationRecord,
    RLRecord,
    StageEndRecord,
    StartRecord,
    StepRecord,
    select,
    stages_of,
)
from minglm.report.time_line import draw_time_line

Records = Sequence[Record]
Axis = Any  # matplotlib's Axes, which has no usable types

NOTE = "#6b6b73"  # colour of remarks


class Band(NamedTuple):
    """Where a stage lies on an axis of tokens from 0 to about 1."""

    left: float
    right: float
    tokens: int


def is_fine_tuning(stage: str) -> bool:
    """Return whether a stage trains on conversations: an expert's cold start or control, or the unified model."""
    return stage == "unified" or stage.endswith((".sft", ".control"))


def bands(records: Records, stages: Sequence[str], least: float = 0.17) -> dict[str, Band]:
    """Place each stage on an axis of tokens, in order; narrow ones are widened to `least`."""
    tokens = {}
    for stage in stages:
        ends = select(records, StageEndRecord, stage=stage)
        if ends:
            tokens[stage] = ends[-1].tokens
        else:
            steps = select(records, StepRecord, stage=stage)
            tokens[stage] = max(1, steps[-1].tokens - steps[0].tokens)

    placed = {}
    left = 0.0
    for stage, count in tokens.items():
        width = max(least, count / sum(tokens.values()))
        placed[stage] = Band(left, left + width, count)
        left += width
    return placed


def along(records: Records, stage: str, band: Band) -> list[float]:
    """Return the abscissae of a stage's steps inside its band, in proportion to the tokens seen."""
    seen = [step.tokens for step in select(records, StepRecord, stage=stage)]
    span = seen[-1] - seen[0]
    step = span / max(1, len(seen) - 1) or 1
    width = band.right - band.left
    return [band.left + width * (tokens - seen[0] + step) / (span + step) for tokens in seen]


def draw_bands(axis: Axis, placed: dict[str, Band]) -> None:
    """Colour the stages behind a curve, name them above it and give their tokens below."""
    middles = []
    for stage, band in placed.items():
        middle = (band.left + band.right) / 2
        middles.append(middle)
        axis.axvspan(band.left, band.right, color=colour(stage), alpha=0.13, linewidth=0)
        axis.text(
            middle,
            1.02,
            label(stage, "\n"),
            transform=axis.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=7.2,
            color=dark(stage),
            weight="bold",
            linespacing=1.05,
        )
    axis.set_xticks(middles)
    axis.set_xticklabels([thousands(band.tokens) for band in placed.values()], fontsize=8)
    axis.set_xlim(0, max(band.right for band in placed.values()))
    axis.tick_params(axis="x", length=0)
    axis.grid(False, axis="x")


def draw_curve(
    axis: Axis,
    x: Sequence[float],
    y: Sequence[float],
    shade: Colour | tuple[float, ...],
) -> list[float]:
    """Draw a measurement as a thin line and its running mean as a thick one; a single point as a dot.

    Return the running mean.
    """
    mean = running_mean(y)
    marker = "o" if len(x) == 1 else None
    axis.plot(x, y, color=shade, linewidth=0.5, alpha=0.5)
    axis.plot(x, mean, color=shade, linewidth=1.5, marker=marker, markersize=4)
    return mean


def draw_loss(records: Records, path: str | Path) -> Path | None:
    """Draw main and MTP loss over the tokens of every stage: pre- and mid-training left, fine-tuning right."""
    stages = stages_of(records, StepRecord)
    if not stages:
        return None
    groups = [
        [stage for stage in stages if not is_fine_tuning(stage)],
        [stage for stage in stages if is_fine_tuning(stage)],
    ]
    panels = [bands(records, group) for group in groups if group]
    widths = [len(panel) for panel in panels]
    figure, axes = canvas(1, len(panels), (10, 3.8), sharey=True, width_ratios=widths)
    for axis, panel in zip(axes[0], panels):
        draw_bands(axis, panel)
        for stage, band in panel.items():
            steps = select(records, StepRecord, stage=stage)
            x = along(records, stage, band)
            mtp = [step.mtp_loss for step in steps]
            if all(mtp):  # 0 where the MTP layer is not trained
                mean = draw_curve(axis, x, mtp, PALE)
                if stage == stages[0]:
                    place = (x[len(x) // 3], mean[len(x) // 3])
                    write_label(axis, "token after next (MTP)", place, (6, 9), PALE, "left")
            loss = [step.loss for step in steps]
            if all(loss):
                mean = draw_curve(axis, x, loss, INK)
                if stage == stages[0]:
                    write_label(axis, "next token", (x[-1], mean[-1]), (6, -13), INK, "right")
        axis.set_xlabel("tokens of each stage")
    axes[0][0].set_ylabel("cross-entropy (nats per token)")
    axes[0][0].set_ylim(0, 1.08 * axes[0][0].get_ylim()[1])
    return save(figure, path)


def write_label(
    axis: Axis,
    text: str,
    place: tuple[float, float],
    offset: tuple[float, float],
    shade: Colour,
    side: str,
) -> None:
    """Write text beside a point of a curve; offset: from the point, in points."""
    axis.annotate(text, place, offset, textcoords="offset points", color=shade, ha=side)


def draw_load(records: Records, path: str | Path) -> Path | None:
    """Draw the load of the busiest expert over the mean, one line per MoE layer, over pre- and mid-training."""
    stages = [stage for stage in stages_of(records, StepRecord) if not is_fine_tuning(stage)]
    loads: dict[str, list[list[float]]] = {}  # of each stage: one list a step, one number a layer
    mtp_losses = []
    for step in select(records, StepRecord):
        if step.stage in stages and step.load_max_over_mean:
            loads.setdefault(step.stage, []).append(step.load_max_over_mean)
            mtp_losses.append(step.mtp_loss)
    if not loads:
        return None
    figure, axes = canvas(1, 1, (8, 3.4))
    axis = axes[0][0]
    placed = bands(records, list(loads))
    draw_bands(axis, placed)

    layers = len(loads[next(iter(loads))][0])
    ends = []  # (height of the last point, name, colour) of each layer
    for layer in range(layers):
        brightness = 0.55 * layer / layers
        shade = tuple(0.15 + brightness * channel for channel in (0.9, 1.0, 1.2))
        mean = []
        for stage, band in placed.items():
            x = along(records, stage, band)
            y = [step_loads[layer] for step_loads in loads[stage]]
            mean = draw_curve(axis, x, y, shade)
        name = f"MoE layer {layer + 1}" if layer == 0 else f"{layer + 1}"
        ends.append((mean[-1], name, shade))
    if mtp_losses[0]:  # the MTP layer's router is the last
        ends[-1] = (ends[-1][0], "MTP", ends[-1][2])
    if len(ends) > 8:
        ends = [ends[0], ends[len(ends) // 2], ends[-1]]

    low, high = axis.get_ylim()
    heights = spread([height for height, _, _ in ends], 0.06 * (high - low))
    for height, (_, name, shade) in zip(heights, ends):
        axis.annotate(
            name,
            (1, height),
            (5, -3),
            ("axes fraction", "data"),
            textcoords="offset points",
            color=shade,
        )
    axis.axhline(1, color=PALE, linewidth=1, linestyle=(0, (4, 3)))
    axis.annotate("perfect balance", (0, 1), (6, 4), textcoords="offset points", color=NOTE)
    axis.set_ylabel("busiest expert / mean load")
    axis.set_xlabel("tokens of each stage")
    axis.set_ylim(0.9)
    return save(figure, path)


def draw_scores(records: Records, path: str | Path) -> Path | None:
    """Draw avg@k of each task after each stage, with 95% intervals: filled with thinking, hollow without.

    Tasks that only the last of many stages was scored on have no curve, and stay in the report's table.
    """
    scores = select(records, EvaluationRecord)
    if not scores:
        return None
    learned = {score.env for score in scores if score.stage != scores[-1].stage}
    if learned:
        scores = [score for score in scores if score.env in learned]
    groups = {score.env: score.group for score in sorted(scores, key=lambda score: score.group)}
    stages = stages_of(records, EvaluationRecord)
    rows = math.ceil(len(groups) / 4)
    columns = math.ceil(len(groups) / rows)
    size = (2.3 * columns + 1.4, rows * (0.27 * len(stages) + 0.75))
    figure, axes = canvas(rows, columns, size, sharex=True, sharey=True)
    for axis, env in zip(axes.flat, groups):
        for score in select(scores, EvaluationRecord, env=env):
            draw_score(axis, score, stages.index(score.stage))
        title(axis, f"{env} ({groups[env]})")
        axis.set_yticks(range(len(stages)), [label(stage) for stage in stages])
        axis.set_ylim(len(stages) - 0.5, -0.5)
        axis.set_xlim(0, 100)
        axis.tick_params(axis="y", length=0)
    for axis in list(axes.flat)[len(groups) :]:
        axis.set_visible(False)
    figure.supxlabel(
        "score (%), bars: 95% interval; filled: thinking, hollow: without thinking",
        fontsize=9,
        color=INK,
    )
    return save(figure, path)


def draw_score(axis: Axis, score: EvaluationRecord, row: int) -> None:
    """Draw one score as a point with its interval, above the middle of its row with thinking, below without."""
    y = row + (-0.14 if score.thinking else 0.14)
    shade = colour(score.stage)
    axis.plot(
        [100 * score.low, 100 * score.high],
        [y, y],
        color=shade,
        linewidth=1.6,
        solid_capstyle="butt",
    )
    axis.plot(
        100 * score.avg,
        y,
        "o",
        color=shade,
        markerfacecolor=shade if score.thinking else "white",
        markersize=4.5,
        clip_on=False,
    )


RL_PANELS = {
    "reward": "reward",
    "length": "tokens per answer",
    "live_groups": "groups with a signal",
}
"""Fields of `RLRecord` that are drawn, with the name of their axis."""


def draw_rl(records: Records, path: str | Path) -> Path | None:
    """Draw reward, length and share of groups with a signal over each RL stage; one seed."""
    return draw_rl_seeds([records], path)


def draw_rl_seeds(runs: Sequence[Records], path: str | Path) -> Path | None:
    """Draw the curves of `draw_rl` for runs that differ in their seed: mean of the running means, and their range."""
    stages = []
    for stage in stages_of(runs[0], RLRecord):
        if all(select(run, RLRecord, stage=stage) for run in runs):
            stages.append(stage)
    if not stages:
        return None
    size = (2.1 * len(stages) + 0.8, 5.2)
    figure, axes = canvas(len(RL_PANELS), len(stages), size, sharex="col", sharey="row")
    for column, stage in enumerate(stages):
        # A step whose environments all failed measured nothing: it is left out, in every run.
        phases = [
            {
                step.step: step
                for step in select(run, RLRecord, stage=stage)
                if step.reward is not None
            }
            for run in runs
        ]
        x = [step for step in phases[0] if all(step in steps for steps in phases)]
        for row, field in enumerate(RL_PANELS):
            axis = axes[row][column]
            curves = [[getattr(steps[step], field) for step in x] for steps in phases]
            if len(runs) == 1:
                draw_curve(axis, x, curves[0], colour(stage))
            else:
                draw_range(axis, x, curves, colour(stage))
        title(axes[0][column], label(stage), dark(stage))
        axes[-1][column].set_xlabel("step")
    for row, name in enumerate(RL_PANELS.values()):
        axes[row][0].set_ylabel(name)
        axes[row][0].set_ylim(bottom=0)
    figure.suptitle(seeds_note(runs), x=0.995, ha="right", fontsize=8, color=NOTE)
    return save(figure, path)


def draw_range(
    axis: Axis, x: Sequence[float], curves: Sequence[Sequence[float]], shade: str
) -> None:
    """Draw the mean of the running means of several curves as a line, and the range they span as a band."""
    points = list(zip(*[running_mean(curve) for curve in curves]))
    lowest = [min(point) for point in points]
    highest = [max(point) for point in points]
    means = [sum(point) / len(point) for point in points]
    axis.fill_between(x, lowest, highest, color=shade, alpha=0.25, linewidth=0)
    axis.plot(x, means, color=shade, linewidth=1.5)


def seed_of(run: Records) -> str:
    """Return the seed of a run as text."""
    starts = select(run, StartRecord)
    return str(starts[-1].seed) if starts else "unknown"


def seeds_note(runs: Sequence[Records]) -> str:
    """Say which seeds were drawn, and what lines and shades mean."""
    seeds = ", ".join(map(seed_of, runs))
    if len(runs) == 1:
        return f"one seed ({seeds}); thick: running mean"
    return f"seeds {seeds}: running mean of each; line: their mean, shade: their range"


def draw_pathology(records: Records, path: str | Path) -> Path | None:
    """Draw faults, flags and content before (hollow) and after (filled) pathology RL, in percent."""
    found = pathologies(records)
    if found is None:
        return None
    before, after = found
    first_shares, last_shares = (
        {
            **record.incidence,
            "flagged": (record.audit or {})["any"],
            "content": record.content or 0.0,
        }
        for record in found
    )
    names = list(first_shares)
    figure, axes = canvas(1, 1, (6, 0.42 * len(names) + 0.9))
    axis = axes[0][0]
    shade = dark("pathology_rl")
    for y, name in enumerate(names):
        first = 100 * first_shares[name]
        last = 100 * last_shares[name]
        arrow = {"arrowstyle": "-", "color": PALE, "linewidth": 1}
        axis.annotate("", (last, y), (first, y), arrowprops=arrow)
        axis.plot(first, y, "o", color=shade, markerfacecolor="white", markersize=6)
        axis.plot(last, y, "o", color=shade, markersize=6)
        for value in (first, last):
            write_label(axis, f"{value:.1f}", (value, y), (0, 6), INK, "center")
    if "any" in names:
        y = names.index("any")
        for record in (before, after):
            interval = [100 * record.low, 100 * record.high]
            axis.plot(interval, [y, y], color=shade, linewidth=3, alpha=0.35)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.set_ylim(len(names) - 0.5, -0.7)
    axis.set_xlim(left=-0.03 * axis.get_xlim()[1])
    axis.set_xlabel(f"% of {before.n} answers; hollow: before pathology RL, filled: after")
    axis.tick_params(axis="y", length=0)
    return save(figure, path)


def draw_time(records: Records, path: str | Path) -> Path | None:
    """Draw the minutes of every stage, labelled with its tokens; the pale end of a bar is the evaluation after it."""
    ends = select(records, StageEndRecord)
    if not ends:
        return None
    figure, axes = canvas(1, 1, (7, 0.24 * len(ends) + 0.8))
    axis = axes[0][0]
    for y, end in enumerate(ends):
        shade = colour(end.stage)
        trained = end.seconds / 60
        evaluated = end.evaluation_seconds / 60
        axis.barh(y, trained, color=shade, height=0.72)
        axis.barh(y, evaluated, left=trained, color=shade, height=0.72, alpha=0.3)
        total = end.seconds + end.evaluation_seconds
        text = f"{total / 60:.1f} min" if total >= 60 else f"{total:.0f} s"
        if end.tokens:
            text += f", {thousands(end.tokens)} tokens"
        place = (total / 60, y)
        axis.annotate(text, place, (4, -3), textcoords="offset points", color=INK, fontsize=8)
    axis.set_yticks(range(len(ends)), [label(end.stage) for end in ends])
    axis.set_ylim(len(ends) - 0.4, -0.6)
    axis.set_xlim(0, 1.3 * axis.get_xlim()[1])
    axis.set_xlabel("minutes; pale: evaluation")
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")
    return save(figure, path)


FIGURES: dict[str, Callable[[Records, str | Path], Path | None]] = {
    "loss": draw_loss,
    "load": draw_load,
    "scores": draw_scores,
    "rl": draw_rl,
    "time_line": draw_time_line,
    "pathology": draw_pathology,
    "time": draw_time,
}
"""Every figure of a run, by the name of its file."""
