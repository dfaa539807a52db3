"""Draw the figures of the benchmarks from their stored records."""

import json
from pathlib import Path

from minglm.bench.compile import draw_compile
from minglm.bench.kernels import draw_kernels
from minglm.bench.train import draw_train
from minglm.report import drawing


def draw_generate(record, axis):
    """Tokens a second against the batch."""
    for name, shade in (("minglm", "#1f5fa8"), ("transformers", "#c2571a")):
        for samples, style in ((1, "o-"), (8, "s--")):
            points = [p for p in record["curve"] if p["samples"] == samples]
            if points:
                axis.plot(
                    [p["batch"] for p in points],
                    [p[name] for p in points],
                    style,
                    color=shade,
                    markersize=4,
                )
                text = f"{name}, {'prompts differ' if samples == 1 else '8 samples a prompt'}"
                axis.annotate(text, (points[-1]["batch"], points[-1][name]), (6, 7 if samples == 8 else -7),
                              textcoords="offset points",
                              color=shade, va="center", fontsize=8)  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="answers at once", ylabel="tokens a CPU-second")
    axis.set_xlim(None, 12 * max(p["batch"] for p in record["curve"]))
    drawing.title(
        axis,
        f"{record['prompt']} tokens of prompt, {record['tokens']} of answer, {record['versions']['device']}",
    )


DRAWN = {
    "generate": draw_generate,
    "train": draw_train,
    "compile": draw_compile,
    "kernels": draw_kernels,
}


def redraw(path):
    """Draw the figure of a stored record again. Returns its path."""
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    figure, ((axis,),) = drawing.canvas(1, 1, record.get("size", (7, 4)))
    DRAWN[record["bench"]](record, axis)
    return drawing.save(figure, Path(path).with_suffix(".png"))
