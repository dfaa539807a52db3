"""Apply command-line words such as `--section.field value` to a tree of dataclasses (no section in the paper).

A word becomes a value by the type of its field. A word that does not fit is one line with field, value and
remedy. tyro prints `--help`: every field with its type, its default and its docstring.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any, TypeVar, get_args

from minglm.common.mistakes import shown
from minglm.common.types import types_of
from minglm.config.options import mismatch, must_be

Config = TypeVar("Config")


def override(run: Config, words: Sequence[str]) -> Config:
    """Apply words such as ["--model.hidden_size", "64"] to a config and return the new one; `--help` prints and exits.

    A source of your own needs no entry in the config: `--stages.general.mixture.user:notes 1.0` adds it.
    Raises ValueError, in one line, that names the option or value that does not fit.
    """
    if "--help" in words or "-h" in words:
        return _print_help(run)
    run = _add_own_sources(run, words)
    known = {_spelled(name): (name, kind) for name, kind in _leaves(run)}
    changes: dict[str, Any] = {}
    for spelled, given in _options(words):
        if _spelled(spelled) not in known:
            remedy = _remedy(_spelled(spelled), list(known))
            raise ValueError(f"unknown option --{shown(spelled)}; {remedy}")
        name, kind = known[_spelled(spelled)]
        changes[name] = _value(name, given, kind)
    return _replace(run, changes)


def _spelled(name: str) -> str:
    """Return the name of an option with underscores: hyphens are as good."""
    return name.replace("-", "_")


def _options(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each option with the words that follow it."""
    name = None
    given: list[str] = []
    for word in words:
        if not word.startswith("--"):
            if name is None:
                raise ValueError(
                    f"this word follows no option: {shown(word)}; options begin with --"
                )
            given.append(word)
            continue
        if name is not None:
            yield name, given
        name, equals, value = word.removeprefix("--").partition("=")
        given = [value] if equals else []
    if name is not None:
        yield name, given


def _value(name: str, given: list[str], kind: Any) -> Any:
    """Convert the words of one option to its type."""
    if get_args(kind):  # tuple[str, ...]
        return tuple(given)
    if not given:
        raise ValueError(f"--{name}: no value follows; it must be {must_be(kind)}")
    if len(given) > 1:
        extra = shown(" ".join(given[1:]))
        raise ValueError(f"--{name} takes one value; these words follow no option: {extra}")
    (word,) = given
    try:
        return _convert(word, kind)
    except (ValueError, KeyError, OverflowError):
        raise ValueError(mismatch(name, word, kind)) from None


def _convert(word: str, kind: Any) -> Any:
    """Convert one word. Raises ValueError or KeyError where it does not fit."""
    if kind is bool:
        return {"true": True, "false": False}[word.lower()]
    if kind is int:
        return int(word)
    if kind is float:
        return float(word)
    if issubclass(kind, StrEnum):
        return kind(word)
    return word


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the type of every value in a tree of dataclasses and dictionaries."""
    types = types_of(type(config))
    for field in dataclasses.fields(config):
        name = prefix + field.name
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{name}.")
        elif isinstance(value, dict):
            _, kind = get_args(types[field.name])
            for key in value:
                yield f"{name}.{key}", kind
        else:
            yield name, types[field.name]


def _replace(config: Any, changes: dict[str, Any]) -> Any:
    """Return a config with the values of these dotted names changed."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        sections.setdefault(first, {})[rest] = value
    replaced: dict[str, Any] = {}
    for name, inside in sections.items():
        old = getattr(config, name)
        if dataclasses.is_dataclass(old):
            replaced[name] = _replace(old, inside)
        elif isinstance(old, dict):
            replaced[name] = {**old, **inside}
        else:
            replaced[name] = inside[""]
    return dataclasses.replace(config, **replaced)


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
        name = _spelled(section.removeprefix("--stages."))
        if not source.startswith("user:") or source == "user:":
            continue
        if name in [field.name for field in dataclasses.fields(run.stages)]:
            stage = getattr(run.stages, name)
            stage = dataclasses.replace(stage, mixture={source: 0.0, **stage.mixture})
            stages = dataclasses.replace(run.stages, **{name: stage})
            run = dataclasses.replace(run, stages=stages)
    return run


def _print_help(run: Config) -> Config:
    """Print every field with its meaning, and exit."""
    import tyro

    return tyro.cli(
        type(run),
        default=run,
        args=["--help"],
        prog="python -m minglm VERB CONFIG",
        use_underscores=True,
        config=(
            tyro.conf.AvoidSubcommands,
            tyro.conf.FlagConversionOff,
            tyro.conf.EnumChoicesFromValues,
        ),
    )
