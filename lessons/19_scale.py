# %% [markdown]
# # 19 Scale: what changes when one GPU becomes 512?
#
# Not the numbers. The same batch through two ranks must give the gradients of one process, whatever they divide: weights
# (FSDP2), experts (EP), the positions of a row (CP), the layers (PP), copies of everything. What changes is where time and memory go, and
# that is worked out before anything is started: `minglm plan` does (paper 2.4 gives the batch, not the cluster).
#
# **Your prediction.** Write down first: (1) How far are the gradients of two ranks from those of one, relative to their
# size? (2) GLM-4.5 on 512 H100s, experts divided among the 8 GPUs of a node: what share of the peak can it reach with 4,096
# tokens a GPU, and with 16,384? (3) And with experts divided among 32 GPUs, so that tokens leave the node? (4) Which term
# of a GPU's memory is the largest there?
#
# **Equation** (`minglm/plan/speed.py`, `minglm/plan/memory.py`)
#
#     seconds = max(products + exchange of tokens, gathering of weights);   the first grows with tokens, the second does not
#     bytes   = 4 (weights + gradients + moments) / ranks  +  activations of a GPU's tokens  +  the layer that is gathered

# %%
import multiprocessing
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from minglm import lesson
from minglm.config import Layout, OptimizerConfig, ParallelConfig, load_config
from minglm.data.packing import Batch
from minglm.model.glm import GLM
from minglm.parallel import parallelize
from minglm.parallel.mesh import build_meshes
from minglm.parallel.pipeline import own_model
from minglm.parallel.shard import materialize, shard
from minglm.parallel.workers import gathered
from minglm.parallel.world import World
from minglm.plan import speed, summary
from minglm.plan.gpus import GPUS
from minglm.plan.memory import GIB
from minglm.report import drawing
from minglm.train.loop import Phase, accumulate

CONFIGS = Path(__file__).parent.parent / "configs"
H100 = GPUS["h100"]
MODEL = replace(lesson.NANO, num_nextn_predict_layers=1)
LAYOUTS = {
    "weights (FSDP)": Layout(1, 1, 2, 1, 1),
    "experts (EP)": Layout(1, 1, 2, 2, 1),
    "positions (CP)": Layout(1, 1, 2, 1, 2),
    "layers (PP)": Layout(2, 1, 1, 1, 1),
    "copies (HSDP)": Layout(1, 2, 1, 1, 1),
}
FAULT = 4e-6
"""Difference above which the contract of layouts finds a fault (`minglm.testing.parallel`): float32 rounds to less."""
LADDER = ["nano.py", "toy.py", "mini.py", "flash_30b.py:h100x8", "air_106b.py:h100x64"]
LADDER += ["glm45_355b.py:h100x256", "glm45_355b.py:h100x512"]
SHADES = {1: "#8c8c96", 8: "#1f5fa8", 16: "#55958c", 32: "#c2571a", 64: "#9a5ba3"}
BETWEEN = {2: "#d98200", 4: "#5aa9e6"}
"""Expert parallelism of layouts only."""
MARKERS = {1: "o", 2: "s", 4: "^", 8: "D"}
"""Of layouts with so many copies."""
TERMS = {
    "weights": "#1f5fa8",
    "gradients": "#4c78a8",
    "muon": "#6f9fd0",
    "adamw": "#a9c8e8",
    "working copies": "#2f8f83",
    "activations": "#d98200",
    "exchange": "#f0a830",
    "head": "#9a5ba3",
}
SIZES = {"rows": 4, "length": 64, "tokens": [2**power for power in range(10, 17)], "gpus": 512}
SMOKE = SIZES | {"rows": 2, "length": 16, "tokens": [4096, 16384], "gpus": 64}

# %% [markdown]
# ## The lines that matter
# `main` prints them from minglm: how a model is sharded (`shard`), and how the time of a step is added up (`step_time`).
#
# ## Experiment 1: two ranks against one
# Two processes on this machine talk by gloo. Each reads its part of the batch; their gradients, gathered, are compared
# with those of one process, parameter by parameter. The loss alone would not do: under Adam a gradient of the wrong size
# trains almost as well, and shows in nothing but the norm.


