"""Every verb refuses every wrong word and every folder that is no run: one line, status 2, nothing written.

The tables are made from the verbs and their arguments, so a new verb or option is in them by itself.
"""

import argparse
import importlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.__main__ import main
from minglm.cli.arguments import Parser, file, folder, number, path, whole, word
from minglm.cli.registry import VERBS
from minglm.common.files import write_json
from minglm.config import load_config
from minglm.config.run import to_dict

ROOT = Path(__file__).parent.parent.parent
NANO = str(ROOT / "configs" / "nano.py")
WRONG_NUMBERS = {
    "a word": "many",
    "empty": "",
    "negative": "-1",
    "not finite": "inf",
    "not a number": "nan",
    "10**23": "1" + "0" * 23,
    "400 digits": "9" * 400,
    "5,000 digits": "9" * 5000,
    "unprintable": "1\x1b[31m",
}
WRONG_WORDS = {
    "empty": "",
    "two words": "many gpus",
    "a second line": "gpu\n#SBATCH --wrap=x",
    "a quote": "gpu'",
    "unprintable": "gpu\x1b[31m",
}


def parser_of(verb):
    """Return the parser of a verb."""
    module = importlib.import_module(VERBS[verb].module)
    parser = Parser(prog=verb)
    module.add_arguments(parser)
    return parser


def commands(verb):
    """Yield (words of a subcommand, its parser): one for most verbs, one a benchmark for `bench`."""
    parser = parser_of(verb)
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield (), parser
    for group in groups:
        for name, subparser in group.choices.items():
            yield (name,), subparser


def positionals(parser):
    """Return a word for each positional argument that must be given."""
    words = {"config": NANO}
    return [
        words.get(action.dest, "nowhere")
        for action in parser._actions
        if not action.option_strings and action.nargs not in ("*", "?")
    ]


def table():
    """Return {what is wrong: words} for every option of every verb."""
    cases = {}
    for verb in VERBS:
        for subcommand, parser in commands(verb):
            given = [verb, *subcommand, *positionals(parser)]
            name = " ".join((verb, *subcommand))
            cases[f"{name}: an unknown option"] = [*given, "--no-such-option", "1"]
            cases[f"{name}: a word too many"] = [*given, "--", "stray"] if verb == "run" else []
            if positionals(parser):
                cases[f"{name}: nothing given"] = [verb, *subcommand]
            for action in parser._actions:
                if not action.option_strings or action.dest == "help":
                    continue
                option = action.option_strings[0]
                if action.nargs != 0:
                    cases[f"{name}: {option} without a value"] = [*given, option]
                if action.choices:
                    cases[f"{name}: {option} of another kind"] = [*given, f"{option}=sideways"]
                if action.type in (path, folder, file):
                    cases[f"{name}: {option} empty"] = [*given, f"{option}="]
                    cases[f"{name}: {option} with a null"] = [*given, f"{option}=a\0b"]
                elif action.type is not None:
                    wrong = WRONG_WORDS if action.type is word else WRONG_NUMBERS
                    for fault, value in wrong.items():
                        if action.nargs == "+" and value == "":
                            continue
                        cases[f"{name}: {option} {fault}"] = [*given, f"{option}={value}"]
    return {name: words for name, words in cases.items() if words}


TABLE = table()


def refusal(capsys, words):
    """Return the one line with which a command is refused."""
    capsys.readouterr()
    assert main(list(words)) == 2, words
    line = capsys.readouterr().err
    assert line.startswith("minglm: ")
    assert line.count("\n") == 1
    assert line.strip().isprintable()
    assert len(line) < 700
    return line


def test_the_table_is_large():
    """With the fields of the config (`tests/config/test_wrong_configs.py`) there are more than a thousand inputs."""
    assert len(TABLE) > 250
    assert {words[0] for words in TABLE.values()} == set(VERBS)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_a_wrong_word_is_one_line_with_its_option_and_nothing_is_written(
    verb, capsys, tmp_path, monkeypatch
):
    """Status 2, the option and the remedy, before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    for name, words in TABLE.items():
        if words[0] != verb:
            continue
        line = refusal(capsys, words)
        option = name.partition(": ")[2].split()[0]
        if option.startswith("--"):
            assert option in line, name
        assert not os.listdir(tmp_path), name


OTHER = {
    folder: ("a_file", "is a file; give a folder"),
    file: ("a_folder", "is a folder; give a file"),
}
"""{type: what is of the other kind, and the remedy}"""


def misplaced():
    """Return {argument: (words, remedy)} for every folder where a file is meant, and the other way round."""
    cases = {}
    for verb in VERBS:
        for subcommand, parser in commands(verb):
            for action in parser._actions:
                if action.type not in OTHER:
                    continue
                place, remedy = OTHER[action.type]
                given = positionals(parser)
                if action.option_strings:
                    given += [action.option_strings[0], place]
                else:
                    names = [a.dest for a in parser._actions if not a.option_strings]
                    given[names.index(action.dest)] = place
                name = " ".join((verb, *subcommand, action.dest))
                cases[name] = ([verb, *subcommand, *given], remedy)
    return cases


def test_a_file_in_the_place_of_a_folder_is_one_line_and_a_folder_in_that_of_a_file(
    capsys, tmp_path, monkeypatch
):
    """For every argument of every verb, with the remedy, before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("", encoding="utf-8")
    Path("a_folder").mkdir()
    cases = misplaced()
    assert {"serve weights_from", "launch script", "bench kernels out", "chat run"} <= cases.keys()
    for name, (words, remedy) in cases.items():
        assert remedy in refusal(capsys, words), name
        assert sorted(os.listdir(tmp_path)) == ["a_file", "a_folder"], name


