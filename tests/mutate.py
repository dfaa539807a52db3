"""Change one operator, constant or bound of a module at a time, and record which changes its own tests do not notice.

    python tests/mutate.py                                                every module of HEARTS
    python tests/mutate.py minglm/rl/grpo.py --count 40 --seconds 300     this one, 40 changes, five minutes at most
    python tests/mutate.py minglm/rl/grpo.py --again                      only what survived, after a new test
    python tests/mutate.py --table                                        tests/mutations.md, from the records

A change that survives is either equivalent (nothing that the module promises differs) or a hole in the tests. Which of
the two is written into the record by hand: verdict "equivalent", and why. Not part of the default run: a change costs
as much as the module's tests. The source stays as it is; the changes are made in a temporary copy of the repository.
Each runs in a process of its own, forked from one that has imported torch.

Choices
- What a bound is worth shows at the bound, so `<` becomes `<=`, `min` becomes `max`, and numbers grow by one.
- Not changed: annotations, decorators, texts, and what an error message prints.
- Records are tests/mutations/MODULE.json, one change each. What is recorded is not run again, so a sample that was
  stopped continues; a record whose line has changed is dropped, and another change is drawn for it.
- Limits are in CPU seconds, so a busy machine kills no mutation. A counterexample is not made smaller.
"""

import argparse
import ast
import itertools
import json
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
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "tests" / "mutations"
TABLE = ROOT / "tests" / "mutations.md"
FACTOR = 5  # a mutation may take this many times the CPU seconds of the unchanged module
SPARE = 10  # and this many more CPU seconds

