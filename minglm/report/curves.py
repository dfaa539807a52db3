"""The figures of a run, drawn from the records of its log alone (paper Figures 3 to 9 have such curves).

Every function takes the records of `RUN/log.jsonl` (`common.read_jsonl`) and the path of a PNG, and returns the path,
or None when the log holds nothing to draw.

Choices: stages that are small beside the first (the paper's last one is 0.4% of its tokens) are drawn wider than their
share, so that they can be read, and their tokens are written below.

Simplifies: one run, so one seed; the bars of a score are the interval over problems and samples, not over seeds. Only
`draw_rl_seeds` takes several runs.
"""

from minglm.report.drawing import (
    INK,
    PALE,
    canvas,
    colour,
    dark,
    label,
    running_mean,
    save,
    select,
    spread,
    stages_of,
    thousands,
    title,
)


def bands(records, stages, least=0.17):
    """Where each stage lies on an axis of tokens: {stage: (left, right, tokens)}; narrow ones widened to `least`."""
    tokens = {}
    for stage in stages:
        seen = [r["tokens"] for r in select(records, "step", stage=stage)]
        ends = [r["tokens"] for r in select(records, "stage_end", stage=stage)]
        tokens[stage] = ends[-1] if ends else max(1, seen[-1] - seen[0])
    widths = {stage: max(least, count / sum(tokens.values())) for stage, count in tokens.items()}
    placed, left = {}, 0.0
    for stage, width in widths.items():
        placed[stage] = (left, left + width, tokens[stage])
        left += width
    return placed


def along(records, stage, band):
    """Abscissae of a stage's steps inside its band, in proportion to the tokens seen."""
    seen = [r["tokens"] for r in select(records, "step", stage=stage)]
    step = (seen[-1] - seen[0]) / max(1, len(seen) - 1) or 1
    return [
        band[0] + (band[1] - band[0]) * (t - seen[0] + step) / (seen[-1] - seen[0] + step)
        for t in seen
    ]


