"""The style of every figure: colours and names of the stages, an empty canvas, direct labels, and how a PNG is stored.

A stage keeps its colour in every figure. Lines are labelled where they end and not in a box; thin lines are
measurements, thick ones running means. The same log gives the same bytes. No counterpart in the paper.
"""

from minglm.common.files import atomic_path

COLOURS = {
    "general": "#4c78a8",
    "code_reasoning": "#6f9fd0",
    "repository": "#2f8f83",
    "reasoning": "#5bb39b",
    "long_agent": "#9ad0b4",
    "reasoning.sft": "#f0a830",
    "reasoning.rl": "#d98200",
    "agent.sft": "#e58a76",
    "agent.rl": "#cc5a43",
    "chat.sft": "#c08fc4",
    "chat.rl": "#9a5ba3",
    "unified": "#4a4a68",
    "general_rl": "#7a7a99",
    "pathology_rl": "#a8a8c0",
}
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
INK, PALE = "#26262b", "#9a9aa2"


def colour(stage):
    """The colour of a stage."""
    return COLOURS.get(stage, PALE)


def dark(stage):
    """The stage's colour, dark enough for text."""
    from matplotlib.colors import to_rgb

    return tuple(0.72 * channel for channel in to_rgb(colour(stage)))


def label(stage, separator=" "):
    """The name of a stage as readers see it."""
    expert, _, phase = stage.partition(".")
    name = NAMES.get(stage) or (f"{expert}\n{phase.upper()}" if phase else stage)
    return name.replace("\n", separator)


def select(records, kind, **where):
    """Records of one kind whose fields equal those given."""
    return [
        r
        for r in records
        if r["kind"] == kind and all(r.get(name) == value for name, value in where.items())
    ]


def stages_of(records, *kinds):
    """Names of the stages that have records of these kinds, in the order they happened."""
    return list(dict.fromkeys(r["stage"] for r in records if r["kind"] in kinds))


def thousands(tokens):
    """1234567 as '1.2 M'."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}"


def running_mean(values, share=0.06):
    """Mean of the neighbours within `share` of the series on either side; as long as `values`."""
    reach = max(1, round(share * len(values)))
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def canvas(rows=1, columns=1, size=(9, 3.6), **options):
    """A figure and its array of axes, in the style of the project."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
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


def title(axis, text, shade=INK):
    """Write the heading of one panel."""
    axis.set_title(text, color=shade, fontsize=9.5, loc="left", weight="bold")


def save(figure, path):
    """Write a figure as PNG, atomically and without a time stamp. Returns the path."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
    return path


def spread(heights, least):
    """The heights moved as little as labels need to stand at least `least` apart, in the order they were given."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [heights[i] for i in order]
    for _ in range(100):  # neighbours that are too close push each other away
        for i in range(1, len(placed)):
            push = max(0.0, least - (placed[i] - placed[i - 1])) / 2
            placed[i - 1], placed[i] = placed[i - 1] - push, placed[i] + push
    return [placed[order.index(i)] for i in range(len(heights))]
