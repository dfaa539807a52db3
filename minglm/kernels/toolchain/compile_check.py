"""Compile every Triton kernel for an H100 on a machine without one, and inspect the machine code (no paper section).

    records = compile_modules("minglm.kernels.norm.triton_kernel")    # one record for each Spec in its SPECS
    faults(records[0])                                                # [] when the kernel keeps its budget

Triton includes NVIDIA's assembler, so a kernel becomes real sm_90a machine code on any Linux machine. The record says:
the registers of a thread, the bytes it spills (a spilled register is a round trip to memory in the innermost loop), the
shared memory of a block, and which instructions the code has:

    HGMMA, QGMMA     products of a warp group of 128 threads, bfloat16 and float8: the only ones that reach full speed
    HMMA             products of a single warp, the older way, at half that speed at best
    UTMALDG, LDGSTS  copies to shared memory that run beside the arithmetic: by descriptor (TMA), by pointer
    LDL, STL         loads and stores of spilled registers

The budgets: nothing spilled, at most 227 KiB of shared memory, products by warp groups where there are products, and
tiles that are whole multiples of 128 bytes for the bulk copy engine, since otherwise the second tile begins at an
address that the engine does not take (the compiler checks neither the memory nor the tiles). This proves that a kernel
compiles, uses the right units and does not spill. It proves nothing about its results or its time.

Modules are compiled in a process of their own: a process that interprets kernels (TRITON_INTERPRET=1) cannot compile
any, and a crash of the compiler ends only that process.
"""

import contextlib
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict, cast

# This file runs as a script, where the package is imported only with the module to compile.
if TYPE_CHECKING:
    from minglm.kernels.toolchain.spec import Spec

SHARED_BYTES = 232_448  # shared memory of one block, H100
REGISTERS = 65_536  # registers of one multiprocessor, H100
COUNTED = (
    "HGMMA",
    "QGMMA",
    "HMMA",
    "UTMALDG",
    "UTMASTG",
    "UTMAREDG",
    "LDGSTS",
    "LDG",
    "STG",
    "LDL",
    "STL",
    "RED",
    "LDG128",
)
ROOT = Path(__file__).parent.parent.parent.parent


class Cubin(NamedTuple):
    """What `inspect_cubin` finds in the machine code of a kernel."""

    registers: int
    """Registers of a thread."""
    stack_bytes: int
    """Stack of a thread."""
    spill_bytes: int
    """Bytes that the loads and stores of spilled registers (LDL, STL) move."""
    opcodes: dict[str, int]
    """Number of occurrences of each instruction of COUNTED that occurs."""


class Asked(TypedDict):
    """The budget of a kernel, from its Spec."""

    unit: str
    opcodes: list[str]
    spill_bytes: int


class Record(TypedDict):
    """One kernel as compiled: one line of the table, and one entry of figures/bench_compile.json.

    A kernel that does not compile has only `module`, `kernel` and `error`.
    """

    module: NotRequired[str]
    """Module below minglm.kernels, which `main` adds."""
    kernel: str
    """Name of the Spec."""
    error: NotRequired[str]
    """Type and message of the compiler's exception."""
    warps: int
    stages: int
    registers: int
    stack_bytes: int
    spill_bytes: int
    opcodes: dict[str, int]
    shared_bytes: int
    odd_tiles: dict[str, int]
    """Bytes of each described tile that is no multiple of 128 bytes, by argument."""
    waits: list[int]
    """Numbers of products that may still run at the waits for a product (wgmma.wait_group)."""
    asked: Asked


def modules() -> list[str]:
    """Return the dotted names of the modules that export Specs: those with Triton and Gluon kernels."""
    kernels = ROOT / "minglm" / "kernels"
    paths = [*kernels.glob("*/triton_*.py"), *kernels.glob("*/gluon_*.py")]
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in paths
        if "\nSPECS = " in path.read_text(encoding="utf-8")
    )


def source_of(spec: "Spec") -> Any:
    """Return the `ASTSource` of a Spec. Raises ValueError where the Spec and the kernel's arguments do not match."""
    if spec.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    else:
        from triton.compiler import ASTSource

    names = list(spec.kernel.arg_names)
    given = spec.signature.keys() | spec.constants.keys()
    unknown_or_missing = sorted(given ^ set(names))
    twice = sorted(spec.signature.keys() & spec.constants.keys())
    if mismatches := unknown_or_missing + twice:
        raise ValueError(
            f"{spec.name}: signature and constants must name each argument once; look at {mismatches}"
        )
    types = {name: spec.signature.get(name, "constexpr") for name in names}
    # Pointers and the integers named in `aligned` are multiples of 16.
    multiples_of_16 = [
        index
        for index, name in enumerate(names)
        if types[name].startswith("*") or name in spec.aligned
    ]
    attributes = {(index,): [["tt.divisibility", 16]] for index in multiples_of_16}
    return ASTSource(spec.kernel, types, constexprs=dict(spec.constants), attrs=attributes)


def tool(name: str) -> str:
    """Return the path of one of NVIDIA's programs that come with Triton."""
    import triton

    return str(Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / name)


