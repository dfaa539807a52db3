"""Change one operator, constant or bound of a module at a time, and list the changes that its own tests do not notice.

    python tests/mutate.py minglm/rl/grpo.py --count 20 --seed 0

A change that survives is either equivalent (nothing that the module promises differs) or a hole in the tests. Not part
of the default run: a mutation costs as much as the module's tests. The source stays as it is; the changes are made in
a temporary copy of the repository. Each runs in a process of its own, forked from one that has imported torch.

Choices
- What a bound is worth shows at the bound, so `<` becomes `<=`, `min` becomes `max`, and numbers grow by one.
- Not changed: annotations, decorators, texts, and what an error message prints.
- Limits are in CPU seconds, so a busy machine kills no mutation.
"""

import argparse
import ast
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FACTOR = 5  # a mutation may take this many times the CPU seconds of the unchanged module
SPARE = 20  # and this many more CPU seconds

# The tests of modules whose name is not that of their test file.
TESTS = {
    "minglm/common/statistics.py": ["tests/common/test_common.py", "tests/rl/test_curriculum.py"],
    "minglm/inference/kv_cache.py": ["tests/inference/test_kv_cache.py"],
    "minglm/kernels/attention/eager.py": ["tests/kernels/test_kernels.py"],
    "minglm/kernels/cross_entropy/eager.py": ["tests/kernels/test_kernels.py"],
    "minglm/kernels/experts/eager.py": ["tests/kernels/test_kernels.py"],
    "minglm/kernels/fp8/eager.py": [
        "tests/kernels/test_fp8.py",
        "tests/kernels/test_triton_fp8.py",
    ],
    "minglm/kernels/newton_schulz/eager.py": ["tests/optim/test_muon.py"],
    "minglm/kernels/norm/eager.py": ["tests/kernels/test_kernels.py"],
    "minglm/kernels/qk_norm_rope/eager.py": ["tests/kernels/test_kernels.py"],
    "minglm/kernels/router/eager.py": ["tests/model/test_router.py"],
    "minglm/plan/counts.py": ["tests/plan/test_plan.py"],
    "minglm/plan/memory.py": ["tests/plan/test_plan.py"],
    "minglm/train/loop.py": ["tests/train/test_loop.py", "tests/train/test_guard.py"],
    "minglm/train/loss.py": ["tests/train/test_loop.py"],
}

COMPARISONS: dict[type[ast.cmpop], list[str]] = {
    ast.Lt: ["<="],
    ast.LtE: ["<"],
    ast.Gt: [">="],
    ast.GtE: [">"],
    ast.Eq: ["!="],
    ast.NotEq: ["=="],
}
OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
    ast.Pow: "*",
}
CALLS = {
    "min": "max",
    "max": "min",
    "amin": "amax",
    "amax": "amin",
    "any": "all",
    "all": "any",
    "ceil": "floor",
    "floor": "ceil",
    "minimum": "maximum",
    "maximum": "minimum",
}


class Mutation(NamedTuple):
    """One change of a source."""

    line: int
    was: str
    becomes: str
    source: str
    """The whole source with the change."""


def mutations(source: str) -> Iterator[Mutation]:
    """Yield every single change of a source, each a valid program."""
    encoded = source.encode()
    starts = [0]
    for text in encoded.splitlines(keepends=True):
        starts.append(starts[-1] + len(text))

    def start(node: ast.expr) -> int:
        return starts[node.lineno - 1] + node.col_offset

    def end(node: ast.expr) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return starts[node.end_lineno - 1] + node.end_col_offset

    def change(first: int, last: int, becomes: str) -> Mutation:
        changed = encoded[:first] + becomes.encode() + encoded[last:]
        line = encoded[:first].count(b"\n") + 1
        return Mutation(line, encoded[first:last].decode(), becomes, changed.decode())

    def between(left: ast.expr, right: ast.expr, becomes: str) -> Mutation:
        gap = encoded[end(left) : start(right)]
        found = re.search(rb"[-+*/%<>=!@]+|\band\b|\bor\b", gap)
        assert found, gap
        return change(end(left) + found.start(), end(left) + found.end(), becomes)

    for node in _values(ast.parse(source)):
        match node:
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                operands = [left, *comparators]
                for index, operator in enumerate(ops):
                    for becomes in COMPARISONS.get(type(operator), []):
                        yield between(operands[index], operands[index + 1], becomes)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                yield between(left, right, OPERATORS[type(op)])
            case ast.BoolOp(op=op, values=values):
                becomes = "or" if isinstance(op, ast.And) else "and"
                for left, right in itertools.pairwise(values):
                    yield between(left, right, becomes)
            case ast.UnaryOp(op=ast.Not()):
                yield change(start(node), start(node) + len("not"), "")
            case ast.UnaryOp(op=ast.USub()):
                yield change(start(node), start(node) + len("-"), "")
            case ast.Constant(value=bool(value)):
                yield change(start(node), end(node), str(not value))
            case ast.Constant(value=int(value) | float(value)):
                yield change(start(node), end(node), repr(value + 1))
            case ast.Call(func=ast.Name(id=name) as function) if name in CALLS:
                yield change(start(function), end(function), CALLS[name])
            case ast.Call(func=ast.Attribute(attr=name) as function) if name in CALLS:
                yield change(end(function) - len(name), end(function), CALLS[name])