HEARTS = {
    "minglm/common/statistics.py": ["tests/rl/test_curriculum.py"],
    "minglm/data/cleaning/decontaminate.py": ["tests/data/test_decontaminate.py"],
    "minglm/data/cleaning/minhash.py": ["tests/data/test_minhash.py"],
    "minglm/data/cleaning/quality.py": [
        "tests/data/test_quality.py",
        "tests/data/test_quality_languages.py",
    ],
    "minglm/data/cleaning/semdedup.py": ["tests/data/test_minhash.py"],
    "minglm/data/cleaning/shingles.py": [
        "tests/data/test_minhash.py",
        "tests/data/test_decontaminate.py",
    ],
    "minglm/data/fim.py": ["tests/data/test_fim.py"],
    "minglm/data/mixture.py": ["tests/data/test_mixture.py"],
    "minglm/data/packing.py": ["tests/data/test_packing.py"],
    "minglm/eval/needles.py": ["tests/eval/test_needles.py"],
    "minglm/eval/text.py": ["tests/eval/test_eval.py"],
    "minglm/inference/kv_cache.py": ["tests/inference/test_kv_cache.py"],
    "minglm/inference/logit_rules.py": ["tests/inference/test_rules.py"],
    "minglm/inference/sampling.py": [
        "tests/inference/test_sampling.py",
        "tests/inference/test_rules.py::test_allowed_ids_biases_and_least_lengths",
    ],
    "minglm/inference/speculative.py": [
        "tests/inference/test_speculative.py",
        "tests/inference/test_rules.py",
    ],
    "minglm/kernels/attention/chunked.py": [
        "tests/model/test_attention.py",
        "tests/kernels/test_kernels.py",
    ],
    "minglm/kernels/attention/eager.py": ["tests/model/test_attention.py"],
    "minglm/kernels/cross_entropy/chunked.py": [
        "tests/kernels/test_kernels.py::test_linear_cross_entropy_equals_the_plain_form",
        "tests/kernels/test_kernels.py::test_all_masked_is_exactly_zero",
        "tests/kernels/test_kernels.py::test_masked_tokens_are_never_read",
        "tests/kernels/test_kernels.py::test_extreme_logits_stay_finite",
        "tests/kernels/test_kernels.py::test_bfloat16_is_summed_in_float32",
        "tests/kernels/test_kernels.py::test_chunks_of_a_gpu_are_even",
        "tests/kernels/test_kernels.py::test_a_chunk_of_a_gpu_is_2048_tokens",
        "tests/kernels/test_kernels.py::test_logits_are_in_memory_a_chunk_at_a_time",
        "tests/kernels/test_triton_cross_entropy.py::test_the_switch_and_the_mask",
        "tests/kernels/test_triton_cross_entropy.py::test_loss_and_its_gradients",
        "tests/kernels/test_triton_cross_entropy.py::test_a_second_backward_pass_is_refused",
    ],
    "minglm/kernels/cross_entropy/eager.py": [
        "tests/kernels/test_kernels.py::test_plain_form_is_its_equation",
        "tests/kernels/test_kernels.py::test_token_log_probabilities",
    ],
    "minglm/kernels/experts/eager.py": ["tests/model/test_moe.py"],
    "minglm/kernels/experts/grouped.py": [
        "tests/kernels/test_kernels.py",
        "tests/model/test_moe.py",
    ],
    "minglm/kernels/fp8/eager.py": [
        "tests/kernels/test_fp8.py",
        "tests/kernels/test_triton_fp8.py",
    ],
    "minglm/kernels/newton_schulz/eager.py": ["tests/optim/test_muon.py"],
    "minglm/kernels/newton_schulz/polynomials.py": ["tests/optim/test_muon.py"],
    "minglm/kernels/norm/eager.py": [
        "tests/kernels/test_kernels.py::test_norm_by_hand_is_that_of_autograd",
        "tests/kernels/test_kernels.py::test_the_plain_norm_of_bfloat16_is_rounded_before_the_weight",
    ],
    "minglm/kernels/norm/fused.py": [
        "tests/kernels/test_kernels.py::test_norm_by_hand_is_that_of_autograd",
    ],
    "minglm/kernels/qk_norm_rope/eager.py": [
        "tests/kernels/test_kernels.py::test_norm_and_rotation_by_hand_are_those_of_autograd",
    ],
    "minglm/kernels/qk_norm_rope/fused.py": [
        "tests/kernels/test_kernels.py::test_norm_and_rotation_by_hand_are_those_of_autograd",
    ],
    "minglm/kernels/router/eager.py": ["tests/model/test_router.py", "tests/model/test_moe.py"],
    "minglm/model/balance.py": ["tests/model/test_balance.py"],
    "minglm/model/mla.py": ["tests/model/test_mla.py"],
    "minglm/model/moe.py": ["tests/model/test_moe.py"],
    "minglm/model/mtp.py": ["tests/model/test_mtp.py"],
    "minglm/model/rope.py": ["tests/model/test_rope.py"],
    "minglm/model/router.py": ["tests/model/test_router.py"],
    "minglm/optim/muon.py": ["tests/optim/test_muon.py"],
    "minglm/optim/schedule.py": ["tests/optim/test_schedule.py"],
    "minglm/plan/counts.py": ["tests/plan/test_plan.py"],
    "minglm/plan/layout.py": ["tests/plan/test_memory.py", "tests/plan/test_plan.py"],
    "minglm/plan/memory.py": ["tests/plan/test_memory.py", "tests/plan/test_plan.py"],
    "minglm/plan/speed.py": ["tests/plan/test_memory.py", "tests/plan/test_plan.py"],
    "minglm/rewards/pathology.py": ["tests/rewards/test_pathology.py"],
    "minglm/rewards/shaping.py": ["tests/rewards/test_shaping.py"],
    "minglm/rl/aggregation.py": ["tests/rl/test_aggregation.py"],
    "minglm/rl/curriculum.py": ["tests/rl/test_curriculum.py"],
    "minglm/rl/distill.py": ["tests/rl/test_distill.py"],
    "minglm/rl/grpo.py": ["tests/rl/test_grpo.py"],
    "minglm/rl/losses.py": ["tests/rl/test_losses.py"],
    "minglm/rl/temperature.py": ["tests/rl/test_temperature.py"],
    "minglm/rl/trainer.py": [
        "tests/rl/test_auxiliary.py::test_the_mtp_loss_is_its_definition",
        "tests/rl/test_trainer.py",
    ],
    "minglm/train/guard.py": ["tests/train/test_guard.py"],
    "minglm/train/loss.py": [
        "tests/train/test_loop.py::test_loss_is_the_mean_over_targets",
        "tests/train/test_loop.py::test_targets_lie_ahead",
        "tests/train/test_loop.py::test_losses_of_parts_add_up",
        "tests/train/test_loop.py::test_bias_steps_once_from_the_loads_of_the_whole_batch",
        "tests/train/test_loop.py::test_a_step_of_dense_layers",
        "tests/train/test_loop.py::test_padding_is_not_in_the_load",
        "tests/train/test_loop.py::test_a_batch_without_targets_changes_no_weight_by_gradient",
    ],
    "minglm/train/sft.py": [
        "tests/train/test_sft.py::test_the_phase_warms_up_and_falls_to_a_tenth",
        "tests/train/test_sft.py::test_what_balances_the_experts_is_asked_for",
    ],
}
"""The modules with a numeric heart, and the tests that guard each: files, or single tests of a file."""

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
    column: int
    """Characters of the line before it."""
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
        line = encoded[:first].count(b"\n")
        column = len(encoded[starts[line] : first].decode())
        was = encoded[first:last].decode()
        return Mutation(line + 1, column, was, becomes, changed.decode())

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