def inspect_cubin(cubin: bytes) -> Cubin:
    """Inspect a cubin: registers and stack of a thread, instruction counts, bytes spilled.

    Instructions are counted by their first word; 128-bit loads as LDG128 too. The spilled bytes are the same as the
    assembler itself reports.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        listing = _cuobjdump("-sass", file.name)
    # A line of the listing: /*0010*/  @!P0 LDG.E.128 R4, ...
    instructions = re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE
    )
    counts = Counter(instruction.partition(".")[0] for instruction in instructions)
    counts["LDG128"] = sum(
        instruction.startswith("LDG") and instruction.endswith(".128")
        for instruction in instructions
    )
    spill_bytes = 0
    for instruction in instructions:
        if re.match(r"(LDL|STL)\b", instruction):
            width = re.search(r"\.(64|128)$", instruction)
            spill_bytes += int(width[1]) // 8 if width else 4
    return Cubin(
        registers=_number(r"REG:(\d+)", usage),
        stack_bytes=_number(r"STACK:(\d+)", usage),
        spill_bytes=spill_bytes,
        opcodes={name: counts[name] for name in COUNTED if counts[name]},
    )


def _cuobjdump(option: str, path: str) -> str:
    """Run NVIDIA's cuobjdump on a cubin and return what it prints."""
    command = [tool("cuobjdump"), option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    """Return the number that the pattern's group matches. Raises ValueError where it does not match."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"cuobjdump printed no {pattern}: {text[:200]}")
    return int(match[1])


def odd_tiles(spec: "Spec") -> dict[str, int]:
    """Return {argument: bytes} of the described tiles that are no multiple of 128 bytes."""
    sizes = {}
    for name, type_name in spec.signature.items():
        tile = re.match(r"tensordesc<[a-z]+(\d+)(?:e4nv)?\[([\d, ]+)\]", type_name)
        if tile:
            bits, shape = tile.groups()
            size = math.prod(int(n) for n in shape.split(",")) * int(bits) // 8
            if size % 128:
                sizes[name] = size
    return sizes


def compile_spec(spec: "Spec") -> Record:
    """Compile one Spec and return its record, without `module`. Raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": spec.warps, "num_stages": spec.stages}
    kernel: Any = triton.compile(source_of(spec), target=GPUTarget("cuda", 90, 32), options=options)
    ptx = kernel.asm["ptx"]
    cubin = inspect_cubin(kernel.asm["cubin"])
    # With specialised warps more than were asked for.
    threads = re.search(r"\.reqntid\s+(\d+)", ptx)
    waits = {int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)}
    return {
        "kernel": spec.name,
        "warps": int(threads[1]) // 32 if threads else kernel.metadata.num_warps,
        "stages": spec.stages,
        "registers": cubin.registers,
        "stack_bytes": cubin.stack_bytes,
        "spill_bytes": cubin.spill_bytes,
        "opcodes": cubin.opcodes,
        "shared_bytes": kernel.metadata.shared,
        "odd_tiles": odd_tiles(spec),
        "waits": sorted(waits),
        "asked": {
            "unit": spec.unit,
            "opcodes": list(spec.opcodes),
            "spill_bytes": spec.spill_bytes,
        },
    }


def faults(record: Record) -> list[str]:
    """Return where a record breaks its budget: a list of sentences, empty for a good kernel."""
    if "error" in record:
        return [record["error"]]
    asked = record["asked"]
    counts = record["opcodes"]
    threads = 32 * record["warps"]
    sentences = []
    if record["spill_bytes"] > asked["spill_bytes"]:
        sentences.append(f"spills {record['spill_bytes']} bytes, {asked['spill_bytes']} allowed")
    if record["shared_bytes"] > SHARED_BYTES:
        sentences.append(
            f"needs {record['shared_bytes']} bytes of shared memory, a block has {SHARED_BYTES}"
        )
    if record["registers"] * threads > REGISTERS:
        sentences.append(
            f"needs {record['registers']} registers for {threads} threads, there are {REGISTERS}"
        )
    for name in (asked["unit"], *asked["opcodes"]):
        if name and not counts.get(name):
            sentences.append(f"has no {name}")
    for name, size in record["odd_tiles"].items():
        sentences.append(f"copies {name} in tiles of {size} bytes, which is no multiple of 128")
    if counts.get("HMMA"):
        sentences.append("multiplies by single warps (HMMA)")
    return sentences


def compile_modules(*names: str, timeout: float = 600) -> list[Record]:
    """Compile every Spec of some modules in a process of its own. Returns their records, in order.

    A Spec that does not compile has a record {"module", "kernel", "error"}. Raises RuntimeError, with the Spec that was
    being compiled, when the process dies or does not end within `timeout` seconds.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])
    try:
        process = subprocess.run(
            [sys.executable, "-P", __file__, *names],  # -P: do not search this file's folder
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        status = process.returncode
        output = process.stdout
        complaint = process.stderr
    except subprocess.TimeoutExpired as error:
        status = f"none after {timeout} s"
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        complaint = ""
    lines = output.splitlines()
    if status != 0:
        begun = [line.removeprefix("begin ") for line in lines if line.startswith("begin ")]
        last_words = "\n".join(complaint.splitlines()[-5:])
        place = begun[-1] if begun else "import"
        raise RuntimeError(f"{', '.join(names)}: exit status {status} at {place}\n{last_words}")
    records = [json.loads(line) for line in lines if line.startswith("{")]
    return cast("list[Record]", records)


def main(names: Sequence[str]) -> None:
    """Compile the Specs of modules: print a line when each begins, and its record as JSON."""
    for name in names:
        module = name.removeprefix("minglm.kernels.")
        for spec in importlib.import_module(name).SPECS:
            print("begin", spec.name, flush=True)
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    record = compile_spec(spec)
            except Exception as error:  # whatever the compiler raises is this Spec's record
                reason = f"{type(error).__name__}: {str(error).strip()[-300:]}"
                record = {"kernel": spec.name, "error": reason}
            print(json.dumps({"module": module, **record}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