# %%
def a_phase(length):
    """Return what `accumulate` needs to know: MTP and balance losses with their weights, micro-batches of one row."""
    return Phase(
        name="lesson",
        tokens=0,
        start=0,
        sequence_length=length,
        learning_rate=lambda seen: 0.0,
        batch_tokens=lambda seen: 0,
        mtp_weight=lambda seen: 0.3,
        bias_rate=lambda seen: 0.0,
        balance_weight=1e-4,
        optimizer=OptimizerConfig(microbatch_tokens=length),
    )


def a_batch(rows, length, seed):
    """Return rows of random tokens."""
    random = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(MODEL.vocab_size, (rows, length), generator=random)
    return Batch(tokens_BS, torch.ones_like(tokens_BS, dtype=torch.bool))


def gradients(rows, length, seed, layout=None):
    """Return the gradient of every parameter on one batch: of one process, or of those that this rank of a layout has."""
    model = GLM(MODEL, seed)
    workers = None
    if layout is not None:
        meshes = build_meshes(layout, "cpu")
        model = own_model(MODEL, meshes)
        shard(model, meshes, ParallelConfig())
        materialize(model, torch.device("cpu"), seed)
        workers = parallelize(model, world=World(torch.device("cpu")), meshes=meshes)
    accumulate(model, a_batch(rows, length, seed), a_phase(length), 0.3, workers)
    return {name: gathered(p.grad) for name, p in model.named_parameters()}


def be_rank(rank, store, results, jobs):
    """Be one of two ranks: compute the gradients of every job, and send them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for number, job in enumerate(jobs):
        found = gradients(*job)
        results.put((number, {name: gradient.numpy() for name, gradient in found.items()}))
    dist.barrier()
    dist.destroy_process_group()


def two_ranks(jobs):
    """Start two processes; return the gradients of each job."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=be_rank, args=(rank, f"{folder}/store", results, jobs))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        found = [{} for _ in jobs]
        for _ in range(2 * len(jobs)):
            number, part = results.get(timeout=200)
            found[number] |= part  # the same from both ranks, or other layers
        for process in processes:
            process.join()
    return found


def differences(sizes, seeds):
    """Return {layout: the largest difference of a gradient over the largest gradient, by seed and parameter}."""
    jobs = [
        (sizes["rows"], sizes["length"], seed, layout)
        for layout in LAYOUTS.values()
        for seed in range(seeds)
    ]
    answers = iter(two_ranks(jobs))
    apart = {}
    for name in LAYOUTS:
        apart[name] = []
        for seed in range(seeds):
            theirs = next(answers)
            ours = gradients(sizes["rows"], sizes["length"], seed)
            apart[name].append(
                [
                    float(np.abs(theirs[key] - own.numpy()).max() / own.abs().max())
                    for key, own in ours.items()
                    if own.abs().max() > 0
                ]
            )
    return apart


# %% [markdown]
# ## Experiment 2: where memory and time go
# All of it is arithmetic on data sheets, for experts with equal loads: expected, and not measured. Memory by term from
# `nano` to 512 GPUs; the bound on the utilisation for tokens a GPU and ranks that divide the experts; what binds; and
# every layout that fits.


# %%
def bounds(sizes):
    """Return a row for each number of expert ranks and of tokens a GPU: bound, what binds, share of the exchange."""
    rows = []
    for ep in SHADES:
        if sizes["gpus"] % ep:
            continue
        for tokens in sizes["tokens"]:
            run = load_config(
                CONFIGS / "glm45_355b.py",
                ["--parallel.ep", str(min(ep, 32)), "--optimizer.microbatch_tokens", str(tokens)],
            )
            layout = Layout(1, 1, sizes["gpus"], ep, 1)
            length = min(tokens, 4096)
            time = speed.step_time(run, layout, H100, length, recompute=True)
            exchange = sum(c.seconds for c in time.collectives if c.name == "exchange")
            rows.append(
                {
                    "ep": ep,
                    "tokens": tokens,
                    "bound": time.mfu_bound,
                    "binds": time.binds,
                    "exchange": exchange / time.microbatch,
                }
            )
    return rows