def _values(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that are computed with: no annotations, decorators, messages or docstrings."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        if isinstance(node, ast.Assert) and name == "msg":
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                yield from _values(child)


def tests_of(module: str) -> list[str]:
    """Return the test files of a module: by the table, or of its name. Raises SystemExit where there are none."""
    path = Path(module)
    named = TESTS.get(module)
    if named:
        return named
    found = sorted((ROOT / "tests").rglob(f"test_{path.stem}.py"))
    if not found:
        raise SystemExit(f"{module}: no tests/*/test_{path.stem}.py; name the files with --tests")
    return [str(file.relative_to(ROOT)) for file in found]


def copy_of_repository(folder: Path) -> None:
    """Copy what git tracks or would track, as it is now."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


class Run(NamedTuple):
    """One run of the tests."""

    passed: bool
    seconds: float
    """CPU seconds."""


def run_tests(folder: Path, tests: list[str], match: str, limit: int | None, output: Path) -> Run:
    """Run the tests in a copy of the repository, in a forked process, until the first failure."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            if limit:
                resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.chdir(folder)
            sys.dont_write_bytecode = True  # two changes of one second and size would share it
            import pytest

            options = ["-x", "-q", "-n0", "--tb=line", "-k", match, "-p", "no:cacheprovider"]
            code = int(pytest.main([*options, f"--rootdir={folder}", *tests]))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, seconds)


def main() -> None:
    """Parse the command line, run the mutations, and print the survivors."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("module", help="a source file, such as minglm/rl/grpo.py")
    parser.add_argument("--count", type=int, default=20, help="mutations to draw; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--tests", nargs="*", help="test files, where they are not found by name")
    parser.add_argument("--match", default="", help="only tests with these names, as pytest's -k")
    parser.add_argument("--lines", nargs="*", type=int, help="only changes of these lines")
    options = parser.parse_args()
    module = str((ROOT / options.module).relative_to(ROOT))
    tests = options.tests or tests_of(module)

    source = (ROOT / module).read_text(encoding="utf-8")
    drawn = list(mutations(source))
    sites = len(drawn)
    if options.lines:
        drawn = [mutation for mutation in drawn if mutation.line in options.lines]
    if 0 < options.count < len(drawn):
        drawn = random.Random(options.seed).sample(drawn, options.count)

    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "TRITON_INTERPRET": "1"}
    import einops  # noqa: F401  # imported once, before the forks
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        folder = Path(name)
        output = folder / "output.txt"
        copy_of_repository(folder)
        unchanged = run_tests(folder, tests, options.match, None, output)
        if not unchanged.passed:
            raise SystemExit(f"{module}: its own tests fail\n{output.read_text(encoding='utf-8')}")
        limit = int(FACTOR * unchanged.seconds + SPARE)

        survivors = []
        began = time.monotonic()
        for mutation in sorted(drawn, key=lambda mutation: mutation.line):
            (folder / module).write_text(mutation.source, encoding="utf-8")
            if run_tests(folder, tests, options.match, limit, output).passed:
                survivors.append(mutation)
                text = mutation.source.splitlines()[mutation.line - 1].strip()
                print(
                    f"{module}:{mutation.line}: {mutation.was!r} -> {mutation.becomes!r}: {text}",
                    flush=True,
                )
    killed = len(drawn) - len(survivors)
    print(
        f"{module}: {killed} of {len(drawn)} killed ({sites} possible, {time.monotonic() - began:.0f} s)"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
