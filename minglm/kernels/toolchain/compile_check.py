"""Every Triton kernel compiled for an H100 on a machine without one, and what the compiler made of it.

    records = compile_module("minglm.kernels.norm.triton_kernel")      # one for each Spec in its SPECS
    faults(records[0])                                          # [] when it keeps its budget

Triton brings NVIDIA's assembler, so a kernel becomes real sm_90a machine code on any Linux machine. Read from that: the
registers of a thread, the bytes it spills (a spilled register is a round trip to memory in the innermost loop), the
shared memory of a block, and which instructions there are:

    HGMMA, QGMMA     products of a warp group of 128 threads, bfloat16 and float8: the only ones that reach full speed
    HMMA             products of a single warp, the older way, at half that speed at best
    UTMALDG, LDGSTS  copies to shared memory that run beside the arithmetic: by descriptor (TMA), by pointer
    LDL, STL         loads and stores of spilled registers

The budgets: nothing spilled, at most 227 KiB of shared memory, products by warp groups where there are products, and
tiles of whole 128 bytes for the bulk copy engine, or else the second of them begins where it may not (the compiler
checks neither the memory nor the tiles). This proves that a kernel compiles, uses the right units and does not
spill. It proves nothing about its results or its time.

A module is compiled in a process of its own: a process that interprets kernels (TRITON_INTERPRET=1) cannot compile any,
and a crash of the compiler ends only that process.
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
from pathlib import Path

SHARED_BYTES, REGISTERS = 232_448, 65_536  # of one block and of one multiprocessor, H100
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
)
ROOT = Path(__file__).parent.parent.parent.parent


def modules():
    """Dotted names of the modules with Triton and Gluon kernels."""
    kernels = ROOT / "minglm" / "kernels"
    paths = [*kernels.glob("*/triton_*.py"), *kernels.glob("*/gluon_*.py")]
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in paths
        if path.stem != "triton_layer"
    )


def source_of(spec):
    """The `ASTSource` of a Spec. Raises ValueError where the Spec and the kernel's arguments do not match."""
    if spec.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    else:
        from triton.compiler import ASTSource

    names, given = list(spec.kernel.arg_names), spec.signature.keys() | spec.constants.keys()
    if unknown := sorted(given ^ set(names)) + sorted(
        spec.signature.keys() & spec.constants.keys()
    ):
        raise ValueError(
            f"{spec.name}: signature and constants must name each argument once; look at {unknown}"
        )
    types = {name: spec.signature.get(name, "constexpr") for name in names}
    whole = [
        i for i, name in enumerate(names) if types[name].startswith("*") or name in spec.aligned
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in whole}
    return ASTSource(spec.kernel, types, constexprs=dict(spec.constants), attrs=attributes)


def tool(name):
    """Path of one of NVIDIA's programs that come with Triton."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def looked_into(cubin):
    """Of machine code: registers and stack bytes of a thread, how often each instruction stands in it, bytes spilled.

    Instructions are counted by their first word; 128-bit loads as LDG128 too. Spilled bytes are those that LDL and STL
    move, which is what the assembler itself reports.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], **run).stdout
        listing = subprocess.run([tool("cuobjdump"), "-sass", file.name], **run).stdout
    found = re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE
    )
    counts = Counter(word.partition(".")[0] for word in found)
    counts["LDG128"] = sum(word.startswith("LDG") and word.endswith(".128") for word in found)
    spilled = [re.search(r"\.(64|128)$", word) for word in found if re.match(r"(LDL|STL)\b", word)]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spill_bytes": sum(int(width[1]) // 8 if width else 4 for width in spilled),
        "opcodes": {name: counts[name] for name in (*COUNTED, "LDG128") if counts[name]},
    }


