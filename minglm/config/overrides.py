"""Command-line overrides: `--section.field value` words applied to a tree of dataclasses. No counterpart in the paper.

tyro reads the fields, their types and their docstrings, converts values and prints `--help`. Its error messages are
boxes of many lines; here each becomes one line that names the option, the value and the remedy.
"""

import contextlib
import dataclasses
import difflib
import io


def override(run, words):
    """Apply words such as ["--model.hidden_size", "64"] to `run` and return the new one; `--help` prints and exits.

    A source of your own needs no entry in the config: `--stages.general.mixture.user:notes 1.0` adds it.
    Raises ValueError, in one line, naming the option or value that does not fit.
    """
    import tyro

    run = _add_own_sources(run, words)
    known = list(_option_names(run))
    for word in words:
        option = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and option not in [*known, "help"]:
            raise ValueError(f"unknown option --{option}; {_remedy(option, known)}")
    arguments = {
        "default": run,
        "args": list(words),
        "prog": "python -m minglm VERB CONFIG",
        "use_underscores": True,
        "config": (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    }
    if "--help" in words or "-h" in words:
        return tyro.cli(type(run), **arguments)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return tyro.cli(type(run), **arguments)
    except SystemExit:
        raise ValueError(_one_line(printed.getvalue())) from None


def _option_names(config, prefix=""):
    """Dotted names of every value in a tree of dataclasses and dictionaries."""
    if dataclasses.is_dataclass(config):
        config = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name, value in config.items():
        if isinstance(value, dict) or dataclasses.is_dataclass(value):
            yield from _option_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _remedy(option, known):
    """What to write in place of an unknown option: a field of the section, its full name, or the nearest name."""
    inside = [name for name in known if name.startswith(option + ".")]
    if inside:
        return f"it is a section; name a field of it, such as --{inside[0]}"
    last = option.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == last] or difflib.get_close_matches(
        option, known, 1
    )
    return f"did you mean --{near[0]}?" if near else "--help lists them all"


def _add_own_sources(run, words):
    """Give stages the `user:` sources that an override names, with weight 0, so that the override finds them."""
    for word in words:
        section, _, source = word.partition("=")[0].partition(".mixture.")
        stage = section.removeprefix("--stages.")
        if source.startswith("user:") and hasattr(run.stages, stage):
            old = getattr(run.stages, stage)
            new = dataclasses.replace(old, mixture={source: 0.0, **old.mixture})
            run = dataclasses.replace(run, stages=dataclasses.replace(run.stages, **{stage: new}))
    return run


def _one_line(printed):
    """What is wrong, from tyro's boxed message: the text between its first two rules, below the title."""
    lines = [line.strip("│╭╮╰╯├┤| ") for line in printed.splitlines()]
    rules = [i for i, line in enumerate(lines) if len(line) > 3 and not line.strip("─-")]
    first, last = rules[:2] if len(rules) > 1 else (-1, len(lines))
    text = " ".join(line for line in lines[first + 1 : last] if line)
    return text.removeprefix("Error parsing ").replace(
        "Unrecognized options:", "these words follow no option:"
    )
