"""Measure the kernels: every form of an operation side by side, beside the machine's own limits (no paper section).

    share of the ceiling = max(FLOP / products per second, bytes / copied bytes per second) / measured time

Both ceilings are measured at the start of the same run: a large bfloat16 product and a large copy. The forms
of a case (ours first, then the named baselines) take turns, so that whatever else the machine does falls on
all of them. Before every turn the cache is filled with other data, often enough that the host is ahead of the
GPU when the turn begins, as in training: the time to start a kernel is not measured. The median of the turns
is reported with its quartiles; before any timing each form's result is compared with ours. A form that fails
is a line with its reason, not a missing line. What takes microseconds is recorded as a CUDA graph, as an
engine would, because Python would take longer to start it, and the time to start a graph is subtracted; a
form that cannot be recorded, because the host waits for the GPU in its middle, is timed without a graph and
marked.

    python -m minglm bench kernels --only attention --out figures/bench_kernels.json

Each operation has a file in `minglm/bench/cases/` with `cases(device, smoke)`, which yields `Case`s; a new
file there is a new operation. `smoke` asks for toy sizes, with which every case runs on a CPU in seconds: a
test of the benchmark.
"""

import functools
import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from minglm.bench.case import Case, Form, Unit
from minglm.common.files import write_json
from minglm.common.version import versions

CASES = Path(__file__).parent / "cases"
# Times that the cache is filled before a turn: 1 ms, in which the host starts what takes less than that.
FILLS = 10
TRIALS = 10  # of each ceiling; the best counts
MIN_ROUNDS = 3  # turns of each form, however long they take
PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy", "transformers")

Timer = Callable[[], float]
"""Times one turn of a form; returns milliseconds."""


class FormRecord(TypedDict, total=False):
    """What the record holds of one form of a case. A form that could not run has only `error`."""

    error: str
    """Type and first line of the exception."""
    megabytes: float
    """Memory that a call allocates at its peak, its result included; on a GPU only."""
    difference: float
    """Largest relative distance of its result from ours."""
    recorded: bool
    """Whether it was recorded as a CUDA graph; missing where that was not wanted."""
    milliseconds: float
    """Median of the turns."""
    quartiles: list[float]
    """First and third quartile of the turns, milliseconds."""
    share: float
    """Share of the ceiling."""
    tflops: float
    """The case's 10^12 operations a second."""
    tbytes: float
    """The case's 10^12 bytes a second."""
    times_ours: float | None
    """Its median time / that of our form; None where ours failed."""


class CaseRecord(TypedDict, total=False):
    """What the record holds of one case.

    A case whose inputs do not fit in memory has only `case` and `forms`.
    """

    operation: str
    """File of the case."""
    case: str
    """Name of the case."""
    flops: float
    bytes: float
    floor_ms: float
    """Milliseconds that the case takes at the ceilings."""
    forms: dict[str, FormRecord]


class Schedule(NamedTuple):
    """How often each form of a case is measured."""

    rounds: int = 20
    """Turns of each form."""
    seconds: float = 3.0
    """Time of a case after which no form gets a turn beyond MIN_ROUNDS."""


def operations() -> list[str]:
    """Return the names of the operations that have a file in bench/cases."""
    return sorted(path.stem for path in CASES.glob("*.py") if path.stem != "__init__")


class Clock:
    """Time calls in milliseconds, on a GPU with events; call it to fill the cache with other data first."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        size = 2**28 if self.gpu else 1  # 256 MiB; an H100's L2 has 50
        self.other = torch.empty(size, dtype=torch.int8, device=device)

    def fill(self) -> None:
        """Fill the cache with other data; it takes 0.1 ms."""
        self.other.zero_()

    def __call__(self, function: Callable[[], object]) -> float:
        """Return the milliseconds of a call that begins with other data in the cache."""
        for _ in range(FILLS if self.gpu else 0):
            self.fill()
        return self.time(function)

    def time(self, function: Callable[[], object]) -> float:
        """Return the milliseconds of a call, whatever is in the cache."""
        if not self.gpu:
            began = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - began)
        began = torch.cuda.Event(enable_timing=True)
        ended = torch.cuda.Event(enable_timing=True)
        began.record()
        function()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended)


def product_speed(clock: Clock, a: Tensor, b: Tensor) -> float:
    """Return the operations a second of the product of two square matrices."""
    milliseconds = min(clock(lambda: a @ b) for _ in range(TRIALS))
    return 2 * len(a) ** 3 / milliseconds * 1e3


def float8_speed(clock: Clock, size: int, device: torch.device) -> float:
    """Return the operations a second of PyTorch's float8 product, with one scale for each matrix."""
    a = torch.ones(size, size, device=device).to(torch.float8_e4m3fn)
    b = torch.ones(size, size, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)

    def product() -> Tensor:
        return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    milliseconds = min(clock(product) for _ in range(TRIALS))
    return 2 * size**3 / milliseconds * 1e3


