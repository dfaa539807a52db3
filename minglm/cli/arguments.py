"""Arguments that several verbs share (no section in the paper)."""

import argparse


def add_config(parser: argparse.ArgumentParser, example: str = "configs/toy.py") -> None:
    """Add the positional argument CONFIG, and accept overrides of its fields."""
    parser.add_argument(
        "config", help=f"a config file, such as {example}, or FILE:FUNCTION for a variant in it"
    )
    parser.set_defaults(overrides=(), config_comes_first=True)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument RUN and the option --stage."""
    parser.add_argument("run", help="folder of a run, or of a released checkpoint")
    parser.add_argument(
        "--stage", help="use the model as this stage left it (default: the last complete one)"
    )
