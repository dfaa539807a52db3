"""The verb `plan`: estimate what a config needs before it is started (paper 2.1, Table 1)."""

import argparse
import json
from dataclasses import replace

from minglm.cli.arguments import add_config, file, number, refuse_idle, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan`."""
    from minglm.plan.gpus import GPUS

    add_config(parser, example="configs/glm45_355b.py")
    parser.add_argument(
        "--gpus", type=whole(1, 10**6), default=0, help="number of GPUs (default: the config's)"
    )
    parser.add_argument("--gpu", choices=list(GPUS), default="h100", help="kind of GPU")
    parser.add_argument(
        "--gpu-memory-gib", type=number(0, 10**6, above=True), help="memory of one GPU, if other"
    )
    parser.add_argument(
        "--gpus-per-node", type=whole(1, 10**4), help="GPUs joined by NVLink, if other"
    )
    parser.add_argument(
        "--dollars", type=number(0, 10**4), default=2.0, help="price of one GPU-hour"
    )
    parser.add_argument(
        "--search", action="store_true", help="compare every layout of these GPUs that fits"
    )
    parser.add_argument("--figure", type=file, metavar="FILE", help="draw the plan as a PNG file")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="CONFIG",
        help="draw another config in the figure too; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def main(args: argparse.Namespace) -> None:
    """Print what a config needs: parameters, memory per GPU by term, traffic, time and cost.

    All of it is arithmetic on the config and on data sheets; `minglm launch CONFIG --dry-run` builds the real model.
    """
    from minglm.config import load_config
    from minglm.plan.gpus import GPUS
    from minglm.plan.summary import plan, search
    from minglm.plan.text import render, render_search
    from minglm.recipe.inputs import check_environments, check_sources

    if not args.figure:
        refuse_idle({"--beside": args.beside or None}, "without --figure")
    run = load_config(args.config, args.overrides)
    check_environments(run)
    check_sources(run)
    gpu = GPUS[args.gpu]
    if args.gpu_memory_gib:
        gpu = replace(gpu, memory_gib=args.gpu_memory_gib)
    if args.gpus_per_node:
        gpu = replace(gpu, per_node=args.gpus_per_node)
    planned = plan(run, gpu, args.gpus, args.dollars)
    found = search(run, gpu, planned["gpus"], pipelines=True) if args.search else []
    if args.search:
        planned["search"] = [c._asdict() | {"layout": c.layout._asdict()} for c in found]
    if args.json:
        print(json.dumps(planned, indent=1))
    elif args.search:
        print(render_search(found, planned["usable"], planned["gpus"]))
    else:
        print(render(planned))
    if args.figure:
        from minglm.plan.figure import draw
        from minglm.report.drawing import save

        others = [plan(load_config(config), gpu, 0, args.dollars) for config in args.beside]
        print(save(draw([planned, *others]), args.figure))
