"""Draw who did what when in reinforcement learning: the trainer's lane, and those that roll out (paper Figure 10)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minglm.common.log import Record
from minglm.common.trace import ROLLOUT, TRAINER, Span
from minglm.report.drawing import canvas, dark, label, save, title
from minglm.report.records import RLRecord, select, stages_of

PHASE_COLOURS = {
    "generate": "#1f5fa8",
    "environment": "#c9a227",
    "reward": "#55958c",
    "train": "#c2571a",
    "publish": "#26262b",
}
"""The colour of each phase of a lane (`minglm.common.trace`)."""

STEPS_SHOWN = 6


def stage_spans(records: Sequence[Record], stage: str, steps: int | None = None) -> list[Span]:
    """Return who did what when in a stage of RL, or in its last `steps` steps."""
    found = [step.spans for step in select(records, RLRecord, stage=stage) if step.spans]
    return [Span(*span) for spans in found[-(steps or 0) :] for span in spans]


def draw_time_line(records: Sequence[Record], path: str | Path) -> Path | None:
    """Draw what trainer and rollouts did in the last steps of each stage whose rollouts ran in processes of their own."""
    chosen = {}
    for stage in stages_of(records, RLRecord):
        spans = stage_spans(records, stage, STEPS_SHOWN)
        if len({span.lane for span in spans} - {TRAINER, ROLLOUT}):
            chosen[stage] = spans
    if not chosen:
        return None
    figure, axes = canvas(len(chosen), 1, (9, 0.6 + 1.3 * len(chosen)))
    for (axis,), (stage, spans) in zip(axes, chosen.items(), strict=True):
        draw_lanes(axis, spans)
        title(axis, label(stage), dark(stage))
    axes[-1][0].set_xlabel("seconds")
    return save(figure, path)


def draw_lanes(axis: Any, spans: Sequence[Span]) -> None:
    """Draw a lane for the trainer and one for each that rolls out; what overlaps in a lane stands below it."""
    lanes = sorted({span.lane for span in spans}, key=lambda lane: (lane != TRAINER, lane))
    first = min(span.began for span in spans)
    thickness = {"environment": 0.25, "reward": 0.25}
    for span in spans:
        height = thickness.get(span.phase, 0.5)
        y = lanes.index(span.lane) + (0.4 if height < 0.5 else 0)
        axis.barh(
            y, span.ended - span.began, height, span.began - first, color=PHASE_COLOURS[span.phase]
        )
    axis.set_yticks(range(len(lanes)), lanes)
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    seen = [phase for phase in PHASE_COLOURS if any(span.phase == phase for span in spans)]
    right = 1.0
    for phase in reversed(seen):
        right -= 0.016 * len(phase) + 0.02  # of the width of a panel that is half a figure
        axis.text(
            right, 1.03, phase, transform=axis.transAxes, fontsize=8, color=PHASE_COLOURS[phase]
        )