class Verdict(StrEnum):
    """What became of a change."""

    KILLED = "killed"
    """A test failed, or took too long."""
    SURVIVED = "survived"
    """No test noticed it: a hole, until it is judged."""
    EQUIVALENT = "equivalent"
    """Nothing that the module promises differs; the record says why."""


@dataclass
class Entry:
    """One recorded change."""

    line: int
    text: str
    """The line, without its indentation."""
    column: int
    """Where in the text the change is."""
    was: str
    becomes: str
    verdict: Verdict
    why: str = ""
    """Why it is equivalent."""


Place = tuple[str, int, str, int]
"""Text, column, what it becomes, and which of the lines with this text."""


def places(source: str, changes: list[Mutation]) -> dict[Place, Mutation]:
    """Return every change by where it is, so that it is found again when lines above it come and go."""
    lines = source.splitlines()
    found: dict[Place, Mutation] = {}
    for change in changes:
        line = lines[change.line - 1]
        text = line.strip()
        same_before = sum(other.strip() == text for other in lines[: change.line - 1])
        column = change.column - (len(line) - len(line.lstrip()))
        found[text, column, change.becomes, same_before] = change
    return found


def read_entries(module: str) -> list[Entry]:
    """Return the record of a module; an empty list without one."""
    path = record_of(module)
    if not path.exists():
        return []
    entries = []
    for values in json.loads(path.read_text(encoding="utf-8")):
        verdict = Verdict(values.pop("verdict"))
        entries.append(Entry(**values, verdict=verdict))
    return entries


def write_entries(module: str, entries: list[Entry]) -> None:
    """Store the record of a module, one change a line, in the order of the source."""
    entries.sort(key=lambda entry: (entry.line, entry.column, entry.becomes))
    lines = [json.dumps(asdict(entry), ensure_ascii=False) for entry in entries]
    RECORDS.mkdir(exist_ok=True)
    record_of(module).write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def record_of(module: str) -> Path:
    """Return the file of a module's record."""
    name = module.removeprefix("minglm/").removesuffix(".py").replace("/", ".")
    return RECORDS / f"{name}.json"


def still_there(entries: list[Entry], found: dict[Place, Mutation]) -> dict[Place, Entry]:
    """Return the entries whose change can still be made, by place, with the line where it is now."""
    kept: dict[Place, Entry] = {}
    for entry in entries:
        for same_before in itertools.count():
            place = (entry.text, entry.column, entry.becomes, same_before)
            if place not in found:
                break
            if place not in kept:
                entry.line = found[place].line
                kept[place] = entry
                break
    return kept


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