def odd_tiles(spec):
    """{argument: bytes} of the described tiles that are no multiple of 128 bytes."""
    found = {}
    for name, kind in spec.signature.items():
        if tile := re.match(r"tensordesc<[a-z]+(\d+)(?:e4nv)?\[([\d, ]+)\]", kind):
            size = math.prod(int(n) for n in tile[2].split(",")) * int(tile[1]) // 8
            found |= {name: size} if size % 128 else {}
    return found


def compile_spec(spec):
    """Compile one Spec; returns its record, plain numbers and strings. Raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": spec.warps, "num_stages": spec.stages}
    kernel = triton.compile(source_of(spec), target=GPUTarget("cuda", 90, 32), options=options)
    ptx = kernel.asm["ptx"]
    threads = re.search(r"\.reqntid\s+(\d+)", ptx)
    return {
        "kernel": spec.name,
        "warps": int(threads[1]) // 32 if threads else kernel.metadata.num_warps,
        "stages": spec.stages,
        **looked_into(kernel.asm["cubin"]),
        "shared_bytes": kernel.metadata.shared,
        "odd_tiles": odd_tiles(spec),
        "waits": sorted(
            {int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)}
        ),
        "asked": {
            "unit": spec.unit,
            "opcodes": list(spec.opcodes),
            "spill_bytes": spec.spill_bytes,
        },
    }


def faults(record):
    """Where a record breaks its budget: a list of sentences, empty for a good kernel."""
    if "error" in record:
        return [record["error"]]
    asked, counts, found = record["asked"], record["opcodes"], []
    if record["spill_bytes"] > asked["spill_bytes"]:
        found.append(f"spills {record['spill_bytes']} bytes, {asked['spill_bytes']} allowed")
    if record["shared_bytes"] > SHARED_BYTES:
        found.append(
            f"needs {record['shared_bytes']} bytes of shared memory, a block has {SHARED_BYTES}"
        )
    if record["registers"] * 32 * record["warps"] > REGISTERS:
        found.append(
            f"needs {record['registers']} registers for {32 * record['warps']} threads, there are {REGISTERS}"
        )
    found += [
        f"has no {name}"
        for name in (asked["unit"], *asked["opcodes"])
        if name and not counts.get(name)
    ]
    for name, size in record.get("odd_tiles", {}).items():  # older records have none
        found.append(f"copies {name} in tiles of {size} bytes, which is no multiple of 128")
    if counts.get("HMMA"):
        found.append("multiplies by single warps (HMMA)")
    return found


def compile_module(name, timeout=600):
    """Compile every Spec of a module in a process of its own. Returns their records, in order.

    A Spec that does not compile has a record {"kernel", "error"}. Raises RuntimeError when the process dies or has no
    end, with the Spec at which it was.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])
    try:
        # -P: this file's folder must not be searched for modules
        done = subprocess.run(
            [sys.executable, "-P", __file__, name],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        status, lines, complaint = done.returncode, done.stdout.splitlines(), done.stderr
    except subprocess.TimeoutExpired as error:
        status, lines, complaint = (
            f"none after {timeout} s",
            (error.stdout or b"").decode().splitlines(),
            "",
        )
    if status != 0:
        begun = [line.removeprefix("begin ") for line in lines if line.startswith("begin ")]
        last = "\n".join(complaint.splitlines()[-5:])
        raise RuntimeError(
            f"{name}: exit status {status} at {begun[-1] if begun else 'import'}\n{last}"
        )
    return [
        {"module": name.removeprefix("minglm.kernels."), **json.loads(line)}
        for line in lines
        if line.startswith("{")
    ]


def main(name):
    """In the process of its own: print a line when each Spec begins, and its record as JSON."""
    for spec in importlib.import_module(name).SPECS:
        print("begin", spec.name, flush=True)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                record = compile_spec(spec)
        except Exception as error:  # whatever the compiler raises is this Spec's record
            record = {
                "kernel": spec.name,
                "error": f"{type(error).__name__}: {str(error).strip()[-300:]}",
            }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
