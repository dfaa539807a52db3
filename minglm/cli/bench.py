"""The verb `bench`: measure speed beside baselines (no section in the paper).

bench generate, bench train   tokens per second beside transformers, as a record and a figure
bench rl                      a step of reinforcement learning beside trl, rollout and update apart
bench rl_async                  reward per second of asynchronous beside synchronous training, with slow environments
bench kernels                 every form of each operation, as a share of this GPU's ceilings
bench compile                 registers, shared memory and instructions of GPU kernels for an H100, without one
bench scale                   on one GPU: a run with the code of many ranks, a layer and Muon's step of the 355B
bench collectives             bytes per second of each collective along each axis of a layout, under torchrun
"""

import argparse
from pathlib import Path

from minglm.bench.options import BenchOptions
from minglm.cli.arguments import file, folder, number, whole

WHAT = ("generate", "train", "rl", "rl_async", "kernels", "compile", "scale", "collectives")


SUMMARIES = {
    "generate": "Tokens per second of generation beside transformers on the same weights.",
    "train": "Tokens per second of training beside transformers on the same weights.",
    "rl": "A step of reinforcement learning beside trl's GRPOTrainer on the same weights.",
    "rl_async": "Reward per second of asynchronous beside synchronous training, with slow environments.",
    "compile": "What the GPU kernels need of an H100, compiled without one.",
    "scale": "On one GPU: training with the code of many ranks, a checkpoint beside it, a layer and Muon's step of the 355B.",
    "collectives": "Bytes per second of each collective along each axis of a layout, under torchrun.",
    "kernels": "Every form of each operation, as a share of the ceilings measured in the same run.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `bench`; one subcommand a benchmark."""
    benchmarks = parser.add_subparsers(dest="what", required=True, metavar="|".join(WHAT))
    for name in ("generate", "train", "rl", "rl_async", "compile"):
        benchmark = benchmarks.add_parser(name, help=SUMMARIES[name], description=SUMMARIES[name])
        _add_common(benchmark)
    kernels = benchmarks.add_parser(
        "kernels", help=SUMMARIES["kernels"], description=SUMMARIES["kernels"]
    )
    _add_kernels(kernels)
    whole_script = benchmarks.add_parser(
        "scale", help=SUMMARIES["scale"], description=SUMMARIES["scale"]
    )
    _add_scale(whole_script)
    links = benchmarks.add_parser(
        "collectives", help=SUMMARIES["collectives"], description=SUMMARIES["collectives"]
    )
    _add_collectives(links)
    parser.set_defaults(overrides=())


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the benchmarks that run on a CPU."""
    default = BenchOptions()
    parser.add_argument("config", nargs="?", default="configs/toy.py", help="a config file")
    parser.add_argument(
        "--batches",
        type=whole(1, 10**6),
        nargs="+",
        default=default.batches,
        help="answers at once",
    )
    parser.add_argument(
        "--prompt", type=whole(1, 10**6), default=default.prompt, help="tokens of each prompt"
    )
    parser.add_argument(
        "--tokens", type=whole(1, 10**6), default=default.tokens, help="tokens of each answer"
    )
    parser.add_argument(
        "--train-tokens",
        type=whole(1, 10**6),
        default=default.train_tokens,
        help="tokens of a training batch",
    )
    parser.add_argument(
        "--repeats",
        type=whole(1, 10**6),
        default=default.repeats,
        help="turns of each side; the best counts",
    )
    parser.add_argument(
        "--out", type=folder, default="figures", help="folder of the record and the figure"
    )


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kernels`."""
    parser.add_argument("--only", nargs="+", default=[], metavar="OPERATION", help="default: all")
    parser.add_argument(
        "--rounds", type=whole(1, 10**6), default=20, help="turns of each form; the median counts"
    )
    parser.add_argument(
        "--seconds",
        type=number(0, 10**6, above=True),
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
    parser.add_argument("--out", type=file, default="figures/bench_kernels.json", help="the record")


def _add_scale(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `scale`."""
    parser.add_argument("config", nargs="?", default="configs/mini.py", help="what is trained")
    parser.add_argument(
        "--large",
        default="configs/glm45_355b.py:h100x512",
        metavar="CONFIG",
        help="whose layer and matrices are measured, as its layout gives them to one GPU (default: %(default)s)",
    )
    parser.add_argument("--steps", type=whole(1, 10**6), default=300, help="steps of the training")
    parser.add_argument(
        "--tokens", type=whole(1, 10**9), default=131_072, help="tokens of each step"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="also without a GPU, which shows only that the script runs",
    )
    parser.add_argument("--out", type=file, default="figures/bench_scale.json", help="the record")


def _add_collectives(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `collectives`."""
    parser.add_argument("config", help="a config file, whose layout is measured")
    parser.add_argument(
        "--megabytes",
        type=number(0, 10**5, above=True),
        nargs="+",
        default=[1, 16, 256],
        help="sizes: MiB that each rank gets",
    )
    parser.add_argument(
        "--rounds", type=whole(1, 10**6), default=10, help="rounds of each; the median counts"
    )
    parser.add_argument("--out", type=file, metavar="FILE", help="write the record here, as JSON")


def main(args: argparse.Namespace) -> None:
    """Run one benchmark and print the paths of its record and its figure.

    Raises ValueError for options out of range.
    """
    if args.what == "kernels":
        _bench_kernels(args)
        return
    if args.what == "collectives":
        _bench_collectives(args)
        return
    if args.what == "scale":
        _bench_scale(args)
        return
    from minglm.common.files import check_out

    options = BenchOptions(
        batches=tuple(args.batches),
        prompt=args.prompt,
        tokens=args.tokens,
        train_tokens=args.train_tokens,
        repeats=args.repeats,
    )
    check_out(args.out)
    from minglm.bench.plots import redraw
    from minglm.bench.run import run
    from minglm.config import load_config

    path = run(args.what, load_config(args.config, args.overrides), options, args.out)
    print(path)
    print(redraw(path))


def _bench_kernels(args: argparse.Namespace) -> None:
    """Run `bench kernels`."""
    if args.overrides:
        raise ValueError(f"bench kernels: unknown words: {' '.join(args.overrides)}")
    from minglm.common.files import check_out

    check_out(Path(args.out).parent)
    import torch

    from minglm.bench.kernels import Schedule, require_gpu, run
    from minglm.bench.plots import redraw
    from minglm.common.device import pick_device
    from minglm.kernels.dispatch import call_of, triton, use

    device = pick_device(args.device)
    require_gpu(device, args.smoke)
    use(args.kernels)
    # This raises an error for Triton on a CPU outside its interpreter.
    triton(call_of(torch.empty(0, device=device)))
    out = Path(args.out)
    run(device, args.only, out, Schedule(args.rounds, args.seconds), args.smoke)
    print(out, redraw(out))


def _bench_scale(args: argparse.Namespace) -> None:
    """Run `bench scale`.

    Raises ValueError without a GPU, unless `--smoke` says that numbers do not matter.
    """
    from minglm.common.device import pick_device
    from minglm.common.files import check_out, write_json
    from minglm.config import load_config

    run = load_config(args.config, args.overrides)
    large = load_config(args.large)
    out = Path(args.out)
    check_out(out.parent)
    if pick_device(run.device).type != "cuda" and not args.smoke:
        raise ValueError("bench scale measures a GPU, and there is none; --smoke runs it on a CPU")
    from minglm.bench.scale import scale

    write_json(out, scale(run, large, run.device, args.steps, args.tokens))
    print(out)


def _bench_collectives(args: argparse.Namespace) -> None:
    """Run `bench collectives` on every rank; the first one prints."""
    from minglm.bench import collectives
    from minglm.common.files import write_json
    from minglm.config import load_config
    from minglm.parallel.world import start_world

    run = load_config(args.config, args.overrides)
    world = start_world(run.device, run.parallel.timeout_seconds)
    try:
        if world.size == 1:
            raise ValueError(
                "one rank has no links; start several with torchrun, as `minglm launch` does"
            )
        layout = run.parallel.layout(world.size, run.model)
        sizes = [round(size * 2**20) for size in args.megabytes]
        links = collectives.measure(world, layout, sizes, args.rounds)
        if world.is_writer:
            print(collectives.table(links))
            if args.out:
                write_json(args.out, collectives.record(world, layout, links))
    finally:
        world.close()