def run_tests(folder: Path, tests: list[str], limit: int | None) -> Run:
    """Run the tests in a copy of the repository, in a forked process, until the first failure.

    limit: CPU seconds; None for the unchanged source.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            if limit:
                resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
            output = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(folder)
            # Two changes of one second and size would share their bytecode; the first run keeps that of the rest.
            sys.dont_write_bytecode = limit is not None
            import pytest

            options = ["-x", "-q", "-n0", "--tb=line", "-m", "not slow", "-p", "no:cacheprovider"]
            code = int(pytest.main([*options, f"--rootdir={folder}", *tests]))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, seconds)


OUTPUT = "output.txt"


class Sample(NamedTuple):
    """How much of a module is tried."""

    count: int
    """Changes; 0: all."""
    seed: int
    """Seed of the draw."""
    again: bool
    """Only those that survived before."""


def work_on(module: str, tests: list[str], sample: Sample, folder: Path, until: float) -> None:
    """Try changes of a module, and record what became of each as soon as it is known. until: a monotonic time."""
    source = (ROOT / module).read_text(encoding="utf-8")
    found = places(source, list(mutations(source)))
    kept = still_there(read_entries(module), found)
    if sample.again:
        todo = [place for place, entry in kept.items() if entry.verdict == Verdict.SURVIVED]
    else:
        rest = [place for place in found if place not in kept]
        random.Random(sample.seed).shuffle(rest)
        todo = rest[: max(0, sample.count - len(kept))] if sample.count else rest
    write_entries(module, list(kept.values()))
    if not todo:
        return

    unchanged = run_tests(folder, tests, None)
    if not unchanged.passed:
        output = (folder / OUTPUT).read_text(encoding="utf-8")
        raise SystemExit(f"{module}: its own tests fail\n{output}")
    for kept_bytecode in (folder / module).parent.glob(f"__pycache__/{Path(module).stem}.*"):
        kept_bytecode.unlink()
    limit = int(FACTOR * unchanged.seconds + SPARE)
    began = time.monotonic()
    survivors = 0
    tried = 0
    for place in todo:
        if time.monotonic() > until:
            break
        change = found[place]
        (folder / module).write_text(change.source, encoding="utf-8")
        passed = run_tests(folder, tests, limit).passed
        verdict = Verdict.SURVIVED if passed else Verdict.KILLED
        text, column, becomes, _ = place
        kept[place] = Entry(change.line, text, column, change.was, becomes, verdict)
        write_entries(module, list(kept.values()))
        tried += 1
        if passed:
            survivors += 1
            print(f"{module}:{change.line}: {change.was!r} -> {becomes!r}: {text}", flush=True)
    (folder / module).write_text(source, encoding="utf-8")
    seconds = time.monotonic() - began
    print(
        f"{module}: {tried - survivors} of {tried} killed in {seconds:.0f} s "
        f"({len(todo) - tried} to do, unchanged {unchanged.seconds:.0f} s)",
        flush=True,
    )


def write_table() -> None:
    """Write the table of all records, every equivalent change with its reason, and what is left."""
    rows = []
    untried = []
    possible = 0
    equivalents = []
    left = []
    totals = dict.fromkeys(Verdict, 0)
    for module in HEARTS:
        source = (ROOT / module).read_text(encoding="utf-8")
        found = places(source, list(mutations(source)))
        entries = list(still_there(read_entries(module), found).values())
        counts = dict.fromkeys(Verdict, 0)
        for entry in entries:
            counts[entry.verdict] += 1
            totals[entry.verdict] += 1
            change = f"`{entry.text}`, `{entry.was}` to `{entry.becomes or 'nothing'}`"
            where = f"- {module}, line {entry.line}: {change}"
            if entry.verdict == Verdict.EQUIVALENT:
                equivalents.append(f"{where}: {entry.why}")
            elif entry.verdict == Verdict.SURVIVED:
                left.append(where)
        if entries:
            rows.append(_row(module, len(found), counts))
            possible += len(found)
        else:
            untried.append(module)
    text = [
        "# Which changes of the source its tests notice",
        "",
        "Made by `python tests/mutate.py --table` from the records in tests/mutations/. A change is one operator,",
        "constant or bound; it is killed when the module's own tests fail. The share counts the changes that are not",
        "equivalent.",
        "",
        "| module | possible | tried | killed | equivalent | left | share killed |",
        "|---|---|---|---|---|---|---|",
        *rows,
        _row("all", possible, totals),
        "",
        f"Not tried: {', '.join(untried) or 'none'}.",
        "",
        "## Left",
        "",
        *(left or ["None."]),
        "",
        "## Equivalent, and why",
        "",
        *(equivalents or ["None."]),
        "",
    ]
    TABLE.write_text("\n".join(text), encoding="utf-8")


def _row(name: str, possible: int, counts: dict[Verdict, int]) -> str:
    """Format one row of the table."""
    killed = counts[Verdict.KILLED]
    equivalent = counts[Verdict.EQUIVALENT]
    left = counts[Verdict.SURVIVED]
    judged = killed + left
    share = f"{100 * killed / judged:.1f}%" if judged else "n/a"
    tried = judged + equivalent
    return f"| {name} | {possible} | {tried} | {killed} | {equivalent} | {left} | {share} |"


def main() -> None:
    """Parse the command line, and run the changes or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", help="source files; none: every module of HEARTS")
    parser.add_argument("--count", type=int, default=12, help="changes of a module; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--again", action="store_true", help="only what survived before")
    parser.add_argument("--table", action="store_true", help="write tests/mutations.md")
    options = parser.parse_args()
    if options.table:
        write_table()
        return
    modules = [str((ROOT / module).relative_to(ROOT)) for module in options.modules or HEARTS]
    for module in modules:
        if module not in HEARTS:
            raise SystemExit(f"{module}: not in HEARTS; add it there, with its tests")

    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "TRITON_INTERPRET": "1"}
    os.environ["HYPOTHESIS_PROFILE"] = "mutate"
    import einops  # noqa: F401  # imported once, before the forks
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401

    until = time.monotonic() + options.seconds
    sample = Sample(options.count, options.seed, options.again)
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        folder = Path(name)
        copy_of_repository(folder)
        for module in modules:
            if time.monotonic() < until:
                work_on(module, HEARTS[module], sample, folder, until)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
