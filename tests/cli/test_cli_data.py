"""The verb `data`: what it builds, says, verifies and refuses."""

import json

import pytest

from minglm.__main__ import main
from minglm.cli import data

CONFIG = "configs/nano.py"
OVERRIDES = [
    "--data.corpus_megabytes",
    "0.04",
    "--data.synthetic_documents",
    "12",
    "--data.trajectories",
    "4",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return (function that calls the verb on one folder, that folder): with some text of the user, a part of it bad."""
    folder = tmp_path_factory.mktemp("stock")
    (folder / "mail.jsonl").write_text(
        '{"text": "a letter", "source": "mail"}\n{"text": 3}\n' * 3, encoding="utf-8"
    )
    words = [
        CONFIG,
        "--out",
        str(folder / "run"),
        *OVERRIDES,
        "--data.files",
        str(folder / "mail.jsonl"),
    ]
    return lambda *more: main(["data", *words, *more]), folder / "run" / "data"


def test_it_builds_and_says_what_there_is(run, capsys):
    """A table with every source, what each step took, how many records were bad and which, samples of each source."""
    call, folder = run
    assert call("--dry-run") == 0
    assert "would be in" in capsys.readouterr().out
    assert not folder.exists()
    assert call("--samples", "1") == 0
    out = capsys.readouterr().out
    totals = data.summary(folder)
    for source, row in totals["train"].items():
        (line,) = [line for line in out.splitlines() if line.startswith(f"{source} ")]
        assert line.split()[1:4] == [f"{row[name]:,}" for name in ("documents", "tokens", "bytes")]
        assert not row["documents"] or f"\n{source}, document " in out
    assert "3 records could not be used; see" in out
    assert 'mail.jsonl, line 2: needs a string "text"' in out
    # The letter came three times.
    assert "exact copies" in out
    assert totals["cleaning"]["exact_copies"] >= 2
    assert call("--dry-run") == 0 and "are in" in capsys.readouterr().out


def test_a_flipped_byte_is_found_and_repaired(run, capsys):
    """--verify reads everything: one changed byte is named, its part built again, and then all checksums agree."""
    call, folder = run
    assert call("--json") == 0
    path = folder / "train" / "00000.00.tokens.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    capsys.readouterr()
    assert call("--verify") == 0
    out = capsys.readouterr().out
    assert "00000.00.tokens.npy: wrong checksum; it is built again" in out
    assert "checksums they were written with" in out
    assert path.read_bytes() == whole


def test_json_holds_everything_that_is_shown(run, capsys):
    """The same numbers, for programs."""
    call, folder = run
    assert call("--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(data.summary(folder)))


def test_mistakes_are_one_line(run, capsys):
    """A source that does not exist, an impossible dial."""
    call, _ = run
    assert call("--stages.general.mixture.cod", "1") == 2
    assert "did you mean --stages.general.mixture.code?" in capsys.readouterr().err
    assert call("--data.near_duplicates", "2") == 2
    assert capsys.readouterr().err.count("\n") == 1
