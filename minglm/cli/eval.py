"""The verb `eval`: score a run on the held-out tasks (paper 4)."""

import argparse
import dataclasses
import itertools
import json
from contextlib import closing

from minglm.cli.arguments import add_run, whole
from minglm.config.posttraining import MOST_PROBLEMS, MOST_SAMPLES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `eval`."""
    add_run(parser)
    parser.add_argument(
        "--problems", type=whole(1, MOST_PROBLEMS), help="problems per task (default: the config's)"
    )
    parser.add_argument(
        "--samples",
        type=whole(1, MOST_SAMPLES),
        help="answers k per problem (default: the config's)",
    )
    parser.add_argument("--task", action="append", help="score only this task; may be repeated")
    parser.add_argument("--json", action="store_true", help="print records as JSON lines")


def main(args: argparse.Namespace) -> None:
    """Score a run on the held-out tasks: avg@k and pass@k with 95% intervals, thinking on and off."""
    from minglm.envs import ENVIRONMENTS
    from minglm.eval import tasks
    from minglm.inference import Engine
    from minglm.inference.client import EngineGenerator
    from minglm.recipe.load import load_run

    names = args.task or list(ENVIRONMENTS)
    for name in names:
        if name not in ENVIRONMENTS:
            raise ValueError(
                f"--task {name}: no such task; the tasks are {', '.join(ENVIRONMENTS)}"
            )
    loaded = load_run(args.run, args.stage)
    options = {"problems": args.problems, "samples": args.samples}
    changes = {name: value for name, value in options.items() if value is not None}
    settings = dataclasses.replace(loaded.config.evaluation, **changes)
    with closing(EngineGenerator(Engine(loaded.model, loaded.tokenizer))) as generator:
        for name, thinking in itertools.product(names, (True, False)):
            record, _ = tasks.tasks(
                generator,
                loaded.tokenizer,
                ENVIRONMENTS[name],
                settings,
                thinking,
                loaded.config.seed,
            )
            if args.json:
                print(json.dumps({"stage": loaded.stage, **record}), flush=True)
            else:
                print(_line(name, thinking, record), flush=True)


def _line(name: str, thinking: bool, record: dict) -> str:
    """Format one record of an evaluation for people."""
    mode = "thinking" if thinking else "direct"
    k = record["k"]
    interval = f"({record['low']:.3f} to {record['high']:.3f})"
    return f"{name:13} {mode:9} avg@{k} {record['avg']:.3f} {interval}  pass@{k} {record['pass_k']:.3f}"
