"""Draw the figures of the benchmarks from their stored records (no counterpart in the paper)."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from minglm.kernels.toolchain.compile_check import SHARED_BYTES
from minglm.report import drawing

OURS = "#1f5fa8"  # blue: minglm, and registers
THEIRS = "#c2571a"  # orange: baselines
SHARED = "#d98200"  # yellow: shared memory
MAX_REGISTERS = 255  # of a thread
TENSOR_CORE_UNITS = ("HGMMA", "QGMMA", "HMMA")


def draw_generate(record: Mapping[str, Any], axis: Axes) -> None:
    """Draw tokens a second against the number of answers at once, for both sides."""
    for side, color in (("minglm", OURS), ("transformers", THEIRS)):
        for samples, style, note, offset in (
            (1, "o-", "prompts differ", -7),
            (8, "s--", "8 samples a prompt", 7),
        ):
            points = [point for point in record["curve"] if point["samples"] == samples]
            if not points:
                continue
            batches = [point["batch"] for point in points]
            speeds = [point[side] for point in points]
            axis.plot(batches, speeds, style, color=color, markersize=4)
            axis.annotate(
                f"{side}, {note}",
                (batches[-1], speeds[-1]),
                (6, offset),
                textcoords="offset points",
                color=color,
                va="center",
                fontsize=8,
            )
    axis.set(xscale="log", yscale="log", xlabel="answers at once", ylabel="tokens a CPU-second")
    axis.set_xlim(None, 12 * max(point["batch"] for point in record["curve"]))
    device = record["versions"]["device"]
    drawing.title(
        axis, f"{record['prompt']} tokens of prompt, {record['tokens']} of answer, {device}"
    )


def draw_train(record: Mapping[str, Any], axis: Axes) -> None:
    """Draw tokens a second of each side, with the speed of its matrix products alone as an outline."""
    results = list(reversed(record["results"]))
    for height, row in enumerate(results):
        color = OURS if row["side"] == "minglm" else THEIRS
        axis.barh(height, row["tokens_per_second"], color=color, alpha=0.85, height=0.6)
        if "floor_seconds" in row:
            axis.barh(
                height,
                record["tokens"] / row["floor_seconds"],
                color="none",
                edgecolor=drawing.PALE,
                height=0.6,
            )
    names = [f"{row['side']}, {row['dtype']}\n{row['layout']}" for row in results]
    axis.set_yticks(range(len(results)), names, fontsize=7)
    label = "tokens a second, one thread; outline: our matrix products alone"
    if not record["bfloat16_products"]:
        label += "\nthis CPU has no bfloat16 products: ours computes in float32"
    axis.set(xlabel=label)
    axis.grid(axis="y", visible=False)
    drawing.title(axis, "A training step, optimizer included")


def draw_rl(record: Mapping[str, Any], axis: Axes) -> None:
    """Draw the seconds of each side's step, the rollout (pale) before the update."""
    results = list(reversed(record["results"]))
    names: list[str] = []
    for height, row in enumerate(results):
        color = OURS if row["side"] == "minglm" else THEIRS
        rollout = row["rollout_seconds"]
        axis.barh(height, rollout, color=color, alpha=0.45, height=0.6)
        axis.barh(height, row["update_seconds"], left=rollout, color=color, alpha=0.9, height=0.6)
        axis.plot([row["floor_seconds"]] * 2, [height - 0.4, height + 0.4], color="black")
        threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        names.append(f"{row['side']}, {threads}")
    axis.set_yticks(range(len(results)), names, fontsize=7)
    label = "seconds of a step: rollout (pale), update; line: its products at full speed"
    label += "\nof the CPU for one thread, of the clock for more"
    axis.set(xlabel=label)
    axis.grid(axis="y", visible=False)
    sizes = f"{record['prompts']} prompts x {record['samples']} samples x {record['tokens']} tokens"
    drawing.title(axis, f"A step of reinforcement learning: {sizes}")


