"""Measure a training step beside transformers' model of the same weights (no counterpart in the paper).

    share of the floor = time of the matrix products of our step alone / time of the step

Both sides start from the same weights, take the same batches in turns, on one thread, and use the same
optimizer, our Muon; the benchmark checks that their first losses agree. The MTP layer is off, because
transformers ignores it. In bfloat16 both keep float32 weights: ours casts where it multiplies, transformers
trains under autocast, and beside that once with all of its weights in bfloat16, which is faster and learns
worse. On a CPU without bfloat16 products ours computes in float32, as a run does there
(`minglm.common.device.pick_dtype`), and the record says it. Every step sees another batch, as in training:
products in bfloat16 are compiled for their shapes, and the experts' loads are new each time.

Seconds are CPU-seconds of the process, which a machine that does other work at the same time distorts least;
the best of the turns counts. The optimizer is timed apart, since transformers joins gate and up to one
matrix, for which Muon has more to do. Memory is the growth of a fresh process over two steps: activations,
gradients and temporaries.
"""

import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minglm.bench.options import BenchOptions
from minglm.common.allocator import keep_freed_memory
from minglm.common.device import pick_dtype
from minglm.common.threads import use_threads
from minglm.config.run import RunConfig
from minglm.data.packing import Batch
from minglm.model.glm import GLM
from minglm.optim.muon import Muon
from minglm.train.loop import Phase, step

LAYOUTS = {"rows of 128": (128, 0), "rows of 1024, documents of 85": (1024, 85)}
"""Positions of a row, and tokens of each packed document (0: one text)."""
LEARNING_RATE = 1e-3
LOSS_TOLERANCE = {"float32": 1e-4}  # relative; of the other dtypes:
LOW_PRECISION_TOLERANCE = 0.05
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


class Side(NamedTuple):
    """One of the implementations that are compared."""

    name: str
    """"minglm" or "transformers"."""
    dtype: str
    """"float32", "bfloat16" (float32 weights), or "bfloat16 weights"."""


SIDES = (
    Side("minglm", "float32"),
    Side("transformers", "float32"),
    Side("minglm", "bfloat16"),
    Side("transformers", "bfloat16"),
    Side("transformers", "bfloat16 weights"),
)


class Trainee(NamedTuple):
    """A model in training."""

    optimizer: torch.optim.Optimizer
    step: Callable[[Batch], float]
    """Takes one training step on a batch and returns its loss."""


class StepSeconds(NamedTuple):
    """CPU-seconds of one training step."""

    step: float
    optimizer: float
    """The part that the optimizer took."""


class Row(TypedDict):
    """One side in one layout, as the record holds it."""

    layout: str
    side: str
    dtype: str
    seconds: float
    """Of a whole step, best of the turns."""
    optimizer_seconds: float
    """Of the optimizer alone, best of the turns."""
    median_seconds: float
    """Of a whole step, median of the turns."""
    tokens_per_second: float
    floor_seconds: NotRequired[float]
    """Of the step's matrix products alone; of minglm only."""
    share_of_floor: NotRequired[float]
    """floor_seconds / seconds."""
    memory_bytes: int
    """Growth of a fresh process over two steps."""


class Ratio(TypedDict):
    """minglm against the faster form of transformers, in one layout and dtype; above 1 minglm is faster."""

    step: float
    median: float
    forward_backward: float
    """The step without the optimizer."""
    memory: float
    """Bytes of minglm / bytes of transformers: below 1 minglm needs less."""
    against: str
    """The dtype of the faster form of transformers."""


