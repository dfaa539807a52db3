"""How fast the kernels are: every form of an operation side by side, beside the machine's own limits.

    share of the ceiling = max(FLOP / products per second, bytes / copied bytes per second) / measured time

Both ceilings are measured at the start of the same run: a large bfloat16 product and a large copy. The forms of a case
(ours first, then the named baselines) take turns, so that what else the machine does falls on all of them. Before every
turn the cache is filled with other data, often enough that the host is ahead of the GPU when the turn begins, as in
training: starting a kernel is not what is measured. The median of the turns is reported with its quartiles; before any
timing each form's result is compared with ours. A form that fails is a line with its reason, not a missing line.
What takes microseconds is recorded as a CUDA graph, as an engine would, because Python would take longer to start it,
and the time to start a graph is taken off; a form that cannot be recorded, because the host waits for the GPU in its
middle, is timed as it is and marked.

    python -m minglm bench kernels --only attention --out figures/bench_kernels.json

Each operation has a file in `minglm/bench_cases/` with `cases(device, smoke)`, which yields `Case`s; a new file there
is a new operation. `smoke` asks for toy sizes, with which every case runs on a CPU in seconds: a test of the benchmark.
"""

import dataclasses
import functools
import gc
import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minglm.common.device import pick_device
from minglm.common.files import write_json
from minglm.common.version import versions
from minglm.kernels.dispatch import backend, use
from minglm.report import drawing

CASES = Path(__file__).parent / "cases"
AHEAD = 10  # times that the cache is filled before a turn: 1 ms, in which the host starts what takes less than that


@dataclasses.dataclass
class Case:
    """One operation at one shape, in several forms."""

    name: str
    """Operation and shape, "attention forward, 1 x 32768, 96/8 heads of 128"."""
    flops: float
    """Floating-point operations that the mathematics needs, two for each product of a matrix product."""
    bytes: float
    """Bytes that must be read and written at least once."""
    forms: Callable[[], dict[str, Callable[[], object]]]
    """Makes the inputs and returns {form: function of no arguments}; ours is first. Called when the turn of the case
    comes, so that only its own tensors are in memory. A function returns a tensor or a tuple of tensors."""
    unit: str = "bfloat16"
    """What the products are made in; names the ceiling."""
    graph: bool = False
    """Whether a GPU's work is recorded and replayed."""


def operations():
    """Names of the operations that have a file in bench_cases."""
    return sorted(path.stem for path in CASES.glob("*.py") if path.stem != "__init__")


class Clock:
    """Times one call, in milliseconds; on a GPU with events, and after its cache has been filled with other data."""

    def __init__(self, device):
        self.gpu = device.type == "cuda"
        self.other = torch.empty(
            2**28 if self.gpu else 1, dtype=torch.int8, device=device
        )  # 256 MiB; L2 has 50

    def fill(self):
        """Fill the cache with other data; 0.1 ms."""
        self.other.zero_()

    def __call__(self, function):
        for _ in range(AHEAD if self.gpu else 0):
            self.fill()
        return self.time(function)

    def time(self, function):
        """Milliseconds of a call, whatever is in the cache."""
        if not self.gpu:
            began = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - began)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        function()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended)


def ceilings(device, smoke):
    """Operations a second of a large product in each dtype, {"bfloat16": ..., ...}, and bytes a second of a copy.

    Where there are no float8 products, their ceiling is that of bfloat16.
    """
    clock, size = Clock(device), 256 if smoke else 8192
    found = {}
    for name in ("bfloat16", "float32"):
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
        best = min(clock(lambda: a @ b) for _ in range(10))  # noqa: B023
        found[name] = 2 * size**3 / best * 1e3
    found["float8"] = found["bfloat16"]
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        a, b = (torch.ones(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=device)

        def product():
            return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        found["float8"] = 2 * size**3 / min(clock(product) for _ in range(10)) * 1e3
    source = torch.zeros(2**20 if smoke else 2**31, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found["bytes"] = (
        2 * source.nbytes / min(clock(lambda: target.copy_(source)) for _ in range(10)) * 1e3
    )
    return found


def tensors(result):
    """The tensors of a result, one or several."""
    return [result] if isinstance(result, torch.Tensor) else list(result)


def difference(result, ours):
    """Largest relative distance of two results, ||a - b|| / ||b||, over their tensors."""
    pairs = zip(tensors(result), tensors(ours), strict=True)
    return max(
        float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)) for a, b in pairs
    )


