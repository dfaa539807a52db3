"""The verb `chat`: talk to a run in the terminal (no section in the paper)."""

import argparse

from minglm.cli.arguments import add_drafts, add_run, number, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `chat`."""
    add_run(parser)
    parser.add_argument(
        "--temperature", type=number(0, 100), default=0.6, help="sampling temperature"
    )
    parser.add_argument(
        "--top-p", type=number(0, 1, above=True), default=0.95, help="nucleus of the sampler"
    )
    parser.add_argument(
        "--max-new-tokens", type=whole(1), default=200, help="most tokens of an answer"
    )
    parser.add_argument(
        "--thinking-budget", type=whole(0), help="most tokens of reasoning (default: no bound)"
    )
    add_drafts(parser)
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="seed of the sampler")


def main(args: argparse.Namespace) -> None:
    """Talk to a run in the terminal, until /quit or the end of the input."""
    from minglm.recipe.load import load_served
    from minglm.serve import terminal

    served = load_served(args.run, args.stage)
    print(f"stage {served.stage}")
    settings = terminal.ChatSettings(
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        thinking_budget=args.thinking_budget,
        draft_tokens=args.draft_tokens,
        dialect=served.dialect,
    )
    terminal.chat(served.model, served.tokenizer, settings)
