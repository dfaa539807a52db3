"""How fast a training step is beside transformers' model of the same weights (no counterpart in the paper).

    share of the floor = time that the matrix products of our step take alone / time of the step

Both sides start from the same weights, take the same batches in turns, on one thread, and use the same optimizer, our
Muon; that their first losses agree is checked. The MTP layer is off, because transformers ignores it. In bfloat16 both
keep float32 weights: ours casts where it multiplies, transformers trains under autocast, and beside that once with all
of its weights in bfloat16, which is faster and learns worse. On a CPU without bfloat16 products ours computes in
float32, as a run does there (`minglm.common.device.pick_dtype`), and the record says so. Every step sees another batch, as in
training: products in bfloat16 are compiled for their shapes, and the experts' loads are new each time.

Seconds are those of the processor, which a machine that does other work meanwhile spoils least; the best of the turns
counts. The optimizer is timed apart, since transformers joins gate and up to one matrix, for which Muon has more to do.
Memory is the growth of the process over two steps of a fresh one, activations, gradients and temporaries.
"""

import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minglm.common.device import pick_dtype
from minglm.common.threads import use_threads
from minglm.data.packing import Batch
from minglm.model.glm import GLM
from minglm.optim.muon import Muon
from minglm.report import drawing
from minglm.train.loop import Phase, step

LAYOUTS = {"rows of 128": (128, 0), "rows of 1024, documents of 85": (1024, 85)}
"""Positions of a row, and tokens of each packed document (0: one text)."""
SIDES = (
    ("minglm", "float32"),
    ("transformers", "float32"),
    ("minglm", "bfloat16"),
    ("transformers", "bfloat16"),
    ("transformers", "bfloat16 weights"),
)
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


