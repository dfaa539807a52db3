"""The verb `eval`: score a run on the held-out tasks (paper 4)."""

import argparse
import dataclasses
import itertools
import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from minglm.cli.arguments import add_drafts, add_run, file, folder, refuse_idle, whole
from minglm.config.posttraining import MOST_PROBLEMS, MOST_SAMPLES

if TYPE_CHECKING:
    from minglm.envs.base import Environment


class Mode(NamedTuple):
    """How a task is answered."""

    thinking: bool
    budget: int | None = None
    """Most tokens of reasoning; None: no bound."""

    def __str__(self) -> str:
        if self.budget is not None:
            return f"thinking up to {self.budget}"
        return "thinking" if self.thinking else "direct"


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
    parser.add_argument(
        "--thinking-budget",
        type=whole(0),
        nargs="+",
        help="score with thoughts of at most so many tokens, in place of thinking on and off",
    )
    parser.add_argument(
        "--figure", type=file, help="with --thinking-budget: draw scores over budgets to this PNG"
    )
    parser.add_argument(
        "--user",
        type=folder,
        help="run or released checkpoint whose model plays the user in tasks that have one, in place of a program",
    )
    parser.add_argument(
        "--harness",
        action="store_true",
        help="print how lm-evaluation-harness and others are run against this model, and score nothing",
    )
    add_drafts(parser, default=None)
    parser.add_argument("--json", action="store_true", help="print records as JSON lines")


def main(args: argparse.Namespace) -> None:
    """Score a run on the held-out tasks: avg@k and pass@k with 95% intervals, thinking on and off, or by budget."""
    from minglm.common.files import check_out
    from minglm.envs import ENVIRONMENTS, twelve
    from minglm.eval import harness, tasks
    from minglm.inference import Engine
    from minglm.inference.client import EngineGenerator
    from minglm.recipe.inputs import environments_of
    from minglm.recipe.load import load_run
    from minglm.report.thinking_budget import draw_thinking_budgets

    if args.thinking_budget is None:
        refuse_idle({"--figure": args.figure}, "without --thinking-budget")
    if args.figure is not None:
        check_out(Path(args.figure).absolute().parent, "--figure")
    if args.harness:
        options = (
            "stage",
            "problems",
            "samples",
            "task",
            "thinking_budget",
            "user",
            "draft_tokens",
            "json",
        )
        given = {f"--{name.replace('_', '-')}": getattr(args, name) for name in options}
        refuse_idle(given, "with --harness")
        print(harness.commands(args.run))
        return
    for name in args.task or ():
        try:
            ENVIRONMENTS[name]
        except ValueError as error:
            raise ValueError(f"--task: {error}") from None
    modes = [Mode(True), Mode(False)]
    if args.thinking_budget is not None:
        modes = [Mode(True, budget) for budget in dict.fromkeys(args.thinking_budget)]
    loaded = load_run(args.run, args.stage)
    asking = environments_of(loaded.config)  # the difficulties that the run asks
    environments = {name: asking[name] for name in args.task or asking}
    if args.user is not None:
        environments = _with_user(environments, args.user)
    options = {"problems": args.problems, "samples": args.samples}
    changes = {name: value for name, value in options.items() if value is not None}
    settings = dataclasses.replace(loaded.config.evaluation, **changes)
    records: list[dict] = []
    drafts = loaded.config.draft_tokens if args.draft_tokens is None else args.draft_tokens
    engine = Engine(loaded.model, loaded.tokenizer, draft_tokens=drafts)
    with closing(EngineGenerator(engine)) as generator:
        for name, mode in itertools.product(environments, modes):
            record, _ = tasks.tasks(
                generator,
                loaded.tokenizer,
                environments[name],
                settings,
                mode.thinking,
                loaded.config.seed,
                thinking_budget=mode.budget,
            )
            if mode.budget is not None:
                record["thinking_budget"] = mode.budget
            records.append(record)
            if args.json:
                print(json.dumps({"stage": loaded.stage, **record}), flush=True)
            else:
                print(_line(name, mode, record), flush=True)
    for mode in modes:
        scores = {record["env"]: record["avg"] for record in records if _mode(record) == mode}
        for group, average in twelve.averages(scores).items():
            if args.json:
                line = {"stage": loaded.stage, "average_of": group, "thinking": mode.thinking}
                print(json.dumps({**line, "avg": average}), flush=True)
            else:
                print(f"{group:13} {mode!s:17} mean  {average:.3f}", flush=True)
    if args.figure is not None:
        print(draw_thinking_budgets(records, Path(args.figure)))


def _with_user(environments: dict[str, "Environment"], folder: str) -> dict[str, "Environment"]:
    """Let the model of a run play the users of these environments; those without a user stay as they are."""
    from minglm.envs.worlds.base import WorldEnvironment
    from minglm.envs.worlds.model_user import Simulator
    from minglm.inference import Engine
    from minglm.inference.client import EngineGenerator
    from minglm.recipe.load import load_run

    if not any(isinstance(found, WorldEnvironment) for found in environments.values()):
        raise ValueError(f"--user: no user takes part in {', '.join(environments)}; try retail")
    loaded = load_run(folder)
    generator = EngineGenerator(Engine(loaded.model, loaded.tokenizer))
    play_user = Simulator(generator, loaded.tokenizer).user
    changed = dict(environments)
    for name, found in environments.items():
        if isinstance(found, WorldEnvironment):
            changed[name] = found.with_user(play_user)
    return changed


def _mode(record: dict) -> Mode:
    """Return how the tasks of a record were answered."""
    return Mode(record["thinking"], record.get("thinking_budget"))


def _line(name: str, mode: Mode, record: dict) -> str:
    """Format one record of an evaluation for people."""
    k = record["k"]
    interval = f"({record['low']:.3f} to {record['high']:.3f})"
    calls = record["valid_calls"]
    called = "" if calls is None else f"  calls {calls:.3f}"
    scores = f"avg@{k} {record['avg']:.3f} {interval}  pass@{k} {record['pass_k']:.3f}"
    return f"{name:13} {mode!s:17} {scores}  tokens {record['length']:.1f}{called}"
