"""Run one benchmark by name and store its record (no counterpart in the paper).

A record is a dictionary that JSON can hold: `bench`, the name; `versions`, with device and commit; and what
the benchmark measured. It goes to figures/bench_NAME.json, and `minglm.bench.plots` draws the figure from
that file.
"""

from pathlib import Path
from typing import Any

from minglm.bench.options import BenchOptions
from minglm.common.files import write_json
from minglm.common.version import versions
from minglm.config.run import RunConfig


def measure(name: str, config: RunConfig, options: BenchOptions) -> dict[str, Any]:
    """Run the benchmark `name` (generate, train, rl, rl_async or compile) and return what it measured."""
    # The benchmarks are imported here, so that the names and options cost no import of torch.
    if name == "generate":
        from minglm.bench.generate import generate

        return generate(config, options)
    if name == "train":
        from minglm.bench.train import train

        return train(config, options)
    if name == "rl":
        from minglm.bench.rl import rl

        return rl(config, options)
    if name == "rl_async":
        from minglm.bench.rl_async import rl_async

        return rl_async(config, options)
    if name == "compile":
        from minglm.bench.compile import compile_kernels

        return compile_kernels()
    raise ValueError(
        f"bench {name}: no such benchmark; there are generate, train, rl, rl_async, compile, kernels"
    )


def run(name: str, config: RunConfig, options: BenchOptions, out: str | Path) -> Path:
    """Run one benchmark and write its record to `out`/bench_NAME.json; return that path."""
    record = {
        "bench": name,
        "config": config.name,
        "versions": versions(),
        "repeats": options.repeats,
    }
    record |= measure(name, config, options)
    path = Path(out) / f"bench_{name}.json"
    write_json(path, record)
    return path