def copy_speed(clock: Clock, size: int, device: torch.device) -> float:
    """Return the bytes a second of a copy of `size` bytes, read and written."""
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    milliseconds = min(clock(lambda: target.copy_(source)) for _ in range(TRIALS))
    return 2 * source.nbytes / milliseconds * 1e3


def ceilings(device: torch.device, smoke: bool) -> dict[str, float]:
    """Measure operations a second of a large product in each `Unit`, and bytes a second of a copy ("bytes").

    Where there are no float8 products, their ceiling is that of bfloat16.
    """
    clock = Clock(device)
    size = 256 if smoke else 8192
    speeds: dict[str, float] = {}
    for unit in (Unit.BFLOAT16, Unit.FLOAT32):
        dtype = getattr(torch, unit)
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        speeds[unit.value] = product_speed(clock, a, b)
    has_float8 = device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9)
    speeds["float8"] = float8_speed(clock, size, device) if has_float8 else speeds["bfloat16"]
    speeds["bytes"] = copy_speed(clock, 2**20 if smoke else 2**31, device)
    return speeds


def tensors(result: Any) -> list[Tensor]:
    """Return the tensors of a result, which is one tensor or several."""
    return [result] if isinstance(result, Tensor) else list(result)


def difference(result: Any, ours: Any) -> float:
    """Return the largest relative distance of two results, ||a - b|| / ||b||, over their tensors."""
    pairs = zip(tensors(result), tensors(ours), strict=True)
    return max(
        float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)) for a, b in pairs
    )


