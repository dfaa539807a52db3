"""The verb `export`: write a run as a released checkpoint (no section in the paper)."""

import argparse

from minglm.cli.arguments import add_run, folder, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    add_run(parser)
    parser.add_argument("folder", type=folder, help="a new folder")
    parser.add_argument(
        "--dtype",
        help="float32, bfloat16, float16, float64 or fp8 (float8 in blocks); default: that of the source, bfloat16 "
        "where it has float8 in rows",
    )
    parser.add_argument(
        "--shard-gigabytes",
        type=number(0, 10**6, above=True),
        help="size of one safetensors file; default: files as they came, of a run 5",
    )


def main(args: argparse.Namespace) -> None:
    """Write a run as a released checkpoint, or a released checkpoint in another dtype.

    Started with torchrun, ranks divide the files.
    """
    from minglm.common.files import check_out
    from minglm.config import ParallelConfig
    from minglm.parallel.world import started_world
    from minglm.recipe import convert

    check_out(args.folder, "FOLDER")
    with started_world("cpu", ParallelConfig().timeout_seconds) as world:
        written = convert.export_checkpoint(
            args.run, args.folder, args.stage, args.dtype, args.shard_gigabytes
        )
        if world.is_writer:
            print(f"{args.folder} holds {args.run}, stage {written.stage}, in {written.dtype}")