def experiment(sizes, seeds):
    """Return everything that the figure and the verdicts need."""
    ladder = []
    for name in LADDER:
        planned = summary.plan(load_config(CONFIGS / name), H100)
        stage = max(planned["stages"], key=lambda stage: stage["memory"]["total"])
        memory = {term: stage["memory"][term] / GIB for term in (*TERMS, "total")}
        ladder.append({"run": planned["run"], "gpus": planned["gpus"], "memory": memory})
    full = load_config(CONFIGS / "glm45_355b.py")
    layouts = [
        {
            "ep": candidate.layout.ep,
            "replicas": candidate.layout.dp_replicate,
            "days": candidate.days,
            "gib": candidate.memory / GIB,
        }
        for candidate in summary.search(full, H100, sizes["gpus"])
    ]
    return {
        "apart": differences(sizes, seeds),
        "ladder": ladder,
        "bounds": bounds(sizes),
        "layouts": layouts,
        "full_scale": {
            "exchange of GLM-4.5 with 16,384 tokens a GPU, GB of a micro-batch": round(
                sum(
                    c.bytes
                    for c in speed.collectives(full, Layout(1, 1, 512, 8, 1), H100, 4096, True)
                    if c.name == "exchange"
                )
                / 1e9
            )
        },
    }


# %% [markdown]
# ## Figure


# %%
def draw(log):
    """Draw the figure of a log."""
    figure, axes = drawing.canvas(2, 2, (11, 7.2))
    (apart, memory), (bound, layouts) = axes
    note = {"textcoords": "offset points", "fontsize": 8}

    # Two ranks against one: a point for each parameter; those that are equal lie at the bottom.
    for place, values in enumerate(log["apart"].values()):
        points = [max(value, 1e-9) for seed in values for value in seed]
        if max(points) == 1e-9:
            apart.annotate("the same bits", (place, 1e-9), (0, 6), ha="center", **note)
        spread = place + np.linspace(-0.25, 0.25, len(points))
        apart.plot(spread, points, ".", color="#1f5fa8", markersize=3, alpha=0.6)
    apart.axhline(FAULT, color="#c2571a", linewidth=1)
    apart.annotate("a fault", (0, FAULT), (0, 4), color="#c2571a", **note)
    apart.set_xticks(range(len(log["apart"])), [name.replace(" (", "\n(") for name in log["apart"]])

    # Memory of a GPU by term.
    for row, rung in enumerate(log["ladder"]):
        left = 0.0
        for term, shade in TERMS.items():
            width = rung["memory"][term]
            label = term if row == 0 else None
            memory.barh(row, width, left=left, color=shade, height=0.6, label=label)
            left += width
    memory.set_yticks(
        range(len(log["ladder"])), [f"{rung['run']}, {rung['gpus']}" for rung in log["ladder"]]
    )
    memory.invert_yaxis()
    memory.axvline(72, color=drawing.INK, linewidth=1.2)
    memory.legend(frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.6, 1.0))

    # The bound, by tokens a GPU; a filled point where gathering binds.
    for ep, shade in SHADES.items():
        rows = [row for row in log["bounds"] if row["ep"] == ep]
        if not rows:
            continue
        x = [row["tokens"] for row in rows]
        y = [100 * row["bound"] for row in rows]
        bound.plot(x, y, "-", color=shade, linewidth=1.5)
        gathers = [row["binds"] == "gathering weights" for row in rows]
        bound.plot(np.array(x)[gathers], np.array(y)[gathers], "o", color=shade, markersize=4)
        beside = {32: 4, 64: -4}.get(ep, 0)  # these two end near each other
        bound.annotate(f"EP {ep}", (x[-1], y[-1]), (4, beside), color=shade, va="center", **note)

    # Every layout that fits: colour for the ranks of an expert's group, marker for copies.
    shades = SHADES | BETWEEN
    for row in log["layouts"]:
        marker = MARKERS[row["replicas"]]
        layouts.plot(row["gib"], row["days"], marker, color=shades[row["ep"]], markersize=6)
    for ep in sorted({row["ep"] for row in log["layouts"]}):
        layouts.plot([], [], "o", color=shades[ep], label=f"EP {ep}")
    for copies in sorted({row["replicas"] for row in log["layouts"]}):
        name = "one copy" if copies == 1 else f"{copies} copies"
        layouts.plot([], [], MARKERS[copies], color=drawing.INK, label=name)
    if log["layouts"]:
        layouts.legend(frameon=False, fontsize=8, ncols=3, loc="center", bbox_to_anchor=(0.5, 0.45))
    layouts.axvline(72, color=drawing.INK, linewidth=1.2)

    gpus = log["sizes"]["gpus"]
    lesson.panel(
        apart,
        "Gradients of two ranks against one, by parameter",
        "",
        "difference / largest",
        yscale="log",
        ylim=(5e-10, 1e-4),
    )
    lesson.panel(memory, "Memory of a GPU, estimate (line: usable)", "GiB", "")
    lesson.panel(
        bound,
        f"Bound on the MFU, {gpus} H100s, expected (dots: gathering binds)",
        "tokens of a GPU's micro-batch",
        "% of the peak",
        xscale="log",
        ylim=(0, 50),
    )
    bound.set_xticks(log["sizes"]["tokens"], [f"{t // 1024}K" for t in log["sizes"]["tokens"]])
    bound.set_xticks([], minor=True)
    lesson.panel(layouts, f"Every layout of {gpus} that fits, expected", "GiB a GPU", "days")
    return figure