def warm_up(forms: Mapping[str, Form], device: torch.device) -> dict[str, FormRecord]:
    """Run every form twice; return {form: its difference from ours and its memory, or its error}."""
    gpu = device.type == "cuda"
    records: dict[str, FormRecord] = {}
    ours = None
    for name, run in forms.items():
        try:
            run()  # compiles
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if gpu else 0
            result = run()
            records[name] = {}
            if gpu:
                records[name]["megabytes"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            ours = result if ours is None else ours
            records[name]["difference"] = difference(result, ours)
        except Exception as error:  # a baseline that this machine lacks must not end the benchmark
            records[name] = failure(error)
    return records


def graph_timer(run: Form, clock: Clock) -> Timer:
    """Record a call as a CUDA graph and return a timer of the call alone.

    Two graphs are timed, one that fills the cache with other data and one that does that and the call; the
    time to start a graph is in both. Raises RuntimeError where the host waits for the GPU in the middle of
    the call.
    """

    def graph_of(*steps: Callable[[], object]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for step in steps:
                step()
        return graph.replay

    fill_alone = graph_of(clock.fill)
    fill_and_run = graph_of(clock.fill, run)
    return lambda: clock.time(fill_and_run) - clock.time(fill_alone)


def failure(error: Exception) -> FormRecord:
    """Return the record of a form or a case that could not run, and free its memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def time_turns(timers: Mapping[str, Timer], schedule: Schedule) -> dict[str, list[float]]:
    """Return {form: milliseconds of each turn}, the forms taking turns."""
    turns: dict[str, list[float]] = {name: [] for name in timers}
    began = time.monotonic()
    for finished in range(schedule.rounds):
        if finished >= MIN_ROUNDS and time.monotonic() - began > schedule.seconds:
            break
        for name, timer in timers.items():
            turns[name].append(timer())
    return turns


def measure(
    case: Case, limits: Mapping[str, float], device: torch.device, schedule: Schedule
) -> CaseRecord:
    """Measure one case; limits: the `ceilings` of this run."""
    try:
        forms = case.forms()
        clock = Clock(device)
    except torch.OutOfMemoryError as error:
        return {"case": case.name, "forms": {"inputs": failure(error)}}
    records = warm_up(forms, device)

    # What times each form that runs: the clock, or a CUDA graph.
    timers: dict[str, Timer] = {}
    for name, run in forms.items():
        record = records[name]
        if "error" in record:
            continue
        timers[name] = functools.partial(clock, run)
        if case.graph and device.type == "cuda":
            try:
                timers[name] = graph_timer(run, clock)
                record["recorded"] = True
            except RuntimeError:
                record["recorded"] = False

    turns = time_turns(timers, schedule)
    floor_ms = 1e3 * max(case.flops / limits[case.unit], case.bytes / limits["bytes"])
    our_name = next(iter(forms))
    our_median = statistics.median(turns[our_name]) if our_name in turns else None
    for name, milliseconds in turns.items():
        median = statistics.median(milliseconds)
        quartiles = [median, median]
        if len(milliseconds) > 1:
            low, _, high = statistics.quantiles(milliseconds, n=4)
            quartiles = [low, high]
        record = records[name]
        record["milliseconds"] = median
        record["quartiles"] = quartiles
        record["share"] = floor_ms / median
        record["tflops"] = case.flops / median / 1e9
        record["tbytes"] = case.bytes / median / 1e9
        record["times_ours"] = median / our_median if our_median else None
    return {
        "case": case.name,
        "flops": case.flops,
        "bytes": case.bytes,
        "floor_ms": floor_ms,
        "forms": records,
    }


def line(name: str, form: Mapping[str, Any]) -> str:
    """Format one line of the printed table."""
    if "error" in form:
        return f"    {name:24} {form['error']}"
    against = f"{form['times_ours']:6.2f} x ours" if form["times_ours"] else ""
    if not form.get("recorded", True):
        against += " not recorded"
    return (
        f"    {name:24} {form['milliseconds']:10.4f} ms {form['tflops']:8.1f} TFLOP/s {form['tbytes']:7.3f} TB/s "
        f"{form['share']:6.1%} of the ceiling {against}  differs {form['difference']:.1e}"
    )


def cases_of(operation: str, device: torch.device, smoke: bool) -> Iterable[Case]:
    """Return the cases of an operation, from its file in bench/cases."""
    return importlib.import_module(f"minglm.bench.cases.{operation}").cases(device, smoke)


def run(
    device: torch.device,
    only: Iterable[str] = (),
    out: str | Path | None = None,
    schedule: Schedule = Schedule(),  # noqa: B008  a constant
    smoke: bool = False,
) -> dict[str, Any]:
    """Measure the operations named (or all), print a table, and write the record to `out` after every case.

    Returns the record. Raises ValueError for an unknown operation.
    """
    chosen = list(only) or operations()
    if unknown := sorted(set(chosen) - set(operations())):
        raise ValueError(
            f"--only {unknown[0]}: no such operation; there are {', '.join(operations())}"
        )
    limits = ceilings(device, smoke)
    case_records: list[CaseRecord] = []
    record: dict[str, Any] = {
        "bench": "kernels",
        "versions": versions() | gpu_versions(),
        "rounds": schedule.rounds,
        "cases": case_records,
        "ceilings": limits,
    }
    print(
        f"{record['versions']['device']}: {limits['bfloat16'] / 1e12:.1f} TFLOP/s bfloat16, "
        f"{limits['bytes'] / 1e12:.2f} TB/s copied",
        flush=True,
    )
    for operation in chosen:
        for case in cases_of(operation, device, smoke):
            print(case.name, flush=True)
            measured: CaseRecord = {
                "operation": operation,
                **measure(case, limits, device, schedule),
            }
            for name, form in measured.get("forms", {}).items():
                print(line(name, form), flush=True)
            case_records.append(measured)
            record["size"] = [9, 1.2 + 0.24 * len(case_records)]  # inches of the figure
            if out:
                write_json(out, record)  # a run that is cut short keeps what it has
            gc.collect()
    return record


def gpu_versions() -> dict[str, Any]:
    """Return the versions that matter to kernels: CUDA, cuDNN, PACKAGES (None: missing), the GPU's capability."""
    found: dict[str, Any] = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    if torch.cuda.is_available():
        found["capability"] = list(torch.cuda.get_device_capability())
    return found


def require_gpu(device: torch.device, smoke: bool) -> None:
    """Raise ValueError, one line, for a measurement on a CPU that is not a smoke test."""
    if device.type != "cuda" and not smoke:
        raise ValueError(
            "bench kernels measures GPU kernels and found no GPU; --smoke shows on a CPU that it runs"
        )
