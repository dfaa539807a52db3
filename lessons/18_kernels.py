# %% [markdown]
# # 18 Kernels: how far can you trust a GPU kernel on a laptop?
#
# A Triton kernel (`minglm/kernels/*/triton_*.py`) is written for one tile of the result; a GPU runs thousands of its
# programs at a time. Four things can be checked without a GPU: the numbers, because Triton's interpreter runs the
# programs one after another in numpy; which program stores what, by watching them; what the compiler produces for an
# H100; and how fast the kernel can be at best, by counting. What remains unknown is its time, how the units of a GPU
# round their sums, and what else they require: in the first run on an H100 (`figures/bench_kernels.png`; `LOG.md` says
# what went wrong) one kernel of thirty crashed, because its copies began at odd multiples of 64 bytes.
#
# **Your prediction.** Write down first: (1) The interpreter has a bug: it multiplies bfloat16 wrongly. By how much is it
# off, and what does it report? (2) Once patched, how does the error of a sum of 32, 256, 2,048 products grow in float32,
# float16 and bfloat16? (3) How many times less memory does the loss of 2,048 tokens over a vocabulary of 8,192 need when
# it is computed in chunks? (4) Up to how many tokens is GLM-4.5's expert layer bound by memory, however good its kernel?
#
# **Equation** (the layers are those of paper 2.1; kernels have no section)
#
#     |result - exact| <= u |exact| when rounded once, u = 2^-24 (float32), 2^-11 (float16), 2^-8 (bfloat16)
#     seconds >= max(operations / products per second, bytes / bytes per second)

# %%
import importlib
import itertools
import json
import os
import sys
from unittest.mock import patch

# Before anything imports triton, as parts of torch do: triton reads it when a kernel is defined.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from tqdm import tqdm

from minglm import lesson
from minglm.config import ModelConfig
from minglm.kernels.cross_entropy import linear_cross_entropy
from minglm.kernels.cross_entropy.eager import cross_entropy
from minglm.kernels.dispatch import installed
from minglm.kernels.toolchain import compile_check, interpreter
from minglm.kernels.toolchain.tiles import Tiles
from minglm.plan.counts import unit_counts
from minglm.report import drawing

ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SHADES = {"float32": "#55958c", "float16": "#1f5fa8", "bfloat16": "#c2571a"}
MARKS = {"grouped product": "o", "attention": "s", "log-probability": "^", "norm": "D"}
PROGRAMS = ["#1f5fa8", "#c2571a", "#55958c", "#b8b8c0"]
# An H100's data sheet, not measured.
PEAK = 989e12  # bfloat16 operations per second
COPIED = 3.35e12  # bytes per second
LOSSES = {"full logits": cross_entropy, "in chunks": linear_cross_entropy}
NAMES = {"moe": "expert layer", "attention": "attention", "linear_cross_entropy": "head and loss"}
GARBAGE = 1e9  # stands for "not a number" and for a crash
SIZES = {
    "sums": [32, 256, 2048],
    "trap": 256,
    "tokens": [512, 1024, 2048],
    "words": 8192,
    "width": 64,
}
SIZES |= {"loads": [37, 1, 0, 23, 29, 6], "outputs": 256}
SMOKE = SIZES | {
    "sums": [32, 64],
    "trap": 32,
    "tokens": [64, 256],
    "words": 512,
    "width": 16,
    "outputs": 128,
}

# %% [markdown]
# ## The lines that matter
# `main` prints them from minglm itself: how a kernel finds its tile (`locate`) and reads it with offsets that do not
# overflow (`load_tile`); how the interpreter is patched and its stores watched; which limits the compiled code must keep.
#
# ## Experiment
# Four kernels run in three dtypes, over sums of three lengths, and are compared with float64; in bfloat16 also before the
# interpreter is patched. Then we measure the memory of the loss, watch the stores of a grouped product, and read what
# was compiled and counted.