def draw_bands(axis, placed):
    """Colour the stages behind a curve, name them above it and give their tokens below."""
    for stage, (left, right, _) in placed.items():
        axis.axvspan(left, right, color=colour(stage), alpha=0.13, linewidth=0)
        axis.text(
            (left + right) / 2,
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
    axis.set_xticks([(left + right) / 2 for left, right, _ in placed.values()])
    axis.set_xticklabels([thousands(count) for *_, count in placed.values()], fontsize=8)
    axis.set_xlim(0, max(right for _, right, _ in placed.values()))
    axis.tick_params(axis="x", length=0)
    axis.grid(False, axis="x")


def draw_curve(axis, x, y, shade):
    """A measurement as a thin line and its running mean as a thick one; a single point as a dot. Returns the mean."""
    mean = running_mean(y)
    axis.plot(x, y, color=shade, linewidth=0.5, alpha=0.5)
    axis.plot(
        x, mean, color=shade, linewidth=1.5, marker="o" if len(x) == 1 else None, markersize=4
    )
    return mean


def draw_loss(records, path):
    """Main and MTP loss over the tokens of every stage: pre- and mid-training on the left, fine-tuning on the right."""
    stages = stages_of(records, "step")
    parts = [
        [s for s in stages if (s == "unified" or s.endswith(".sft")) == tuned]
        for tuned in (False, True)
    ]
    placed = [bands(records, part) for part in parts if part]
    if not placed:
        return None
    widths = [len(part) for part in placed]
    figure, axes = canvas(1, len(placed), (10, 3.8), sharey=True, width_ratios=widths)
    for axis, part in zip(axes[0], placed):
        draw_bands(axis, part)
        for stage, band in part.items():
            steps, x = select(records, "step", stage=stage), along(records, stage, band)
            for name, shade, text, place, side in (
                ("mtp_loss", PALE, "token after next (MTP)", (6, 9), "left"),
                ("loss", INK, "next token", (6, -13), "right"),
            ):
                values = [r.get(name) for r in steps]
                if not all(values):  # trained without MTP
                    continue
                mean = draw_curve(axis, x, values, shade)
                if stage == stages[0]:
                    at = len(x) // 3 if side == "left" else -1
                    axis.annotate(
                        text,
                        (x[at], mean[at]),
                        place,
                        textcoords="offset points",
                        color=shade,
                        ha=side,
                    )
        axis.set_xlabel("tokens of each stage")
    axes[0][0].set_ylabel("cross-entropy (nats per token)")
    axes[0][0].set_ylim(0, 1.08 * axes[0][0].get_ylim()[1])
    return save(figure, path)


def draw_load(records, path):
    """Load of the busiest expert over the mean, one line per MoE layer, over pre- and mid-training."""
    stages = [s for s in stages_of(records, "step") if s != "unified" and not s.endswith(".sft")]
    steps = [
        r
        for r in records
        if r["kind"] == "step" and r["stage"] in stages and r.get("load_max_over_mean")
    ]
    if not steps:
        return None
    figure, axes = canvas(1, 1, (8, 3.4))
    axis, placed = axes[0][0], bands(records, stages)
    draw_bands(axis, placed)
    ends = []
    for layer in range(len(steps[0]["load_max_over_mean"])):
        shade = tuple(
            0.15 + 0.55 * layer / len(steps[0]["load_max_over_mean"]) * c for c in (0.9, 1.0, 1.2)
        )
        for stage, band in placed.items():
            x, y = (
                along(records, stage, band),
                [r["load_max_over_mean"][layer] for r in steps if r["stage"] == stage],
            )
            mean = draw_curve(axis, x, y, shade)
        ends.append((mean[-1], f"{'MoE layer ' if layer == 0 else ''}{layer + 1}", shade))
    if steps[0]["mtp_loss"]:
        ends[-1] = (ends[-1][0], "MTP", ends[-1][2])
    if len(ends) > 8:
        ends = [ends[0], ends[len(ends) // 2], ends[-1]]
    low, high = axis.get_ylim()
    for y, (_, text, shade) in zip(spread([y for y, *_ in ends], 0.06 * (high - low)), ends):
        axis.annotate(
            text,
            (1, y),
            (5, -3),
            ("axes fraction", "data"),
            textcoords="offset points",
            color=shade,
        )
    axis.axhline(1, color=PALE, linewidth=1, linestyle=(0, (4, 3)))
    axis.annotate("perfect balance", (0, 1), (6, 4), textcoords="offset points", color="#6b6b73")
    axis.set_ylabel("busiest expert / mean load")
    axis.set_xlabel("tokens of each stage")
    axis.set_ylim(0.9)
    return save(figure, path)


def draw_scores(records, path):
    """avg@k of each task after each stage, with 95% intervals: filled with thinking, hollow without."""
    scores = select(records, "evaluation")
    if not scores:
        return None
    group = {r["env"]: r["group"] for r in sorted(scores, key=lambda r: r["group"])}
    stages = stages_of(records, "evaluation")
    rows = -(-len(group) // 4)
    columns = -(-len(group) // rows)
    size = (2.3 * columns + 1.4, rows * (0.27 * len(stages) + 0.75))
    figure, axes = canvas(rows, columns, size, sharex=True, sharey=True)
    for axis, env in zip(axes.flat, group):
        for r in select(scores, "evaluation", env=env):
            y = stages.index(r["stage"]) + (-0.14 if r["thinking"] else 0.14)
            shade, inside = colour(r["stage"]), colour(r["stage"]) if r["thinking"] else "white"
            axis.plot(
                [100 * r["low"], 100 * r["high"]],
                [y, y],
                color=shade,
                linewidth=1.6,
                solid_capstyle="butt",
            )
            axis.plot(
                100 * r["avg"],
                y,
                "o",
                color=shade,
                markerfacecolor=inside,
                markersize=4.5,
                clip_on=False,
            )
        title(axis, f"{env} ({group[env]})")
        axis.set_yticks(range(len(stages)), [label(stage) for stage in stages])
        axis.set_ylim(len(stages) - 0.5, -0.5)
        axis.set_xlim(0, 100)
        axis.tick_params(axis="y", length=0)
    for axis in list(axes.flat)[len(group) :]:
        axis.set_visible(False)
    figure.supxlabel(
        "score (%), bars: 95% interval; filled: thinking, hollow: without thinking",
        fontsize=9,
        color=INK,
    )
    return save(figure, path)


def draw_rl(records, path):
    """Reward, length and share of groups with a signal over each reinforcement phase; one seed."""
    return draw_rl_seeds([records], path)


def draw_rl_seeds(runs, path):
    """The same of several runs that differ in their seed: the mean of their running means, and the range they span."""
    stages = [
        stage
        for stage in stages_of(runs[0], "rl")
        if all(select(run, "rl", stage=stage) for run in runs)
    ]
    if not stages:
        return None
    figure, axes = canvas(
        3, len(stages), (2.1 * len(stages) + 0.8, 5.2), sharex="col", sharey="row"
    )
    for column, stage in enumerate(stages):
        phases = [select(run, "rl", stage=stage) for run in runs]
        x = [r["step"] for r in min(phases, key=len)]
        for row, name in enumerate(("reward", "length", "live_groups")):
            axis, values = (
                axes[row][column],
                [[r[name] for r in steps][: len(x)] for steps in phases],
            )
            if len(runs) == 1:
                draw_curve(axis, x, values[0], colour(stage))
                continue
            means = [running_mean(value) for value in values]
            axis.fill_between(
                x,
                *([edge(point) for point in zip(*means)] for edge in (min, max)),
                color=colour(stage),
                alpha=0.25,
                linewidth=0,
            )
            axis.plot(
                x,
                [sum(point) / len(point) for point in zip(*means)],
                color=colour(stage),
                linewidth=1.5,
            )
        title(axes[0][column], label(stage), dark(stage))
        axes[2][column].set_xlabel("step")
    for row, name in enumerate(("reward", "tokens per answer", "groups with a signal")):
        axes[row][0].set_ylabel(name)
        axes[row][0].set_ylim(bottom=0)
    seeds = ", ".join(
        str(next((r["seed"] for r in select(run, "start")), "unknown")) for run in runs
    )
    note = f"one seed ({seeds}); thick: running mean"
    if len(runs) > 1:
        note = f"seeds {seeds}: running mean of each; line: their mean, shade: their range"
    figure.suptitle(note, x=0.995, ha="right", fontsize=8, color="#6b6b73")
    return save(figure, path)


def draw_pathology(records, path):
    """Share of answers with each pathology before (hollow) and after (filled) its reinforcement phase."""
    before, after = (select(records, "pathology", when=when) for when in ("before", "after"))
    if not before or not after:
        return None
    before, after = before[-1], after[-1]
    kinds = list(before["incidence"])
    figure, axes = canvas(1, 1, (6, 0.42 * len(kinds) + 0.9))
    axis, shade = axes[0][0], dark("pathology_rl")
    for y, kind in enumerate(kinds):
        first, last = 100 * before["incidence"][kind], 100 * after["incidence"].get(kind, 0.0)
        axis.annotate(
            "", (last, y), (first, y), arrowprops={"arrowstyle": "-", "color": PALE, "linewidth": 1}
        )
        axis.plot(first, y, "o", color=shade, markerfacecolor="white", markersize=6)
        axis.plot(last, y, "o", color=shade, markersize=6)
        for value in (first, last):
            axis.annotate(
                f"{value:.1f}",
                (value, y),
                (0, 6),
                textcoords="offset points",
                color=INK,
                ha="center",
            )
    if "any" in kinds:
        for record in (before, after):
            y = kinds.index("any")
            axis.plot(
                [100 * record["low"], 100 * record["high"]],
                [y, y],
                color=shade,
                linewidth=3,
                alpha=0.35,
            )
    axis.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
    axis.set_ylim(len(kinds) - 0.5, -0.7)
    axis.set_xlim(left=-0.03 * axis.get_xlim()[1])
    axis.set_xlabel(
        f"answers affected (%, of {before['n']}); hollow: before pathology RL, filled: after"
    )
    axis.tick_params(axis="y", length=0)
    return save(figure, path)


def draw_time(records, path):
    """Minutes of every stage, labelled with its tokens; the pale end of a bar is the evaluation after it."""
    ends = select(records, "stage_end")
    if not ends:
        return None
    figure, axes = canvas(1, 1, (7, 0.24 * len(ends) + 0.8))
    axis = axes[0][0]
    for y, r in enumerate(ends):
        trained, tested = r["seconds"], r.get("evaluation_seconds", 0.0)
        axis.barh(y, trained / 60, color=colour(r["stage"]), height=0.72)
        axis.barh(
            y, tested / 60, left=trained / 60, color=colour(r["stage"]), height=0.72, alpha=0.3
        )
        total = trained + tested
        text = f"{total / 60:.1f} min" if total >= 60 else f"{total:.0f} s"
        text += f", {thousands(r['tokens'])} tokens" if r.get("tokens") else ""
        axis.annotate(
            text, (total / 60, y), (4, -3), textcoords="offset points", color=INK, fontsize=8
        )
    axis.set_yticks(range(len(ends)), [label(r["stage"]) for r in ends])
    axis.set_ylim(len(ends) - 0.4, -0.6)
    axis.set_xlim(0, 1.3 * axis.get_xlim()[1])
    axis.set_xlabel("minutes; pale: evaluation")
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")
    return save(figure, path)


FIGURES = {
    "loss": draw_loss,
    "load": draw_load,
    "scores": draw_scores,
    "rl": draw_rl,
    "pathology": draw_pathology,
    "time": draw_time,
}
