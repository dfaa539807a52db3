"""The verb `chat`: talk to a run in the terminal (no section in the paper)."""

import argparse

from minglm.cli.arguments import add_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `chat`."""
    add_run(parser)
    parser.add_argument("--temperature", type=float, default=0.6, help="sampling temperature")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus of the sampler")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="most tokens of an answer")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampler")


def main(args: argparse.Namespace) -> None:
    """Talk to a run in the terminal, until /quit or the end of the input."""
    if not (args.temperature >= 0 and 0 < args.top_p <= 1 and args.max_new_tokens > 0):
        raise ValueError(
            "--temperature must be at least 0, --top-p above 0 and at most 1, --max-new-tokens at least 1"
        )
    from minglm.recipe.load import load_served
    from minglm.serve import terminal

    served = load_served(args.run, args.stage)
    print(f"stage {served.stage}")
    settings = terminal.ChatSettings(
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        dialect=served.dialect,
    )
    terminal.chat(served.model, served.tokenizer, settings)