# %%
def operations(size, kind, seed):
    """Return {name: (a kernel without arguments, its exact result in float64)}: sums of `size` numbers of dtype `kind`."""
    from minglm.kernels.attention.triton_layer import flash_attention_triton
    from minglm.kernels.cross_entropy.triton_kernel import log_probabilities_triton
    from minglm.kernels.experts.triton_layer import product
    from minglm.kernels.norm.triton_kernel import add_norm_triton

    random = torch.Generator().manual_seed(seed)
    ends = torch.tensor([10, 10, 24], dtype=torch.int32)  # the second expert has no rows

    def drawn(*shape, scale=1.0):
        x = torch.randn(*shape, generator=random).mul(scale).to(kind)
        return x, x.double()

    # A capital letter is the same tensor in float64.
    x, X = drawn(24, size)
    w, W = drawn(3, 64, size, scale=size**-0.5)
    v, V = drawn(1, size, 1, 64)
    head, HEAD = drawn(256, size, scale=size**-0.5)
    q, Q = drawn(1, size, 1, 64)
    k, K = drawn(1, size, 1, 64)
    rows = torch.arange(24)
    future = torch.full((size, size), -torch.inf).triu(1)
    scores = Q[0, :, 0] @ K[0, :, 0].T / 8 + future
    log_p = (X @ HEAD.T).log_softmax(1)
    return {
        "grouped product": (
            lambda: product([(x, w)], rows, ends, 1, pick=False, transposed=True),
            torch.cat([X[:10] @ W[0].T, X[10:] @ W[2].T]),
        ),
        "attention": (
            lambda: flash_attention_triton(q, k, v)[0, :, 0],
            scores.softmax(1) @ V[0, :, 0],
        ),
        "log-probability": (
            lambda: log_probabilities_triton(x, head, rows)[0],
            log_p[rows, rows],
        ),
        "norm": (
            lambda: add_norm_triton(x, torch.ones(size), 0.0)[0],
            X / X.square().mean(1, keepdim=True).sqrt(),
        ),
    }


def errors(kind, sizes, seed):
    """Measure the largest error of each kernel, as a share of the largest exact number."""
    rows = []
    for size in sizes:
        for name, (kernel, exact) in operations(size, getattr(torch, kind), seed).items():
            try:
                away = float((kernel().double() - exact).abs().max() / exact.abs().max())
            except (
                Exception
            ):  # an unpatched interpreter may also crash, in its own ways in each release
                away = GARBAGE
            away = away if away < GARBAGE else GARBAGE
            rows.append({"kind": kind, "size": size, "kernel": name, "seed": seed, "error": away})
    return rows


def memory(sizes):
    """Measure the peak bytes of the loss with its gradients, beyond the gradients themselves, in bfloat16."""

    def gradients(loss, x, head, *rest):
        return torch.autograd.grad(loss(x, head, *rest), (x, head))

    V = sizes["words"]
    D = sizes["width"]
    rows = []
    for T, (name, loss) in itertools.product(sizes["tokens"], LOSSES.items()):
        x = torch.randn(T, D).bfloat16().requires_grad_()
        head = torch.randn(V, D).bfloat16().requires_grad_()
        peak = lesson.peak_bytes(gradients, loss, x, head, torch.arange(T) % V, torch.ones(T))
        rows.append({"form": name, "tokens": T, "bytes": peak - x.nbytes - head.nbytes})
    return rows


def stored(sizes):
    """Return every store of a grouped product (program, box of its tile), and how often elements are stored."""
    from minglm.kernels.experts import triton_layer as layer

    loads = torch.tensor(sizes["loads"])
    ends = loads.cumsum(0).int()
    R = int(loads.sum())
    D = 64
    F = sizes["outputs"]
    gate = torch.randn(len(loads), F, D).half()
    x = torch.randn(R, D).half()
    order = torch.arange(R)
    weights = torch.ones(R, 1)
    # One form of the kernel, run by as many programs as there are colours.
    tile = Tiles(16, 64, 64, 4, 2)
    changed = {"UP": {2**31: tile}, "programs": lambda x, each=1: len(PROGRAMS)}
    with patch.multiple(layer, **changed), interpreter.watched() as stores:
        h, _, _ = layer.up(x, order, weights, ends, gate, gate, save=False)
    counts = np.zeros((R, F), dtype=int)
    tiles = []
    for program, addresses, mask in stores:
        # An address says which element of h it is.
        elements = (addresses[mask].astype(np.int64) - h.data_ptr()) // h.element_size()
        rows, columns = np.divmod(elements, F)
        np.add.at(counts, (rows, columns), 1)
        box = [rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1]
        tiles.append({"program": int(program[0]), "box": [int(value) for value in box]})
    return {
        "tiles": tiles,
        "ends": ends.tolist(),
        "stores of an element": sorted(set(counts.flatten().tolist())),
    }


def counted():
    """Count the operations and bytes of the cases of `bench kernels`, at GLM-4.5's sizes."""
    found = {name: importlib.import_module(f"minglm.bench.cases.{name}") for name in NAMES}
    return [
        {"operation": name, "case": c.name, "flops": c.flops, "bytes": c.bytes}
        for name, module in found.items()
        for c in module.cases(torch.device("cpu"), False)
    ]


