"""The verb `run`: train the recipe of a config, stage by stage, and write a report card (paper Figure 3)."""

import argparse
import contextlib
import json
import shlex
import sys
from pathlib import Path

from minglm.cli.arguments import add_config, folder, refuse_idle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `run`."""
    add_config(parser)
    parser.add_argument("--out", type=folder, help="folder of the run (default: runs/NAME)")
    parser.add_argument(
        "--only", metavar="STAGE", help="run this stage only; the stage before must be complete"
    )
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    parser.add_argument(
        "--rollout-only",
        action="store_true",
        help="with --only STAGE, a stage of RL: write its rollouts to OUT/rollouts/STAGE.jsonl, train nothing",
    )
    parser.add_argument(
        "--from-rollouts",
        type=Path,
        metavar="FILE",
        help="with --only STAGE, a stage of RL: train on these samples in place of rolling out",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check what can be checked without a GPU, print the stages and the config, start nothing",
    )


def main(args: argparse.Namespace) -> int:
    """Run every stage of CONFIG, then write the report card.

    The same command continues a run that was stopped. Ranks that torchrun starts share it. With CONFIG,
    --help lists every field of it.
    """
    from minglm.common.device import measured_flops, pick_dtype
    from minglm.common.files import check_out
    from minglm.common.lock import locked
    from minglm.common.signals import Stopped
    from minglm.common.threads import thread_count
    from minglm.config import load_config
    from minglm.config.run import to_dict
    from minglm.parallel.faults import check_same_code
    from minglm.parallel.world import started_world
    from minglm.plan.counts import count_parameters
    from minglm.recipe import preflight
    from minglm.recipe.folder import check_folder
    from minglm.recipe.run import RecipeRunner
    from minglm.recipe.stages import is_done, plan_stages, table
    from minglm.report import card
    from minglm.train.checkpoint import CheckpointStore

    refuse_idle({"--until": args.until if args.only else None}, "with --only")
    config = load_config(args.config, args.overrides)
    out = Path(args.out or f"runs/{config.name}")
    check_out(out)
    preflight.check_run(config)
    stages = plan_stages(config)
    preflight.check_stage_names(stages, args.only, args.until)
    check_folder(out, config)
    preflight.check_order(stages, CheckpointStore(out), args.only, args.until)
    disk = preflight.disk_need(config, stages, out)
    with started_world(config.device, config.parallel.timeout_seconds) as world:
        check_same_code(config, world.ranks)
        wanted = preflight.wanted_stages(stages, args.only, args.until)
        store = CheckpointStore(out)
        left = [stage for stage in stages if not is_done(stage, stages, store)]
        planned = [stage for stage in left if stage.name in wanted]
        preflight.check_layout(config, planned, world.size)
        preflight.check_exact(config, world.size)
        preflight.check_halves(stages, args.only, args.rollout_only, args.from_rollouts, world.size)
        if world.is_writer:
            dtype = pick_dtype(config.dtype, world.device)
            speed = measured_flops(world.device, dtype, thread_count(config.threads))
            speed *= world.size
            print(table(config, stages, speed, world.device.type), flush=True)
        if args.dry_run:
            if world.is_writer:
                print(json.dumps(to_dict(config), indent=1))
                print(f"body: {count_parameters(config.model)['body']:,} parameters")
                print(disk)
            return 0
        preflight.check_memory(config, world.size)
        preflight.check_disk(disk, out)
        first = world.ranks.first
        try:
            with contextlib.ExitStack() as stack:
                first(lambda: stack.enter_context(locked(out)))
                runner = RecipeRunner(
                    config,
                    out,
                    world,
                    rollout_only=args.rollout_only,
                    from_rollouts=args.from_rollouts,
                )
                if args.rollout_only:
                    print(runner.roll_out(args.only))
                    return 0
                complete = runner.execute(args.only, args.until)
                report = first(lambda: card.write(out))
        except KeyboardInterrupt as stop:
            if world.is_writer:
                print(
                    f"\nstopped; everything up to here is saved. Continue with: {launched(args.command, world.has_group)}",
                    file=sys.stderr,
                )
            return stop.status if isinstance(stop, Stopped) else 130
        if world.is_writer:
            print(report)
            print(next_command(args, out, complete, world.has_group))
    return 0


def launched(command: str, by_torchrun: bool) -> str:
    """Return a command as it was started; what torchrun was told is not known here."""
    if not by_torchrun:
        return command
    return "torchrun ... " + command.removeprefix("python ")


def next_command(args: argparse.Namespace, out: Path, complete: bool, by_torchrun: bool) -> str:
    """Return what to do after a run: talk to it, or continue with it."""
    program = ["python", "-m", "minglm"]
    if complete:
        return f"talk to it: {shlex.join([*program, 'chat', str(out)])}"
    words = [*program, "run", args.config, "--out", str(out), *args.overrides]
    return f"continue with: {launched(shlex.join(words), by_torchrun)}"