def drawn_batch(seed: int, vocabulary: int, tokens: int, length: int, document: int) -> Batch:
    """Draw a batch of `tokens` random tokens in rows of `length`.

    document: tokens of each packed document, whose bounds differ for each row and seed; 0 means one text a row.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, tokens // length)
    tokens_BS = torch.randint(vocabulary, (rows, length), generator=generator)
    mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    mask_BS[:, 0] = False
    if not document:
        return Batch(tokens_BS, mask_BS)
    # A row begins somewhere inside its first document.
    offset_B1 = torch.randint(document, (rows, 1), generator=generator)
    index_BS = torch.arange(length) + offset_B1
    documents_BS = index_BS // document
    positions_BS = index_BS % document
    in_first_BS = documents_BS == documents_BS[:, :1]
    positions_BS = torch.where(in_first_BS, torch.arange(length), positions_BS)
    return Batch(tokens_BS, mask_BS & (positions_BS > 0), documents_BS.int(), positions_BS)


def ours(model: GLM, config: RunConfig, dtype: str) -> Trainee:
    """Prepare minglm: the training step of `minglm.train.loop`."""
    model.dtype = pick_dtype(dtype, torch.device("cpu"))
    optimizer = Muon(model, config.optimizer)
    one_batch = dataclasses.replace(config.optimizer, microbatch_tokens=2**30)
    phase = Phase(
        "bench",
        tokens=0,
        start=0,
        sequence_length=0,
        learning_rate=lambda tokens_seen: LEARNING_RATE,
        batch_tokens=lambda tokens_seen: 0,
        mtp_weight=lambda tokens_seen: 0.0,
        bias_rate=lambda tokens_seen: 1e-3,
        balance_weight=0.0,
        optimizer=one_batch,
    )
    phases = {
        length: dataclasses.replace(phase, sequence_length=length) for length, _ in LAYOUTS.values()
    }

    def train_step(batch: Batch) -> float:
        length = batch.tokens_BS.shape[1]
        return step(model, optimizer, batch, phases[length], 0).loss

    return Trainee(optimizer, train_step)


def theirs(model: GLM, config: RunConfig, dtype: str) -> Trainee:
    """Prepare transformers: its model with the weights of ours, and the same optimizer and clipping.

    Raises ValueError where transformers is not installed.
    """
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
        weight_dtype = torch.bfloat16 if dtype == "bfloat16 weights" else torch.float32
        twin = AutoModelForCausalLM.from_pretrained(folder, dtype=weight_dtype).train()
    optimizer = Muon(twin, config.optimizer)

    def train_step(batch: Batch) -> float:
        labels_BS = batch.tokens_BS.masked_fill(~batch.mask_BS, -100)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            out = twin(
                batch.tokens_BS, labels=labels_BS, position_ids=batch.positions_BS, use_cache=False
            )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        optimizer.step()
        optimizer.zero_grad()
        return out.loss.item()

    return Trainee(optimizer, train_step)


def build(side: Side, config: RunConfig) -> Trainee:
    """Prepare one of SIDES; the initial weights are the same for all."""
    model = GLM(dataclasses.replace(config.model, num_nextn_predict_layers=0))
    prepare = ours if side.name == "minglm" else theirs
    return prepare(model, config, side.dtype)


class Products(TorchDispatchMode):
    """Count the matrix products that run inside it, by shapes, strides and dtypes of both factors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            factors = args[1:3] if "add" in name else args[:2]
            self.calls[tuple((tuple(x.shape), x.stride(), x.dtype) for x in factors)] += 1
        return func(*args, **kwargs or {})


def floor(run: Callable[[Batch], object], batch: Batch, repeats: int) -> float:
    """Return the CPU-seconds of the matrix products of a step when nothing else is done."""
    with Products() as products:
        run(batch)
    total = 0.0
    for factors, count in products.calls.items():
        a, b = (
            torch.empty_strided(shape, stride, dtype=dtype).normal_()
            for shape, stride, dtype in factors
        )
        seconds = []
        for _ in range(repeats + 2):
            began = time.process_time()
            torch.matmul(a, b)
            seconds.append(time.process_time() - began)
        total += count * min(seconds)
    return total


def memory(side: Side, config: RunConfig, batch: Batch) -> int:
    """Return the bytes by which two steps make a fresh process grow, at their peak (Linux)."""
    use_threads(1)
    trainee = build(side, config)

    def status(name: str) -> int:
        after_name = Path("/proc/self/status").read_text(encoding="utf-8").split(f"{name}:")[1]
        kilobytes = after_name.split()[0]
        return int(kilobytes) * 1024

    before = status("VmRSS")
    trainee.step(batch)
    trainee.step(batch)
    return status("VmHWM") - before