def experiment(sizes, seeds):
    """Make all measurements. The first need an interpreter that is not patched yet, so this runs once in a process."""
    trap = [row for seed in range(seeds) for row in errors("bfloat16", [sizes["trap"]], seed)]
    interpreter.patch_interpreter()
    cells = [(kind, seed) for seed in range(seeds) for kind in ROUNDING]
    patched = [
        row for kind, seed in tqdm(cells, disable=None) for row in errors(kind, sizes["sums"], seed)
    ]
    compiled = json.loads((lesson.FIGURES / "bench_compile.json").read_text(encoding="utf-8"))[
        "kernels"
    ]
    log = {"trap": trap, "errors": patched, "memory": memory(sizes), "product": stored(sizes)}
    return log | {"compiled": compiled, "counted": counted(), "full_scale": full_scale()}


# %% [markdown]
# ## At full scale
# These are GLM-4.5's layers (`configs/glm45_355b.py`) at 16,384 tokens, with 160 experts on one GPU. The expert rows
# exceed 2^31 elements at 52,429 tokens: with 32-bit offsets, a kernel that passes every small test then reads the wrong
# memory. The test that finds this on a laptop allocates the full tensor but touches only one tile of it.


# %%
def full_scale():
    """Return bytes and bounds, from the config and the formulas."""
    c = ModelConfig()
    logits = 4 * 16_384 * c.vocab_size  # bytes
    numbers_per_token = c.num_experts_per_tok * c.hidden_size  # in the rows of its experts
    layer = next(row for row in counted() if "forward, 16384 tokens, 8 of 160" in row["case"])
    by_products = 1e3 * layer["flops"] / PEAK
    by_bytes = 1e3 * layer["bytes"] / COPIED
    return {
        "gigabytes of 16,384 tokens' logits in float32": round(logits / 1e9, 1),
        "tokens whose expert rows pass 2^31 numbers": 2**31 // numbers_per_token + 1,
        "expert layer forward, least milliseconds for its products": round(by_products, 1),
        "expert layer forward, least milliseconds for its bytes": round(by_bytes, 1),
    }


# %%
def draw(log):
    """Draw the figure from the log alone."""
    figure, ((sums, trap, memory), (product, roof, code)) = drawing.canvas(2, 3, (13.5, 8))
    sizes = log["sizes"]
    note = {"textcoords": "offset points", "fontsize": 7}

    # Errors by the length of the sum.
    for kind, shade in SHADES.items():
        sums.axhline(ROUNDING[kind], color=shade, linewidth=0.8, linestyle=":")
        sums.annotate(
            f"u of {kind}", (0.4 * sizes["sums"][0], ROUNDING[kind]), (0, 3), color=shade, **note
        )
        for i, (name, mark) in enumerate(MARKS.items()):  # beside each other
            rows = [r for r in log["errors"] if (r["kind"], r["kernel"]) == (kind, name)]
            x = [r["size"] * 1.12 ** (i - 1.5) for r in rows]
            sums.plot(x, [r["error"] for r in rows], mark, color=shade, markersize=4, alpha=0.6)
    sums.legend(
        handles=sums.lines[1:5], labels=list(MARKS), frameon=False, fontsize=7, loc=(0.6, 0.4)
    )

    # Errors in bfloat16, before and after patching.
    states = ((PROGRAMS[1], "as it is", log["trap"]), (PROGRAMS[0], "patched", log["errors"]))
    for column, name in enumerate(MARKS):
        for shade, state, rows in states:
            values = [r["error"] for r in rows if (r["kernel"], r["kind"]) == (name, "bfloat16")]
            label = None if column else state
            x = [column] * len(values)
            trap.plot(x, values, "_", color=shade, markersize=16, label=label)
    trap.annotate("not a number, or more", (0, GARBAGE), (-12, 6), **note)
    trap.set_xticks(range(4), [name.replace(" ", "\n").replace("-", "-\n") for name in MARKS])
    trap.legend(frameon=False, fontsize=8, loc=(0.7, 0.6))

    # Memory of the loss.
    for shade, form in zip(PROGRAMS[1::-1], LOSSES):
        rows = [r for r in log["memory"] if r["form"] == form]
        tokens = [r["tokens"] for r in rows]
        mebibytes = [r["bytes"] / 2**20 for r in rows]
        lesson.curve(memory, tokens, [mebibytes], form, shade, style="o-")
    memory.set(xlim=(0, 1.5 * sizes["tokens"][-1]), ylim=(0, None))
    draw_tiles(product, log)

    # The roofline, and where the cases of the benchmark lie on it.
    intensity = np.geomspace(0.5, 1e5, 100)
    roof.plot(intensity, np.minimum(PEAK, intensity * COPIED) / 1e12, color=drawing.PALE)
    for shade, (name, label) in zip(PROGRAMS, NAMES.items()):
        x = np.array([r["flops"] / r["bytes"] for r in log["counted"] if r["operation"] == name])
        y = np.minimum(PEAK, x * COPIED) / 1e12
        roof.plot(x, y, "o", color=shade, markersize=4, alpha=0.6, label=label)
    roof.annotate("decoding", (3, 3 * COPIED / 1e12), (8, -8), **note)
    roof.legend(frameon=False, fontsize=8, loc="lower right")

    # Registers and shared memory of every compiled kernel, and the most of both there is.
    for unit, shade in zip(("HGMMA", "QGMMA", ""), (PROGRAMS[0], PROGRAMS[1], PROGRAMS[3])):
        rows = [k for k in log["compiled"] if k["asked"]["unit"] == unit]
        registers = [k["registers"] for k in rows]
        shared = [k["shared_bytes"] / 1024 for k in rows]
        label = f"{unit or 'no products'}: {len(rows)}"
        code.plot(registers, shared, "o", color=shade, markersize=4, alpha=0.7, label=label)
    most = compile_check.SHARED_BYTES / 1024
    code.plot([0, 255, 255], [most, most, 0], color=drawing.PALE)
    code.legend(frameon=False, fontsize=8, loc=(0.02, 0.7))
    log_log = {"xscale": "log", "yscale": "log"}
    lesson.panel(
        sums, "Error in the patched interpreter", "numbers in a sum", "error / largest", **log_log
    )
    sums.set_xticks(sizes["sums"], sizes["sums"])
    sums.set_xticks([], minor=True)
    sums.set_xlim(0.3 * sizes["sums"][0], 2 * sizes["sums"][-1])
    lesson.panel(
        trap,
        "In bfloat16, before and after patching",
        "",
        "error / largest",
        yscale="log",
        ylim=(1e-8, 1e11),
    )
    lesson.panel(
        memory, "Memory of the loss with its gradients", "tokens", "MiB beyond inputs and results"
    )
    lesson.panel(
        roof, "Best possible on an H100 (data sheet)", "operations / byte", "TFLOP/s", **log_log
    )
    lesson.panel(
        code, "Every kernel, compiled for an H100", "registers of a thread", "KiB of shared memory"
    )
    return figure