def warm_up(forms, device):
    """Run every form twice. Returns {form: {"difference": ..., "megabytes": ...}} or {form: {"error": ...}}.

    megabytes: the most memory that a call had allocated beyond what was there before it, its result included.
    """
    found, ours = {}, None
    for name, run in forms.items():
        try:
            run()  # compiles
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            result = run()
            found[name] = {}
            if device.type == "cuda":
                found[name]["megabytes"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            ours = result if ours is None else ours
            found[name]["difference"] = difference(result, ours)
        except Exception as error:  # a baseline that this machine lacks must not end the benchmark
            found[name] = failure(error)
    return found


def recorded(run, clock):
    """A call as a CUDA graph, whose time is that of the call alone: milliseconds, as a function of no arguments.

    Two graphs are timed, one that fills the cache with other data and one that does that and the call; what it takes to
    start a graph is in both. Raises RuntimeError where the host waits for the GPU in the middle of the call.
    """

    def graph_of(*steps):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for step in steps:
                step()
        return graph.replay

    alone, both = graph_of(clock.fill), graph_of(clock.fill, run)
    return lambda: clock.time(both) - clock.time(alone)


def failure(error):
    """What the record says of a form or a case that could not run; its memory is given back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def turns_of(timed, rounds, seconds):
    """{form: milliseconds of each turn}: `rounds` of them, fewer (but three) where they would take over `seconds`.

    timed: {form: function that times one turn}.
    """
    turns, began = {name: [] for name in timed}, time.monotonic()
    for done in range(rounds):
        if done >= 3 and time.monotonic() - began > seconds:
            break
        for name, turn in timed.items():
            turns[name].append(turn())
    return turns


def measure(case, limits, device, rounds, seconds):
    """One record of a case: a dictionary for each of its forms."""
    try:
        forms, clock = case.forms(), Clock(device)
    except torch.OutOfMemoryError as error:
        return {"case": case.name, "forms": {"inputs": failure(error)}}
    found = warm_up(forms, device)
    timed = {
        name: functools.partial(clock, run)
        for name, run in forms.items()
        if "error" not in found[name]
    }
    for name in timed if case.graph and device.type == "cuda" else ():
        found[name]["recorded"] = True
        try:
            timed[name] = recorded(forms[name], clock)
        except RuntimeError:
            found[name]["recorded"] = False
    turns = turns_of(timed, rounds, seconds)
    floor = 1e3 * max(case.flops / limits[case.unit], case.bytes / limits["bytes"])
    ours = statistics.median(turns[next(iter(forms))]) if next(iter(forms)) in turns else None
    for name, spent in turns.items():
        middle = statistics.median(spent)
        low, _, high = statistics.quantiles(spent, n=4) if len(spent) > 1 else (middle,) * 3
        found[name] |= {"milliseconds": middle, "quartiles": [low, high], "share": floor / middle}
        found[name] |= {"tflops": case.flops / middle / 1e9, "tbytes": case.bytes / middle / 1e9}
        found[name] |= {"times_ours": ours and middle / ours}
    return {
        "case": case.name,
        "flops": case.flops,
        "bytes": case.bytes,
        "floor_ms": floor,
        "forms": found,
    }


def line(name, form):
    """One line of the printed table."""
    if "error" in form:
        return f"    {name:24} {form['error']}"
    against = f"{form['times_ours']:6.2f} x ours" if form["times_ours"] else ""
    against += " not recorded" if not form.get("recorded", True) else ""
    return (
        f"    {name:24} {form['milliseconds']:10.4f} ms {form['tflops']:8.1f} TFLOP/s {form['tbytes']:7.3f} TB/s "
        f"{form['share']:6.1%} of the ceiling {against}  differs {form['difference']:.1e}"
    )


def run(device, only=(), out=None, rounds=20, seconds=3.0, smoke=False):
    """Measure the operations named (or all), print a table, write the record to `out` after every case.

    Returns the record. Raises ValueError for an operation that is not there.
    """
    unknown = set(only) - set(operations())
    if unknown:
        raise ValueError(
            f"--only {sorted(unknown)[0]}: no such operation; there are {', '.join(operations())}"
        )
    record = {
        "bench": "kernels",
        "versions": versions() | gpu_versions(),
        "rounds": rounds,
        "cases": [],
    }
    limits = record["ceilings"] = ceilings(device, smoke)
    print(
        f"{record['versions']['device']}: {limits['bfloat16'] / 1e12:.1f} TFLOP/s bfloat16, "
        f"{limits['bytes'] / 1e12:.2f} TB/s copied",
        flush=True,
    )
    for operation in only or operations():
        for case in importlib.import_module(f"minglm.bench.cases.{operation}").cases(device, smoke):
            print(case.name, flush=True)
            measured = {"operation": operation} | measure(case, limits, device, rounds, seconds)
            for name, form in measured["forms"].items():
                print(line(name, form), flush=True)
            record["cases"].append(measured)
            record["size"] = [9, 1.2 + 0.24 * len(record["cases"])]
            if out:
                write_json(out, record)  # a run that is cut short keeps what it has
            gc.collect()
    return record


def draw_kernels(record, axis):
    """Of each case what share of the ceiling each form reaches."""
    cases, widest = record["cases"], 1.0
    for row, case in enumerate(cases):
        shares = {name: form["share"] for name, form in case["forms"].items() if "share" in form}
        widest = max(widest, *shares.values(), 0)
        for i, (name, share) in enumerate(shares.items()):
            ours = name.startswith("minglm")
            axis.plot(
                [share],
                [-row],
                "|" if i else "o",
                markersize=6,
                color="#1f5fa8" if ours else "#c2571a",
            )
            if not ours and share == max(
                value for other, value in shares.items() if not other.startswith("minglm")
            ):
                axis.annotate(
                    name, (share, -row), (0, 3), textcoords="offset points", fontsize=4, ha="center"
                )
    axis.set_yticks(
        [-row for row in range(len(cases))], [case["case"] for case in cases], fontsize=6
    )
    axis.set_xlim(0, 1.05 * widest)
    axis.set_xlabel("share of the ceiling: minglm (dot), baselines (strokes; the best is named)")
    axis.margins(y=0.01)
    drawing.title(axis, f"{record['versions']['device']}, ceilings measured in the same run")


def gpu_versions():
    """Versions that matter to kernels: Triton, CUDA, cuDNN, the GPU's capability."""
    from importlib import metadata

    found = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    for package in ("triton", "liger-kernel", "cut-cross-entropy", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    if torch.cuda.is_available():
        found["capability"] = list(torch.cuda.get_device_capability())
    return found


def command(args):
    """Every form of each operation side by side, as a share of the ceilings measured in the same run."""
    device = pick_device(args.device)
    if device.type != "cuda" and not args.smoke:
        raise ValueError(
            "bench kernels measures GPU kernels and found no GPU; --smoke shows on a CPU that it runs"
        )
    from minglm.bench.plots import redraw

    use(args.kernels)
    backend(torch.empty(0, device=device))  # refuses Triton on a CPU outside its interpreter
    run(device, args.only, args.out, args.rounds, args.seconds, args.smoke)
    print(args.out, redraw(args.out))
