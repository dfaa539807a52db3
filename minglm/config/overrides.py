"""Apply command-line words such as `--section.field value` to a tree of dataclasses (no section in the paper).

tyro reads the fields, their types and their docstrings, converts values and prints `--help`. Its error messages are
boxes of many lines; here each becomes one line that names the option, the value and the remedy.
"""

import contextlib
import dataclasses
import difflib
import io
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

Config = TypeVar("Config")


def override(run: Config, words: Sequence[str]) -> Config:
    """Apply words such as ["--model.hidden_size", "64"] to a config and return the new one; `--help` prints and exits.

    A source of your own needs no entry in the config: `--stages.general.mixture.user:notes 1.0` adds it.
    Raises ValueError, in one line, that names the option or value that does not fit.
    """
    import tyro

    run = _add_own_sources(run, words)
    known = list(_option_names(run))
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name not in [*known, "help"]:
            raise ValueError(f"unknown option --{name}; {_remedy(name, known)}")

    def parse() -> Config:
        return tyro.cli(
            type(run),
            default=run,
            args=list(words),
            prog="python -m minglm VERB CONFIG",
            use_underscores=True,
            config=(
                tyro.conf.AvoidSubcommands,
                tyro.conf.FlagConversionOff,
                tyro.conf.EnumChoicesFromValues,
            ),
        )

    if "--help" in words or "-h" in words:
        return parse()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return parse()
    except SystemExit:
        raise ValueError(_one_line(printed.getvalue())) from None


def _option_names(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every value in a tree of dataclasses and dictionaries."""
    if dataclasses.is_dataclass(config):
        config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, value in config.items():
        if isinstance(value, dict) or dataclasses.is_dataclass(value):
            yield from _option_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _remedy(name: str, known: list[str]) -> str:
    """Suggest what to write in place of an unknown option: a field of the section, its full name, the nearest name."""
    inside = [option for option in known if option.startswith(name + ".")]
    if inside:
        return f"it is a section; name a field of it, such as --{inside[0]}"
    last = name.rpartition(".")[2]
    near = [option for option in known if option.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(name, known, 1)
    return f"did you mean --{near[0]}?" if near else "--help lists them all"


def _add_own_sources(run: Any, words: Sequence[str]) -> Any:
    """Give stages the `user:` sources that an override names, with weight 0, so that the override finds them."""
    for word in words:
        section, _, source = word.partition("=")[0].partition(".mixture.")
        name = section.removeprefix("--stages.")
        if source.startswith("user:") and hasattr(run.stages, name):
            stage = getattr(run.stages, name)
            stage = dataclasses.replace(stage, mixture={source: 0.0, **stage.mixture})
            stages = dataclasses.replace(run.stages, **{name: stage})
            run = dataclasses.replace(run, stages=stages)
    return run


def _one_line(printed: str) -> str:
    """Extract the message from tyro's box: the text between its first two rules, below the title."""
    lines = [line.strip("│╭╮╰╯├┤| ") for line in printed.splitlines()]
    rules = [i for i, line in enumerate(lines) if len(line) > 3 and not line.strip("─-")]
    first, last = rules[:2] if len(rules) > 1 else (-1, len(lines))
    text = " ".join(line for line in lines[first + 1 : last] if line)
    text = text.removeprefix("Error parsing ")
    return text.replace("Unrecognized options:", "these words follow no option:")