def draw_tiles(axis, log):
    """Draw the tiles of a grouped product as stored, in their program's colour, numbered in its order."""
    outputs = log["sizes"]["outputs"]
    ends = log["product"]["ends"]
    turns = dict.fromkeys(range(len(PROGRAMS)), 0)
    for tile in log["product"]["tiles"]:
        program = tile["program"]
        turns[program] += 1
        row, column, height, width = tile["box"]
        # The four corners.
        x = (column, column + width, column + width, column)
        y = (row, row, row + height, row + height)
        axis.fill(x, y, color=PROGRAMS[program], alpha=0.6, edgecolor="white")
        centre = (column + width / 2, row + height / 2)
        axis.text(*centre, turns[program], ha="center", va="center", fontsize=6)
    begin = 0
    for expert, end in enumerate(ends):
        axis.plot([0, outputs], [end, end], color=drawing.INK, linewidth=1.2)
        name = f"expert {expert}" if begin < end else ""
        axis.text(outputs + 4, (begin + end) / 2, name, va="center", fontsize=7)
        begin = end
    below = "columns (colour: program, number: its turn)"
    lesson.panel(axis, "A grouped product, as stored", below, "rows by expert")
    axis.set(xlim=(0, 1.2 * outputs), ylim=(ends[-1], 0))
    axis.grid(False)


# %% [markdown]
# ## What would prove us wrong
# `verdicts` reads the log, and each claim can come out False.
#
# Measured (51 CPU-seconds, 3 seeds): before patching, products of bfloat16 are off by 10^8 and more, without an error or
# a warning. A norm, which has no product, has 1.7 times the error it should have: results are truncated, not rounded.
# That is the worse bug, because a tolerance written for bfloat16 lets it pass. Once patched, a result that is rounded
# once is off by less than u; log-probabilities of bfloat16 states by 1e-7, since no logit is ever rounded.
# **Wrong prediction:** float32's error grows 1.9 times where the root of the length says 8. A kernel adds 32 products
# at a time to its sum, so 2,048 products are 64 additions. (The interpreter cannot show how a tensor core adds.)
# The loss takes 12 times less memory in chunks, and no more for more tokens; at 16,384 tokens of GLM-4.5 one copy of
# the logits is 9.9 GB. The expert layer is bound by memory when decoding, and in training up to 4,096 tokens.
#
# ## Exercise
# Make `load_tile` multiply `matrix` as it is, without the cast to 64 bits, and run this lesson again: nothing changes.
# Then run `pytest tests/kernels/test_triton_experts.py -k 32_bits`, and explain the return code -11. Second: make every
# program of `up_kernel` walk over all tiles. All numbers stay right; which panel shows it? Check: an element is stored
# four times.