def time_turns(
    sides: Mapping[Side, Trainee], batches: Sequence[Batch]
) -> dict[Side, list[StepSeconds]]:
    """Time one step of each side on each batch, sides taking turns."""
    seconds: dict[Side, list[StepSeconds]] = {side: [] for side in sides}
    optimizer_times: list[
        float
    ] = []  # minus the beginning, and the end, of each step of an optimizer
    for trainee in sides.values():
        trainee.optimizer.register_step_pre_hook(
            lambda *_: optimizer_times.append(-time.process_time())
        )
        trainee.optimizer.register_step_post_hook(
            lambda *_: optimizer_times.append(time.process_time())
        )
    for batch in batches:
        for side, trainee in sides.items():
            optimizer_times.clear()
            began = time.process_time()
            trainee.step(batch)
            whole = time.process_time() - began
            seconds[side].append(StepSeconds(whole, sum(optimizer_times)))
    return seconds


def check_losses(layout: str, losses: Mapping[Side, float]) -> None:
    """Raise ValueError where the first losses of the sides differ: their speeds would mean nothing."""
    expected = losses[SIDES[0]]
    for side, loss in losses.items():
        tolerance = LOSS_TOLERANCE.get(side.dtype, LOW_PRECISION_TOLERANCE)
        if abs(loss - expected) > tolerance * loss:
            raise ValueError(
                f"{layout}, {side.dtype}: the losses differ, so the speeds mean nothing: {losses}"
            )


def train(config: RunConfig, options: BenchOptions) -> dict[str, Any]:
    """Measure a training step of minglm and of transformers, in float32 and bfloat16, for each layout.

    The model must fit in memory several times. Returns the record. Raises ValueError without transformers,
    and where the losses of the two sides differ.
    """
    use_threads(1)
    keep_freed_memory()  # as a run does
    results: list[Row] = []
    for layout, (length, document) in LAYOUTS.items():

        def batch_of(seed: int, length: int = length, document: int = document) -> Batch:
            vocabulary = config.model.vocab_size
            return drawn_batch(seed, vocabulary, options.train_tokens, length, document)

        sides = {side: build(side, config) for side in SIDES}
        # The first step also warms up.
        check_losses(layout, {side: trainee.step(batch_of(0)) for side, trainee in sides.items()})
        turns = time_turns(sides, [batch_of(1 + turn) for turn in range(options.repeats)])
        for side, seconds in turns.items():
            best = min(turn.step for turn in seconds)
            row: dict[str, Any] = {
                "layout": layout,
                "side": side.name,
                "dtype": side.dtype,
                "seconds": best,
                "optimizer_seconds": min(turn.optimizer for turn in seconds),
                "median_seconds": statistics.median(turn.step for turn in seconds),
                "tokens_per_second": options.train_tokens / best,
            }
            # Attention and grouped products of transformers are whole operations, so its products cannot be counted.
            if side.name == "minglm":
                row["floor_seconds"] = floor(sides[side].step, batch_of(1), options.repeats)
                row["share_of_floor"] = row["floor_seconds"] / best
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row["memory_bytes"] = pool.apply(memory, (side, config, batch_of(0)))
            results.append(row)  # pyright: ignore[reportArgumentType]  filled in key by key
            print(
                *(f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in row.items()), flush=True
            )
    record = {
        "threads": 1,
        "tokens": options.train_tokens,
        "results": results,
        "bfloat16_products": pick_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16,
        "ratios": ratios(results),
    }
    print(record["ratios"])
    return record


def ratios(results: Sequence[Row]) -> dict[str, Ratio]:
    """Compare minglm with the faster form of transformers, {"layout, dtype": ratio}.

    In bfloat16 transformers has two forms: autocast over float32 weights, and weights in bfloat16.
    """
    compared: dict[str, Ratio] = {}
    for layout in LAYOUTS:
        rows = [row for row in results if row["layout"] == layout]
        for mine in [row for row in rows if row["side"] == "minglm"]:
            others = [
                row
                for row in rows
                if row["side"] == "transformers" and row["dtype"].startswith(mine["dtype"])
            ]
            other = min(others, key=lambda row: row["seconds"])
            their_passes = other["seconds"] - other["optimizer_seconds"]
            our_passes = mine["seconds"] - mine["optimizer_seconds"]
            compared[f"{layout}, {mine['dtype']}"] = {
                "step": round(other["seconds"] / mine["seconds"], 3),
                "median": round(other["median_seconds"] / mine["median_seconds"], 3),
                "forward_backward": round(their_passes / our_passes, 3),
                "memory": round(mine["memory_bytes"] / other["memory_bytes"], 3),
                "against": other["dtype"],
            }
    return compared
