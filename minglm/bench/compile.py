"""Compile every GPU kernel for an H100 and tabulate what the compiler made of it; no GPU is needed.

    python -m minglm bench compile

Registers, shared memory, spills and tensor-core instructions of each kernel in each default configuration,
beside the budgets that tests/kernels/test_compile_gate.py checks (`minglm.kernels.toolchain.compile_check`).
These are facts of the machine code. They say nothing about its speed.
"""

from importlib.metadata import version
from typing import Any

from minglm.kernels.dispatch import installed
from minglm.kernels.toolchain.compile_check import Record, compile_modules, faults, modules

HEADING = f"{'kernel':44} {'warps':>5} {'stages':>6} {'registers':>9} {'spilled':>7} {'shared':>8}  instructions"


def row(record: Record) -> str:
    """Format one line of the table."""
    name = f"{record.get('module')}: {record['kernel']}"
    if "error" in record:
        return f"{name:44} {record['error']}"
    numbers = (
        f"{record['warps']:5} {record['stages']:6} {record['registers']:9} "
        f"{record['spill_bytes']:7} {record['shared_bytes']:8}"
    )
    # Plain loads and stores are in every kernel.
    counts = [
        f"{opcode} {count}"
        for opcode, count in record["opcodes"].items()
        if opcode not in ("LDG", "STG")
    ]
    broken = "".join(f"  <- {fault}" for fault in faults(record))
    return f"{name:44} {numbers}  {' '.join(counts)}{broken}"


def compile_kernels() -> dict[str, Any]:
    """Compile every kernel, print the table as it grows, and return the record.

    Raises ValueError without triton.
    """
    if not installed():
        raise ValueError("bench compile needs triton: pip install triton (Linux)")
    kernels: list[Record] = []
    print(HEADING)
    for module in modules():
        for record in compile_modules(module):
            kernels.append(record)
            print(row(record), flush=True)
    return {
        "target": "sm_90a",
        "triton": version("triton"),
        "kernels": kernels,
        "size": [8, 1 + 0.2 * len(kernels)],  # inches of the figure
    }