# %%
def verdicts(log):
    """Return {claim: whether the log supports it}."""
    sums = log["sizes"]["sums"]
    seeds = log["seeds"]
    u = ROUNDING["bfloat16"]
    # Errors once patched, and before.
    error = {(r["kernel"], r["kind"], r["size"], r["seed"]): r["error"] for r in log["errors"]}
    before = {name: [r["error"] for r in log["trap"] if r["kernel"] == name] for name in MARKS}
    garbage = min(min(before[name]) for name in MARKS if name != "norm")
    norm = min(
        old / error["norm", "bfloat16", log["sizes"]["trap"], seed]
        for seed, old in zip(seeds, before["norm"])
    )
    # The largest error of the seeds, by the length of the sum.
    product = {}
    for kind in ROUNDING:
        product[kind] = [
            max(error["grouped product", kind, size, seed] for seed in seeds) for size in sums
        ]
    root = (sums[-1] / sums[0]) ** 0.5
    growth = product["float32"][-1] / product["float32"][0]
    loss = max(error["log-probability", "bfloat16", size, seed] for size in sums for seed in seeds)
    # Memory of the loss, and the operations and bytes of the expert layer.
    held = {(r["form"], r["tokens"]): r["bytes"] for r in log["memory"]}
    few = log["sizes"]["tokens"][0]
    most = log["sizes"]["tokens"][-1]
    saved = held["full logits", most] / held["in chunks", most]
    layers = [r for r in log["counted"] if r["operation"] == "moe"]
    bound = [
        r["case"]
        for r in layers
        if r["flops"] / PEAK < r["bytes"] / COPIED and "160 experts, even" in r["case"]
    ]
    step = next(r["flops"] for r in layers if "backward, 16384 tokens, 8 of 160" in r["case"])
    planned = 6 * 16_384 * ModelConfig().num_experts_per_tok * unit_counts(ModelConfig())["expert"]
    faults = [fault for kernel in log["compiled"] for fault in compile_check.faults(kernel)]
    claims = [
        (
            f"before patching bfloat16 products are garbage, off by {garbage:.0e} times the largest or more",
            garbage > 1,
        ),
        (
            f"a norm, which has no products, is off by {norm:.1f} times its error once patched, or more",
            norm > 1.5,
        ),
        (
            f"once patched, a product is off by {max(product['bfloat16']) / u:.2f} u at most",
            max(product["bfloat16"]) <= u,
        ),
        (
            f"in float32 its error grows like the root of the sum's length, {root:.0f} times: {growth:.1f}",
            growth > root / 2,
        ),
        (
            f"log-probabilities of bfloat16 states are off by {loss:.0e}: they are never rounded to it",
            loss < u / 100,
        ),
        (
            f"the loss of {most} tokens takes {saved:.0f} times less memory in chunks, and no more for more tokens",
            saved > 4 and held["in chunks", most] < 1.2 * held["in chunks", few],
        ),
        (
            "every element of the grouped product is stored by one program, once",
            log["product"]["stores of an element"] == [1],
        ),
        (f"memory bounds these expert layers: {'; '.join(bound)}", bool(bound)),
        (
            "the benchmark counts as many operations of a training step of the experts as the planner",
            step == planned,
        ),
        (f"{len(log['compiled'])} kernels keep their budgets; nothing spills", not faults),
    ]
    return {claim: bool(holds) for claim, holds in claims}


def main(argv=None):
    """Run the experiment, or only redraw its figure, and print what it shows."""
    if not installed():
        sys.exit("lesson 18 runs Triton kernels: pip install triton (Linux)")
    from minglm.kernels.experts.triton_kernels import load_tile, locate

    shown = [
        locate.fn,
        load_tile.fn,
        interpreter.patch_interpreter,
        interpreter.watched,
        compile_check.faults,
    ]
    lesson.Lesson("18_kernels", experiment, draw, verdicts, shown, SIZES, SMOKE).main(argv)


if __name__ == "__main__":
    main()