def draw_rl_async(record: Mapping[str, Any], axis: Axes) -> None:
    """Draw the reward per second of each side, without waits and with heavy-tailed ones, and how idle its engine was."""
    results = list(reversed(record["results"]))
    names: list[str] = []
    for height, row in enumerate(results):
        color = OURS if row["side"] == "asynchronous" else THEIRS
        axis.barh(height, row["reward_per_second"], color=color, alpha=0.85, height=0.6)
        idle = f"engine idle {row['engine_idle']:.0%}, trainer {row['trainer_idle']:.0%}"
        place = (row["reward_per_second"], height)
        axis.annotate(idle, place, (4, -3), textcoords="offset points", fontsize=7)
        waits = f"median wait {row['median_wait']:.2g} s" if row["median_wait"] else "no waits"
        names.append(f"{row['side']},\n{waits}")
    axis.set_yticks(range(len(results)), names, fontsize=7)
    axis.set(xlabel="reward per second of the clock")
    axis.set_xlim(0, 1.4 * max(row["reward_per_second"] for row in results))
    axis.grid(axis="y", visible=False)
    drawing.title(axis, f"Rollouts up to {record['max_staleness']} versions ahead")


def draw_compile(record: Mapping[str, Any], axis: Axes) -> None:
    """Draw registers and shared memory of each kernel, as shares of the limits of a thread and of a block."""
    kernels = [kernel for kernel in record["kernels"] if "error" not in kernel]
    names = [f"{kernel['module']}: {kernel['kernel']}" for kernel in kernels]
    heights = [-row for row in range(len(kernels))]
    registers = [kernel["registers"] / MAX_REGISTERS for kernel in kernels]
    shared = [kernel["shared_bytes"] / SHARED_BYTES for kernel in kernels]
    axis.barh([height + 0.2 for height in heights], registers, 0.36, color=OURS)
    axis.barh([height - 0.2 for height in heights], shared, 0.36, color=SHARED)
    axis.set_yticks(heights, names, fontsize=7)
    for height, kernel, longest in zip(heights, kernels, map(max, registers, shared)):
        opcodes = kernel["opcodes"]
        notes = [f"{opcodes[unit]} {unit}" for unit in TENSOR_CORE_UNITS if unit in opcodes]
        if kernel["spill_bytes"]:
            notes.append(f"{kernel['spill_bytes']} bytes spilled")
        axis.annotate(
            ", ".join(notes),
            (longest, height),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=drawing.INK,
        )
    axis.axvline(1, color=drawing.PALE, linewidth=1)
    axis.set(
        xlim=(0, 1.25),
        xlabel="share of 255 registers (blue) and of 227 KiB of shared memory (orange)",
    )
    axis.margins(y=0.01)
    axis.grid(False, axis="y")
    drawing.title(axis, f"Triton {record['triton']} for {record['target']}, compiled without a GPU")


def draw_kernels(record: Mapping[str, Any], axis: Axes) -> None:
    """Draw the share of the ceiling that each form of each case reaches."""
    cases = record["cases"]
    widest = 1.0
    for row, case in enumerate(cases):
        shares = {name: form["share"] for name, form in case["forms"].items() if "share" in form}
        widest = max(widest, *shares.values(), 0)
        _draw_case(axis, -row, shares)
    heights = [-row for row in range(len(cases))]
    axis.set_yticks(heights, [case["case"] for case in cases], fontsize=6)
    axis.set_xlim(0, 1.05 * widest)
    axis.set_xlabel("share of the ceiling: minglm (dot), baselines (strokes; the best is named)")
    axis.margins(y=0.01)
    drawing.title(axis, f"{record['versions']['device']}, ceilings measured in the same run")


def _draw_case(axis: Axes, height: float, shares: Mapping[str, float]) -> None:
    """Draw one case: our form as a dot, the others as strokes, and name the best baseline."""
    baselines = [share for name, share in shares.items() if not name.startswith("minglm")]
    for index, (name, share) in enumerate(shares.items()):
        ours = name.startswith("minglm")
        marker = "o" if index == 0 else "|"
        axis.plot([share], [height], marker, markersize=6, color=OURS if ours else THEIRS)
        if not ours and share == max(baselines):
            axis.annotate(
                name, (share, height), (0, 3), textcoords="offset points", fontsize=4, ha="center"
            )


DRAWINGS: dict[str, Callable[[Mapping[str, Any], Axes], None]] = {
    "generate": draw_generate,
    "train": draw_train,
    "rl": draw_rl,
    "rl_async": draw_rl_async,
    "compile": draw_compile,
    "kernels": draw_kernels,
}


def redraw(path: str | Path) -> Path:
    """Draw the figure of a stored record again; return its path, that of the record with the ending .png."""
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    width, height = record.get("size", (7, 4))
    figure, ((axis,),) = drawing.canvas(1, 1, (width, height))
    DRAWINGS[record["bench"]](record, axis)
    return drawing.save(figure, Path(path).with_suffix(".png"))
