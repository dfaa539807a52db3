"""The verb `import`: make a released checkpoint the base of a run (no section in the paper)."""

import argparse
import shlex
from pathlib import Path

from minglm.cli.arguments import add_config, folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `import`."""
    add_config(parser, example="configs/air_106b.py")
    parser.add_argument("folder", type=folder, help="folder with config.json and safetensors")
    parser.add_argument("--out", type=folder, required=True, help="folder of the new run")
    parser.add_argument(
        "--dry-run", action="store_true", help="check model, files and tokenizer, write nothing"
    )


def main(args: argparse.Namespace) -> None:
    """Make a released checkpoint the base of a run: `run` then continues after mid-training.

    CONFIG must describe the same model. Started with torchrun, ranks divide the files.
    """
    from minglm.common.files import check_out
    from minglm.config import load_config
    from minglm.parallel.world import started_world
    from minglm.recipe import convert

    config = load_config(args.config, args.overrides)
    check_out(args.out)
    if args.dry_run:
        stage = convert.check_import(config, Path(args.folder), Path(args.out)).stage
        print(f"{args.folder} would be stage {stage} of {args.out}; nothing was written")
        return
    with started_world("cpu", config.parallel.timeout_seconds) as world:
        stage = convert.import_checkpoint(config, args.folder, args.out)
        if world.is_writer:
            words = ["python", "-m", "minglm", "run", args.config, "--out", args.out]
            then = shlex.join([*words, *args.overrides])
            print(f"{args.folder} is stage {stage} of {args.out}; continue with: {then}")
