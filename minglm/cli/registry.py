"""The verbs of the command line, by name (no section in the paper)."""

from typing import NamedTuple


class Verb(NamedTuple):
    """One verb of `python -m minglm`."""

    module: str
    """Module with `add_arguments(parser)` and `main(args)`, imported when the verb is used."""
    arguments: str
    """Its positional arguments, for the list of verbs."""
    summary: str
    """What it does, in one line."""


VERBS = {
    "run": Verb(
        "minglm.cli.run",
        "CONFIG",
        "train the whole recipe, or a part of it, and write a report card",
    ),
    "data": Verb(
        "minglm.cli.data", "CONFIG", "build, inspect and verify the token shards of a config"
    ),
    "plan": Verb(
        "minglm.cli.plan",
        "CONFIG",
        "estimate parameters, memory, compute and time on a number of GPUs",
    ),
    "launch": Verb(
        "minglm.cli.launch", "CONFIG", "write the script that starts a config on many GPUs"
    ),
    "eval": Verb(
        "minglm.cli.eval",
        "RUN",
        "score a stage of a run, by default the last one, on held-out tasks",
    ),
    "chat": Verb("minglm.cli.chat", "RUN", "talk to a run in the terminal"),
    "view": Verb(
        "minglm.cli.view",
        "RUN",
        "show a run in a browser, live while it trains: curves, experts, samples token by token",
    ),
    "serve": Verb("minglm.cli.serve", "RUN", "serve OpenAI's API, with a chat page"),
    "import": Verb(
        "minglm.cli.import_", "CONFIG FOLDER", "make a released checkpoint the base of a run"
    ),
    "export": Verb(
        "minglm.cli.export",
        "RUN FOLDER",
        "write a run as a released checkpoint, for transformers, vLLM and SGLang",
    ),
    "bench": Verb(
        "minglm.cli.bench", "WHAT", "measure generate, train, kernels or compile beside baselines"
    ),
    "kernels": Verb(
        "minglm.cli.kernels",
        "",
        "print which form of each operation runs here, and why others do not",
    ),
    "figures": Verb("minglm.cli.figures", "PATH ...", "redraw figures from their stored logs"),
}


def overview() -> str:
    """Return the text of `python -m minglm --help`."""
    width = max(len(f"{name} {verb.arguments}") for name, verb in VERBS.items())
    lines = [
        f"    {f'{name} {verb.arguments}':{width}}   {verb.summary}" for name, verb in VERBS.items()
    ]
    return "\n".join(
        [
            "The command line: `python -m minglm VERB ...`, also installed as `minglm`. Every verb has --help.",
            "",
            *lines,
            "",
            "RUN may be a released checkpoint too: a folder with config.json, safetensors and tokenizer.json.",
            "Words after CONFIG such as `--model.hidden_size 64` override any field of the config.",
        ]
    )
