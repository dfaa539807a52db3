"""The verb `bench`: measure speed beside baselines (no section in the paper).

bench generate, bench train   tokens per second beside transformers, as a record and a figure
bench kernels                 every form of each operation, as a share of this GPU's ceilings
bench compile                 registers, shared memory and instructions of GPU kernels for an H100, without one
"""

import argparse
from collections.abc import Sequence

WHAT = ("generate", "train", "kernels", "compile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `bench`; one subcommand a benchmark."""
    benchmarks = parser.add_subparsers(dest="what", required=True, metavar="|".join(WHAT))
    for name in ("generate", "train", "compile"):
        benchmark = benchmarks.add_parser(name, help=SUMMARIES[name], description=SUMMARIES[name])
        _add_common(benchmark)
    kernels = benchmarks.add_parser(
        "kernels", help=SUMMARIES["kernels"], description=SUMMARIES["kernels"]
    )
    _add_kernels(kernels)
    parser.set_defaults(overrides=())


SUMMARIES = {
    "generate": "Tokens per second of generation beside transformers on the same weights.",
    "train": "Tokens per second of training beside transformers on the same weights.",
    "compile": "What the GPU kernels need of an H100, compiled without one.",
    "kernels": "Every form of each operation, as a share of the ceilings measured in the same run.",
}


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", default="configs/toy.py", help="a config file")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8, 64, 256], help="answers at once"
    )
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--train-tokens", type=int, default=2048, help="tokens of a training batch")
    parser.add_argument(
        "--repeats", type=int, default=3, help="turns of each side; the best counts"
    )
    parser.add_argument("--out", default="figures", help="folder of the record and the figure")


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", default=[], metavar="OPERATION", help="default: all")
    parser.add_argument(
        "--rounds", type=int, default=20, help="turns of each form; the median counts"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=3.0,
        help="seconds for one case, after which each form gets three turns at most",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--kernels",
        default="auto",
        choices=["auto", "torch", "triton"],
        help="which form of minglm is measured",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="toy sizes: shows only that the benchmark runs"
    )
    parser.add_argument("--out", default="figures/bench_kernels.json", help="the record")


def main(args: argparse.Namespace) -> None:
    """Measure generation, training or kernels beside baselines; `compile` inspects GPU kernels for an H100."""
    if args.what == "kernels":
        _bench_kernels(args)
        return
    sizes: Sequence[int] = (args.prompt, args.tokens, args.train_tokens, args.repeats)
    if min(*sizes, *args.batches) < 1:
        raise ValueError(
            "--batches, --prompt, --tokens, --train-tokens and --repeats must be at least 1"
        )
    from minglm.bench import generate
    from minglm.config import load_config

    config = load_config(args.config, args.overrides)
    for path in generate.run(args.what, config, args):
        print(path)


def _bench_kernels(args: argparse.Namespace) -> None:
    if args.overrides:
        raise ValueError(f"bench kernels: unknown words: {' '.join(args.overrides)}")
    if args.rounds < 1:
        raise ValueError("--rounds must be at least 1")
    from minglm.bench import kernels

    kernels.command(args)
