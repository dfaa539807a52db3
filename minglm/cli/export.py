"""The verb `export`: write a run as a released checkpoint (no section in the paper)."""

import argparse

from minglm.cli.arguments import add_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    add_run(parser)
    parser.add_argument("folder", help="a new folder")
    parser.add_argument(
        "--dtype",
        help="float32, bfloat16, float16, float64 or fp8 (float8 in blocks); default: that of the source, bfloat16 "
        "where it has float8 in rows",
    )
    parser.add_argument(
        "--shard-gigabytes",
        type=float,
        help="size of one safetensors file; default: files as they came, of a run 5",
    )


def main(args: argparse.Namespace) -> None:
    """Write a run as a released checkpoint, or a released checkpoint in another dtype."""
    if args.shard_gigabytes is not None and not args.shard_gigabytes > 0:
        raise ValueError(f"--shard-gigabytes {args.shard_gigabytes}: must be positive")
    from minglm.recipe import convert

    written = convert.export_checkpoint(
        args.run, args.folder, args.stage, args.dtype, args.shard_gigabytes
    )
    print(f"{args.folder} holds {args.run}, stage {written.stage}, in {written.dtype}")