def drawn_batch(seed, vocabulary, tokens, length, document):
    """`tokens` random tokens in rows of `length`; with documents, their bounds lie elsewhere in each row and seed."""
    draw = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(vocabulary, (max(1, tokens // length), length), generator=draw)
    mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    mask_BS[:, 0] = False
    if not document:
        return Batch(tokens_BS, mask_BS)
    at_BS = torch.arange(length) + torch.randint(document, (len(tokens_BS), 1), generator=draw)
    documents_BS, inside_BS = at_BS // document, at_BS % document
    inside_BS = torch.where(documents_BS == documents_BS[:, :1], torch.arange(length), inside_BS)
    return Batch(tokens_BS, mask_BS & (inside_BS > 0), documents_BS.int(), inside_BS)


def ours(model, config, dtype):
    """(optimizer, function that takes one training step on a batch and returns its loss)."""
    model.dtype, optimizer = pick_dtype(dtype, torch.device("cpu")), Muon(model, config.optimizer)
    constant = {"learning_rate": 1e-3, "mtp_weight": 0.0, "bias_rate": 1e-3, "batch_tokens": 0}
    schedules = {name: lambda seen, value=value: value for name, value in constant.items()}
    one_batch = dataclasses.replace(config.optimizer, microbatch_tokens=2**30)
    phase = Phase("bench", 0, 0, 0, balance_weight=0.0, optimizer=one_batch, **schedules)
    phases = {
        length: dataclasses.replace(phase, sequence_length=length) for length, _ in LAYOUTS.values()
    }
    return (
        optimizer,
        lambda batch: step(model, optimizer, batch, phases[batch.tokens_BS.shape[1]], 0).loss,
    )


def theirs(model, config, dtype):
    """The same of transformers, its model built from the weights of ours."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise ValueError(
            "bench train compares with transformers: pip install transformers"
        ) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, "float32")
        kept = torch.bfloat16 if dtype == "bfloat16 weights" else torch.float32
        twin = AutoModelForCausalLM.from_pretrained(folder, dtype=kept).train()
    optimizer = Muon(twin, config.optimizer)

    def run(batch):
        labels_BS = batch.tokens_BS.masked_fill(~batch.mask_BS, -100)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            out = twin(
                batch.tokens_BS, labels=labels_BS, position_ids=batch.positions_BS, use_cache=False
            )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        optimizer.zero_grad()
        return out.loss.item()

    return optimizer, run


def build(side, config):
    """(optimizer, step) of one of SIDES, from weights that are the same for all."""
    name, dtype = side
    model = GLM(dataclasses.replace(config.model, num_nextn_predict_layers=0))
    return (ours if name == "minglm" else theirs)(model, config, dtype)


class Products(TorchDispatchMode):
    """Counts the matrix products that run inside it, by shapes, strides and dtype."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket.__name__ in PRODUCTS:
            a, b = (
                arguments[:2] if "add" not in function.overloadpacket.__name__ else arguments[1:3]
            )
            self.calls[tuple((tuple(x.shape), x.stride(), x.dtype) for x in (a, b))] += 1
        return function(*arguments, **keywords or {})


def floor(run, batch, repeats):
    """Seconds that the matrix products of a step take when nothing else is done."""
    with Products() as found:
        run(batch)
    total = 0.0
    for key, count in found.calls.items():
        a, b = (
            torch.empty_strided(shape, stride, dtype=dtype).normal_()
            for shape, stride, dtype in key
        )
        seconds = []
        for _ in range(repeats + 2):
            began = time.process_time()
            a @ b
            seconds.append(time.process_time() - began)
        total += count * min(seconds)
    return total


def memory(side, config, batch):
    """Bytes by which two steps make a fresh process grow, at their peak (Linux)."""
    use_threads(1)
    _, run = build(side, config)

    def status(name):
        return int(Path("/proc/self/status").read_text().split(name)[1].split()[1]) * 1024

    before = status("VmRSS")
    run(batch), run(batch)
    return status("VmHWM") - before


def turns(sides, batches):
    """Seconds of each step and of the optimizer in it, sides taking turns: {side: [(step, optimizer)]}."""
    seconds, inside = {side: [] for side in sides}, []
    for optimizer, _ in sides.values():
        optimizer.register_step_pre_hook(lambda *_: inside.append(-time.process_time()))
        optimizer.register_step_post_hook(lambda *_: inside.append(time.process_time()))
    for batch in batches:
        for side, (_, run) in sides.items():
            inside.clear()
            began = time.process_time()
            run(batch)
            seconds[side].append((time.process_time() - began, sum(inside)))
    return seconds


def train(config, options):
    """Tokens a second of a training step of minglm and of transformers, in float32 and bfloat16, for each layout.

    config: a RunConfig whose model fits in memory several times. options: `repeats`, turns of each side, and `tokens`, of a
    batch. Returns the record. Raises ValueError without transformers, and where the two sides' losses differ.
    """
    use_threads(1)
    record = {"threads": 1, "tokens": options.train_tokens, "results": []}
    record["bfloat16_products"] = pick_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    for layout, (length, document) in LAYOUTS.items():
        sizes = (config.model.vocab_size, options.train_tokens, length, document)
        sides = {side: build(side, config) for side in SIDES}
        first = {
            side: run(drawn_batch(0, *sizes)) for side, (_, run) in sides.items()
        }  # also warms up
        for (_, dtype), loss in first.items():
            if abs(loss - first[SIDES[0]]) > (1e-4 if dtype == "float32" else 0.05) * loss:
                raise ValueError(
                    f"{layout}, {dtype}: the losses differ, so the speeds mean nothing: {first}"
                )
        found = turns(sides, [drawn_batch(seed, *sizes) for seed in range(1, 1 + options.repeats)])
        for side, pairs in found.items():
            whole, update = min(s for s, _ in pairs), min(u for _, u in pairs)
            row = {
                "layout": layout,
                "side": side[0],
                "dtype": side[1],
                "seconds": whole,
                "optimizer_seconds": update,
            }
            row["median_seconds"] = statistics.median(s for s, _ in pairs)
            row["tokens_per_second"] = options.train_tokens / whole
            if (
                side[0] == "minglm"
            ):  # transformers' attention and grouped products are whole operations, not products
                row["floor_seconds"] = floor(
                    sides[side][1], drawn_batch(1, *sizes), options.repeats
                )
                row["share_of_floor"] = row["floor_seconds"] / whole
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row["memory_bytes"] = pool.apply(memory, (side, config, drawn_batch(0, *sizes)))
            record["results"].append(row)
            print(
                *(f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in row.items()), flush=True
            )
    record["ratios"] = ratios(record["results"])
    print(record["ratios"])
    return record


def ratios(results):
    """Speed of ours over transformers' for each layout and dtype; in bfloat16 over its faster form."""
    found = {}
    for layout in LAYOUTS:
        rows = [row for row in results if row["layout"] == layout]
        for mine in (row for row in rows if row["side"] == "minglm"):
            others = [
                r
                for r in rows
                if r["side"] == "transformers" and r["dtype"].startswith(mine["dtype"])
            ]
            other = min(others, key=lambda r: r["seconds"])
            without = (row["seconds"] - row["optimizer_seconds"] for row in (other, mine))
            found[f"{layout}, {mine['dtype']}"] = {
                "step": round(other["seconds"] / mine["seconds"], 3),
                "median": round(other["median_seconds"] / mine["median_seconds"], 3),
                "forward_backward": round(next(without) / next(without), 3),
                "memory": round(mine["memory_bytes"] / other["memory_bytes"], 3),
                "against": other["dtype"],
            }
    return found


def draw_train(record, axis):
    """Tokens a second of each side, with the speed of its matrix products alone as an outline."""
    results = record["results"]
    for at, row in enumerate(reversed(results)):
        shade = "#1f5fa8" if row["side"] == "minglm" else "#c2571a"
        axis.barh(at, row["tokens_per_second"], color=shade, alpha=0.85, height=0.6)
        if "floor_seconds" in row:
            axis.barh(
                at,
                record["tokens"] / row["floor_seconds"],
                color="none",
                edgecolor=drawing.PALE,
                height=0.6,
            )
    names = [f"{row['side']}, {row['dtype']}\n{row['layout']}" for row in reversed(results)]
    axis.set_yticks(range(len(results)), names, fontsize=7)
    note = (
        ""
        if record["bfloat16_products"]
        else "\nthis CPU has no bfloat16 products: ours computes in float32"
    )
    axis.set(xlabel="tokens a second, one thread; outline: our matrix products alone" + note)
    axis.grid(axis="y", visible=False)
    drawing.title(axis, "A training step, optimizer included")
