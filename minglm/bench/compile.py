"""What the compiler makes of every Triton kernel for an H100, as a table and a figure; no GPU is needed.

    python -m minglm bench compile

Registers, shared memory, spills and tensor-core instructions of each kernel in each default configuration, beside the
budgets that tests/test_compile_gate.py holds (`minglm.kernels.toolchain.compile_check`). These are facts of the machine code. They say
nothing of its speed.
"""

from importlib.metadata import version

from minglm.kernels.dispatch import installed
from minglm.kernels.toolchain.compile_check import SHARED_BYTES, compile_module, faults, modules
from minglm.report import drawing

UNITS = ("HGMMA", "QGMMA", "HMMA")
COLUMNS = f"{'kernel':44} {'warps':>5} {'stages':>6} {'registers':>9} {'spilled':>7} {'shared':>8}  instructions"


def row(record):
    """One line of the table."""
    name = f"{record['module'].removesuffix('_triton')}: {record['kernel']}"
    if "error" in record:
        return f"{name:44} {record['error']}"
    counts = " ".join(
        f"{unit} {count}" for unit, count in record["opcodes"].items() if unit not in ("LDG", "STG")
    )
    numbers = f"{record['warps']:5} {record['stages']:6} {record['registers']:9} {record['spill_bytes']:7}"
    broken = "".join(f"  <- {fault}" for fault in faults(record))
    return f"{name:44} {numbers} {record['shared_bytes']:8}  {counts}{broken}"


def compile_kernels(config, options):
    """Compile every kernel, print the table as it grows, and return the record. Raises ValueError without triton."""
    if not installed():
        raise ValueError("bench compile needs triton: pip install triton (Linux)")
    kernels = []
    print(COLUMNS)
    for module in modules():
        for record in compile_module(module):
            kernels.append(record)
            print(row(record), flush=True)
    return {
        "target": "sm_90a",
        "triton": version("triton"),
        "kernels": kernels,
        "size": [8, 1 + 0.2 * len(kernels)],
    }


def draw_compile(record, axis):
    """Registers and shared memory of each kernel, as shares of what a thread and a block may have."""
    kernels = [kernel for kernel in record["kernels"] if "error" not in kernel]
    names = [
        f"{kernel['module'].removesuffix('_triton')}: {kernel['kernel']}" for kernel in kernels
    ]
    height = [-i for i in range(len(kernels))]
    registers = [kernel["registers"] / 255 for kernel in kernels]
    shared = [kernel["shared_bytes"] / SHARED_BYTES for kernel in kernels]
    axis.barh([h + 0.2 for h in height], registers, 0.36, color="#1f5fa8")
    axis.barh([h - 0.2 for h in height], shared, 0.36, color="#d98200")
    axis.set_yticks(height, names, fontsize=7)
    for h, kernel, most in zip(height, kernels, map(max, registers, shared)):
        units = [f"{kernel['opcodes'][unit]} {unit}" for unit in UNITS if unit in kernel["opcodes"]]
        spilled = [f"{kernel['spill_bytes']} bytes spilled"] if kernel["spill_bytes"] else []
        axis.annotate(
            ", ".join(units + spilled),
            (most, h),
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
