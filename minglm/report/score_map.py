"""Draw the scores of several runs over their parameters and over their seconds (paper Figure 2).

    left     a point a run: mean avg@k of its last stage, over the parameters of its model
    right    a line a run: the same after each stage that scored all the tasks, over the seconds of training until then

The paper draws the score on SWE-bench Verified over parameters, to say that its model is small for what it
scores. The mean here is over the tasks that every run scored with thinking both in its first and in its last
stage with scores, so all points are of the same tasks, and tasks that only the finished model is asked are
left out; which ones they are stands under the figure. Seconds are those of training, on the machine of each
run, without evaluations.

Simplification: the seconds of all stages add up, those of the other experts too, because the unified model
needs them. Those of the controls do not: nothing starts from them.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from minglm.common.log import Record
from minglm.report import drawing
from minglm.report.records import EvaluationRecord, StageEndRecord


class ScoredRun(NamedTuple):
    """One run with what is drawn of it."""

    name: str
    parameters: int
    """Of its model, embedding and head included."""
    records: Sequence[Record]


class ScoredStage(NamedTuple):
    """What a stage scored with thinking."""

    stage: str
    seconds: float
    """Of training, from the beginning of the run."""
    scores: dict[str, float]
    """avg@k of each task."""


def scored_stages(records: Sequence[Record]) -> list[ScoredStage]:
    """Return the stages that scored a task, in order, without the controls."""
    found = []
    seconds = 0.0
    scores: dict[str, float] = {}
    for record in records:
        if isinstance(record, EvaluationRecord) and record.thinking:
            scores[record.env] = record.avg
        if isinstance(record, StageEndRecord):
            if not record.stage.endswith(".control"):
                seconds += record.seconds
                if scores:
                    found.append(ScoredStage(record.stage, seconds, scores))
            scores = {}
    return found


def shared_tasks(runs: Sequence[ScoredRun]) -> list[str]:
    """Return the tasks that every run scored in its first and in its last stage with scores.

    Raises ValueError, in one line, if there is none.
    """
    tasks = []
    for run in runs:
        stages = scored_stages(run.records)
        if not stages:
            raise ValueError(f"{run.name} has no scores yet; they come with the stage long_agent")
        tasks.append(set(stages[0].scores) & set(stages[-1].scores))
    shared = set.intersection(*tasks)
    if not shared:
        names = ", ".join(run.name for run in runs)
        raise ValueError(f"no task was scored by all of {names}, first and last")
    return sorted(shared)


class Point(NamedTuple):
    """The mean score after a stage."""

    stage: str
    seconds: float
    score: float


def points(records: Sequence[Record], tasks: Sequence[str]) -> list[Point]:
    """Return the mean score over these tasks after each stage that scored all of them."""
    return [
        Point(found.stage, found.seconds, fmean(found.scores[task] for task in tasks))
        for found in scored_stages(records)
        if found.scores.keys() >= set(tasks)
    ]


def draw_score_map(runs: Sequence[ScoredRun], path: str | Path) -> Path:
    """Write the figure and return its path. Raises ValueError for runs without scores to compare."""
    tasks = shared_tasks(runs)
    lines = [points(run.records, tasks) for run in runs]
    figure, axes = drawing.canvas(1, 2, size=(9, 3.6), sharey=True)
    left, right = axes[0]
    shades = ("reasoning.rl", "agent.rl", "chat.rl", "unified", "general_rl", "general")
    for number, (run, line) in enumerate(zip(runs, lines, strict=True)):
        shade = drawing.colour(shades[number % len(shades)])
        left.plot(run.parameters, line[-1].score, "o", color=shade, markersize=6)
        left.annotate(
            run.name, (run.parameters, line[-1].score), (6, 4), textcoords="offset points"
        )
        seconds = [point.seconds for point in line]
        right.plot(seconds, [point.score for point in line], "o-", color=shade, markersize=4)
        right.annotate(run.name, (seconds[-1], line[-1].score), (6, 4), textcoords="offset points")
    left.set(xscale="log", xlabel="parameters", ylabel="mean avg@k", ylim=(0, 1))
    left.margins(x=0.3)
    sizes = sorted({run.parameters for run in runs})
    left.set_xticks(sizes, [drawing.thousands(size) for size in sizes])
    left.minorticks_off()
    right.set(xlabel="seconds of training", xlim=(0, None))
    drawing.title(left, "over parameters")
    drawing.title(right, "over time")
    figure.supxlabel(f"mean of {', '.join(tasks)}", fontsize=9, color=drawing.INK)
    return drawing.save(figure, path)