def test_an_option_without_a_type_is_a_text(capsys):
    """Each option that takes a number has bounds: argparse's own int and float would accept any."""
    for verb in VERBS:
        for _, parser in commands(verb):
            assert not [a.dest for a in parser._actions if a.type in (int, float)]


@given(st.integers(-20, 20), st.integers(0, 9), st.integers(0, 9))
def test_a_whole_number_is_accepted_exactly_within_its_bounds(value, low, more):
    """Both bounds belong to the range."""
    convert = whole(low, low + more)
    if low <= value <= low + more:
        assert convert(str(value)) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=f"from {low} to {low + more}"):
            convert(str(value))


@given(st.floats(), st.booleans())
def test_a_number_is_accepted_exactly_within_its_bounds(value, above):
    """The minimum belongs to the range unless the number must be above it; NaN never does."""
    convert = number(0, 1, above)
    if 0 <= value <= 1 and not (above and value == 0):
        assert convert(repr(value)) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="must be a number"):
            convert(repr(value))


PLAIN = to_dict(load_config(NANO))
STORED = {
    "empty": b"",
    "cut": json.dumps({"hash": "x", "config": PLAIN}).encode()[:300],
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    **{
        f"holds {value!r}": json.dumps(value).encode()
        for value in ([], {}, 3, "x", None, {"hash": "x"}, {"config": {}}, {"model_type": "bert"})
    },
    **{
        f"the config is {value!r}": json.dumps({"hash": "x", "config": value}).encode()
        for value in ([], {}, 3, None, {"name": "x"}, {**PLAIN, "seed": "1"}, {**PLAIN, "new": 1})
    },
}
READERS = {
    "chat": ["chat", "run"],
    "eval": ["eval", "run"],
    "serve": ["serve", "run", "--dry-run"],
    "export": ["export", "run", "out"],
    "run": ["run", NANO, "--out", "run"],
}


@pytest.mark.parametrize("verb", READERS)
def test_a_folder_that_is_no_run_is_one_line_with_its_file(verb, capsys, tmp_path, monkeypatch):
    """config.json may be cut, empty, or something else; nothing is written."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    for fault, content in STORED.items():
        (folder / "config.json").write_bytes(content)
        line = refusal(capsys, READERS[verb])
        assert "run" in line, fault
        assert [p.name for p in tmp_path.rglob("*")] == ["run", "config.json"], fault


@pytest.mark.parametrize(
    "log", [b"42\n", b"[]\n", b'"x"\n', b"{}\n", b'{"kind": 3}\n', b'{"kind": "step"}\n', b"cut\n"]
)
def test_a_log_that_holds_something_else_is_one_line(log, capsys, tmp_path):
    """The line names the file and the line in it."""
    (tmp_path / "log.jsonl").write_bytes(log)
    line = refusal(capsys, ["figures", str(tmp_path)])
    assert "log.jsonl, line 1" in line


def test_figures_run_no_code_beside_their_path(capsys, tmp_path):
    """A file lessons/X.py beside figures/X.json is not executed: only the lessons of this checkout draw."""
    (tmp_path / "lessons").mkdir()
    (tmp_path / "figures").mkdir()
    (tmp_path / "lessons" / "99_x.py").write_text("raise SystemExit('it ran')\n", encoding="utf-8")
    write_json(tmp_path / "figures" / "99_x.json", {})
    assert "cannot redraw" in refusal(capsys, ["figures", str(tmp_path / "figures" / "99_x.json")])
    assert not (tmp_path / "figures" / "99_x.png").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["run", NANO, "--out", "file"],
        ["run", NANO, "--out", "file/run"],
        ["data", NANO, "--out", "file/run"],
        ["data", NANO, "--out", "x" * 300],
        ["import", NANO, "nowhere", "--out", "file/run"],
        ["export", "nowhere", "file/out"],
        ["bench", "train", NANO, "--out", "file/out"],
        ["bench", "kernels", "--out", "file/out.json"],
        ["run", NANO, "--model.vocab_size", "200"],
        ["run", NANO, "--only", "unified"],
        ["data", NANO, "--data.files", "nowhere.txt"],
        ["data", NANO, "--data.tokenizer", "file"],
        ["run", NANO, "--model.hidden_size", "99999999999"],
        ["run", NANO, "--model.hidden_size", "1000000", "--model.intermediate_size", "1000000"],
    ],
    ids=lambda words: " ".join(word[-20:] for word in words),
)
def test_what_can_be_checked_is_checked_before_anything_is_written(
    words, capsys, tmp_path, monkeypatch
):
    """Status 2 and one line; the folder holds what it held."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    refusal(capsys, words)
    assert os.listdir(tmp_path) == ["file"]
