"""Put the runs of several seeds side by side: a claim is met in k of n of them (paper section 4, protocol).

A folder of logs `seedN.jsonl`, runs of one config, gives

    claims.md    one row a claim: in how many seeds it is met, and what each seed measured
    gains.png    base, cold start, control and RL of each reinforced task, every seed
    rl.png       the curves of reinforcement (`minglm.report.curves`)

Choices: every seed is shown, and none is averaged away. Which seeds are committed is decided before they are run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minglm.common.files import atomic_path
from minglm.common.log import Record
from minglm.common.mistakes import read_from
from minglm.report.card import table
from minglm.report.claims import CLAIMS, Gain, Verdict, gains
from minglm.report.curves import draw_rl_seeds, seed_of
from minglm.report.drawing import INK, PALE, canvas, colour, save, title
from minglm.report.records import read_records

Records = Sequence[Record]

STEPS = ("base", "cold start", "control", "RL")
"""What is drawn of each task, from left to right."""


def redraw(folder: Path) -> list[Path]:
    """Write table and figures of a folder of logs `seedN.jsonl`. Return their paths."""
    runs = [read_records(log) for log in sorted(folder.glob("seed*.jsonl"))]
    paths = [folder / "claims.md"]
    with read_from(folder):
        with atomic_path(paths[0]) as temporary:
            temporary.write_text(claims_table(runs), encoding="utf-8")
        for draw, name in ((draw_gains, "gains.png"), (draw_rl_seeds, "rl.png")):
            path = draw(runs, folder / name)
            if path is not None:
                paths.append(path)
    return paths


def claims_table(runs: Sequence[Records]) -> str:
    """Format one row a claim: its name, in how many of the runs it is met, and the measurement of each seed."""
    rows = []
    for claim in CLAIMS:
        results = [claim(run) for run in runs]
        met = sum(result.verdict == Verdict.MET for result in results)
        measured = []
        for run, result in zip(runs, results, strict=True):
            measured.append(f"seed {seed_of(run)}: {result.measured or result.verdict}")
        rows.append((results[0].name, f"{met} of {len(runs)}", "<br>".join(measured)))
    return table(("claim", "met in", "measured"), rows)


def draw_gains(runs: Sequence[Records], path: str | Path) -> Path | None:
    """Draw each reinforced task: a line a seed through base, cold start and RL, the control as a hollow point."""
    found: dict[str, list[Gain]] = {}
    for run in runs:
        for gain in gains(run):
            found.setdefault(gain.env, []).append(gain)
    if not found:
        return None
    size = (2.4 * len(found) + 0.8, 3.2)
    figure, axes = canvas(1, len(found), size, sharey=True)
    for axis, (env, seeds) in zip(axes[0], found.items()):
        for gain in seeds:
            draw_gain(axis, gain)
        title(axis, env)
        axis.set_xticks(range(len(STEPS)), STEPS)
        axis.set_xlim(-0.4, len(STEPS) - 0.6)
        axis.set_ylim(0, 100)
    axes[0][0].set_ylabel("score (%)")
    seeds = ", ".join(map(seed_of, runs))
    figure.supxlabel(f"seeds {seeds}; bars: 95% interval of the expert", fontsize=9, color=INK)
    return save(figure, path)


def draw_gain(axis: Any, gain: Gain) -> None:
    """Draw one seed of one task."""
    shade = colour(gain.expert.stage)
    scores = (gain.base, gain.cold_start, gain.expert)
    heights = [100 * score.avg for score in scores]
    axis.plot((0, 1, 3), heights, color=shade, linewidth=1.2, marker="o", markersize=4)
    axis.plot((3, 3), (100 * gain.expert.low, 100 * gain.expert.high), color=shade, linewidth=1.6)
    if gain.control is not None:
        control = 100 * gain.control.avg
        axis.plot((1, 2), (heights[1], control), color=PALE, linewidth=1)
        axis.plot(2, control, "o", color=PALE, markerfacecolor="white", markersize=5)
