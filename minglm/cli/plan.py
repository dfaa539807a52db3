"""The verb `plan`: estimate what a config needs before it is started (paper 2.1, Table 1)."""

import argparse
import json

from minglm.cli.arguments import add_config, number, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan`."""
    add_config(parser, example="configs/glm45_355b.py")
    parser.add_argument("--gpus", type=whole(1, 10**7), default=1, help="number of GPUs")
    parser.add_argument(
        "--gpu-memory-gib",
        type=number(0, 10**6, above=True),
        default=80.0,
        help="memory of one GPU",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def main(args: argparse.Namespace) -> None:
    """Print what a config needs: parameters, memory per GPU by term, compute, traffic, time and cost."""
    from minglm.config import load_config
    from minglm.plan import memory

    config = load_config(args.config, args.overrides)
    plan = memory.plan(config, args.gpus, args.gpu_memory_gib)
    print(json.dumps(plan, indent=1) if args.json else memory.render(plan))