# %% [markdown]
# ## What would prove us wrong
# `verdicts` reads the log, and each claim can come out False.
#
# Measured (3 seeds, two processes on two CPU cores): the gradients of two ranks are those of one to 1e-6 of the largest,
# which is float32's rounding in another order; with the layers on two ranks the order is the same, and so is every bit.
# Division by ranks, or a lost row, would be off by a factor. The rest is arithmetic. With 4,096 tokens a GPU gathering the
# weights over the network takes longer than everything else: 12% of the peak. With 16,384 it hides behind products, and the
# exchange on NVLink is what is left: 32%. Over 32 ranks tokens leave the node, and more than half of the time is spent on
# the way: 17%. **Unexpected:** from 16,384 tokens on no expert parallelism at all is the best by this arithmetic, 38%,
# because the eight GPUs of a node then share the work of gathering. It needs 70 of 72 GiB, and products that do not slow
# down while 30 GB a layer arrive: nobody has measured that here.
#
# ## Exercise
# In `shard`, delete the line with `set_gradient_divide_factor` and run this lesson again: which layouts change, and by what
# factor? Then look at the loss: does it show? Check: `pytest tests/parallel` names every parameter. Second: what would a
# network card of 100 GB/s change? (`minglm/plan/gpus.py`, one number.) Check: the dots of EP 8 move one place to the left.
#
# ## At full scale
# `python -m minglm launch configs/glm45_355b.py:h100x512 --dry-run` builds the whole model, shards it over 512 ranks in
# this one process and runs a step without numbers: it counts what this lesson estimates.


# %%
def verdicts(log):
    """Return {claim: whether the log supports it}."""
    worst = max(value for seeds in log["apart"].values() for seed in seeds for value in seed)
    at = {(row["ep"], row["tokens"]): row for row in log["bounds"]}
    few, many = at[8, 4096], at[8, 16384]
    last = log["ladder"][-1]
    largest = max(TERMS, key=lambda term: last["memory"][term])
    claims = [
        (f"two ranks give the gradients of one process, to {worst:.0e}", worst < FAULT),
        (
            f"EP 8 reaches {few['bound']:.0%} of the peak at most with 4,096 tokens a GPU, "
            f"{many['bound']:.0%} with 16,384",
            many["bound"] > 1.5 * few["bound"],
        ),
        (f"with 4,096 tokens {few['binds']} binds", few["binds"] == "gathering weights"),
        (f"the largest term on {last['gpus']} GPUs: {largest}", largest == "activations"),
    ]
    if (32, 16384) in at:
        away = at[32, 16384]
        claims.append(
            (
                f"EP 32 leaves the node: {away['bound']:.0%}, {away['exchange']:.0%} of the time on the way",
                away["bound"] < many["bound"],
            )
        )
    return {claim: bool(holds) for claim, holds in claims}


def main(argv=None):
    """Run the experiment, or only redraw its figure, and print what it shows."""
    shown = [shard, speed.step_time]
    lesson.Lesson("19_scale", experiment, draw, verdicts, shown, SIZES, SMOKE, MODEL).main(argv)


if __name__ == "__main__":
    main()
