"""Your own text: every kind of file, bounded memory, bad records counted and named, unreadable files refused."""

import builtins
import dataclasses
import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from helpers.documents import read_corpus
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import DataConfig
from minglm.data.sources import files, rows
from minglm.data.sources.files import ReadOptions, Skipped, user_files


def zstd(data):
    """Bytes, packed."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def write_rows(path, rows):
    """Rows as JSON lines, packed where the name says so, or as parquet."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(zstd(data) if path.suffix == ".zst" else data)
    return path


def test_user_files_of_every_kind(tmp_path):
    """Text, code, folders, JSON lines and parquet become documents of the sources they name."""
    (tmp_path / "note.md").write_text("# Title\n\nSome prose.\n")
    (tmp_path / "tool.py").write_text("x = 1\n")
    some = [
        {"text": "one"},
        {"text": "二", "source": "math", "language": "zh"},
        {"text": "three", "source": "mail"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, some)) + "\n\n")
    (tmp_path / "repo" / ".git").mkdir(parents=True)
    (tmp_path / "repo" / ".git" / "hidden.py").write_text("secret = 1\n")
    (tmp_path / "repo" / "a.py").write_text("import b\n")
    (tmp_path / "repo" / "b.py").write_text("y = 2\n")
    (tmp_path / "repo" / "c.bin").write_bytes(b"\xff\xfe")
    paths = [str(tmp_path / name) for name in ("note.md", "tool.py", "rows.jsonl", "repo")]
    found = list(user_files(paths))
    assert [(d.source, d.language) for d in found] == [
        *(
            ("prose", "en"),
            ("code", "python"),
            ("prose", "en"),
            ("math", "zh"),
            ("user:mail", "en"),
        ),
        *(("code", "python"), ("code", "python"), ("repository", "python")),
    ]
    small = DataConfig(corpus_megabytes=0.1, synthetic_documents=1, heldout=0.0, files=tuple(paths))
    (joined,) = [
        d for d in read_corpus(small) if d.source == "repository" and d.repository.endswith("repo")
    ]
    assert joined.text == "# repo/b.py\ny = 2\n\n# repo/a.py\nimport b\n"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.zst", "rows.parquet", "hf"])
def test_rows_are_the_same_in_every_form(tmp_path, name):
    """JSON lines, plain and packed, parquet, and a data set by name give the same texts, sources and languages."""
    rows = [
        {"text": f"text {n}\u2028é", "source": ["math", "mail"][n % 2], "language": "en"}
        for n in range(5)
    ]
    if name == "hf":
        pytest.importorskip("datasets")
        write_rows(tmp_path / "part.parquet", rows)
        given = f"hf:{tmp_path}"
    else:
        given = write_rows(tmp_path / name, rows)
    found = list(user_files([given]))
    assert [d.text for d in found] == [row["text"] for row in rows]
    assert [d.source for d in found] == ["math", "user:mail", "math", "user:mail", "math"]
    assert len({d.name for d in found}) == 5


def test_a_data_set_by_name_is_read_up_to_a_bound(tmp_path):
    """Reading stops once the bound is passed; what cannot be found is one line."""
    pytest.importorskip("datasets")
    write_rows(tmp_path / "part.parquet", [{"text": "x" * 1000}] * 50)
    assert len(list(user_files([f"hf:{tmp_path}"], ReadOptions(megabytes=0.01)))) == 11
    with pytest.raises(ValueError, match=r"cannot read hf:/no/such/folder after row 0: [^\n]+$"):
        list(user_files(["hf:/no/such/folder"]))


def test_a_folder_is_walked_in_order_and_each_checkout_is_a_repository(tmp_path):
    """A folder gives its files by path; code belongs to the nearest folder with a .git, or to the folder itself."""
    for name, text in {
        "a/.git/config": "",
        "a/one.py": "import two\n",
        "a/deep/two.py": "x = 2\n",
        "b/three.py": "y = 3\n",
        "four.py": "import three\n",
        "notes.txt": "words",
        "rows.jsonl": '{"text": "row"}\n',
        "runs/toy/log.jsonl": '{"text": "a run of minglm is no text"}\n',
        "runs/toy/data/x.txt": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = list(user_files([tmp_path]))
    names = [
        d.name.removeprefix(f"{tmp_path}/").removeprefix(f"repository/{tmp_path}") for d in found
    ]
    assert names == [
        "four.py",
        "notes.txt",
        "rows.jsonl/line 1",
        "a/one.py",
        "a/deep/two.py",
        "/a",
        "b/three.py",
        "",
    ]
    assert next(d.text for d in found if d.source == "repository").startswith(
        "# a/deep/two.py\nx = 2\n"
    )


def test_a_repository_too_long_to_hold_is_not_joined(tmp_path, monkeypatch):
    """Its files stand alone, and the log says so."""
    monkeypatch.setattr(files, "REPOSITORY_CHARACTERS", 30)
    for n in range(4):
        (tmp_path / f"{n}.py").write_text("x = 123456789\n")
    skipped = Skipped()
    assert [d.source for d in user_files([tmp_path], ReadOptions(skipped=skipped))] == ["code"] * 4
    assert skipped.count == 1 and "not joined" in next(iter(skipped.reasons))


@given(st.lists(st.text(max_size=30), max_size=12), st.integers(6, 40))
def test_pieces_of_a_long_text_join_to_it(lines, size):
    """Read in pieces of any size, a text is the text as Python reads it, and no character is cut in two."""
    import tempfile
    from pathlib import Path

    text = "\n".join(lines).encode("utf-8", "replace")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE_BYTES", size)
        path = Path(folder) / "long.txt"
        path.write_bytes(text)
        found = list(user_files([path]))
        joined = "".join(d.text for d in found)
        assert joined.replace("\n", "") == path.read_text(encoding="utf-8").replace("\n", "")
        assert len({d.name for d in found}) == len(found)


@given(st.binary(max_size=200), st.integers(1, 60), st.integers(1, 50))
def test_lines_of_a_stream_do_not_depend_on_its_chunks(data, size, longest):
    """However the bytes arrive, the lines are those of the whole, and a line above the bound is None."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "MAX_LINE_BYTES", longest)
        found = list(rows._lines(data[at : at + size] for at in range(0, len(data), size)))
    lines = data.split(b"\n")
    lines = lines if lines[-1] else lines[:-1]
    assert found == [(n, line if len(line) <= longest else None) for n, line in enumerate(lines, 1)]


@pytest.mark.parametrize("name", ["big.jsonl", "big.jsonl.zst", "big.parquet", "big.txt"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, name):
    """Of a file of 24 MB no more than 6 MB are held at any time (256 rows of parquet, a megabyte of bytes, a piece)."""
    monkeypatch.setattr(files, "PIECE_BYTES", 2**20)
    path, line = tmp_path / name, "some words and some more of them, " * 60 + "\n"
    if name.endswith(".txt"):
        path.write_text(line * 12_000)
    elif name.endswith(".parquet"):
        table = pyarrow.table({"text": [line] * 12_000})
        pyarrow.parquet.write_table(table, path, row_group_size=1000)
    else:
        write_rows(path, [{"text": line}] * 12_000)
    tracemalloc.start()
    size = sum(len(document.text) for document in user_files([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 12_000 * len(line) and peak < 6e6


def test_bad_records_are_counted_named_and_skipped(tmp_path):
    """Broken rows, and files of a folder that are no text, cost a line in the log each and nothing else."""
    lines = [
        b'{"text": "good"}',
        b'{"text": ',
        b'{"body": "x"}',
        b'{"text": "\xff"}',
        b'{"text": " "}',
        b"[1]",
    ]
    lines += [b'{"text": "x", "source": 3}', b"[" * 100_000, b'{"text": "also good"}']
    given = tmp_path / "given"
    given.mkdir()
    (given / "rows.jsonl").write_bytes(b"\n".join(lines))
    (given / "latin.txt").write_bytes(b"caf\xe9")
    (given / "none.txt").write_bytes(b"")
    skipped = Skipped(tmp_path / "log" / "skipped.jsonl")
    assert [
        d.text for d in user_files([given], ReadOptions(skipped=skipped)) if d.text.strip()
    ] == [
        "good",
        "also good",
    ]
    log = [
        json.loads(line) for line in (tmp_path / "log" / "skipped.jsonl").read_text().splitlines()
    ]
    assert [(record["file"].rpartition("/")[2], record["where"]) for record in log] == [
        *(("latin.txt", "file"), ("none.txt", "file")),
        *(("rows.jsonl", f"line {n}") for n in range(2, 9)),
    ]
    assert skipped.count == len(log) == sum(skipped.reasons.values()) == 9
    assert (
        "byte 3" in log[0]["why"]
        and log[1]["why"] == "empty"
        and log[3]["why"] == 'needs a string "text"'
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": \n', r"nothing in .*a\.jsonl can be used; line 1: not JSON"),
        (
            "b.jsonl",
            b'\n{"body": "y"}\n',
            r'nothing in .*b\.jsonl can be used; line 2: needs a string "text"',
        ),
        (
            "c.jsonl",
            b'{"text": "x", "source": 3}\n',
            r'c\.jsonl .*line 1: "source" and "language" must be strings',
        ),
        ("d.jsonl", b"[1]\n", r"d\.jsonl .*line 1: needs"),
        ("e.txt", b"ab\xff", r"e\.txt is not UTF-8 text \(byte 2\)"),
        ("f.pdf", b"%PDF", r"f\.pdf is none of"),
        (
            "g.jsonl.zst",
            zstd(b'{"text": "x"}\n' * 9)[:-3],
            r"cannot unpack .*g\.jsonl\.zst: Truncated",
        ),
        ("h.jsonl.zst", b'{"text": "x"}\n', r"cannot unpack .*h\.jsonl\.zst: "),
        ("i.parquet", b"PAR1", r"cannot read .*i\.parquet after row 0"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, name, content, said):
    """A file that cannot be read, or of which no row can be used, is a ValueError with its name and a row."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        list(user_files([tmp_path / name]))


def test_parquet_cut_short_or_without_texts_is_named(tmp_path):
    """As for other files, with the number of rows read so far."""
    path = write_rows(
        tmp_path / "rows.parquet",
        [{"text": "one", "source": "math"}, {"text": "two", "source": None}],
    )
    assert [(d.text, d.source) for d in user_files([path])] == [("one", "math"), ("two", "prose")]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cannot read .*rows\.parquet after row 0"):
        list(user_files([path]))
    write_rows(path, [{"body": "one"}])
    with pytest.raises(
        ValueError, match=r'rows\.parquet can be used; row 1: needs a string "text"'
    ):
        list(user_files([path]))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst", "hf:a"])
def test_without_the_optional_package(tmp_path, monkeypatch, name):
    """The message names the extra to install."""
    original, package = builtins.__import__, "datasets" if name == "hf:a" else "pyarrow"
    if not name.startswith("hf:"):
        (tmp_path / name).write_bytes(b"PAR1")

    def without(module, *args, **kwargs):
        if module.startswith(package):
            raise ImportError(module)
        return original(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"needs {package}; pip install 'minglm\[data\]'"):
        list(user_files([name]))


def test_missing_and_empty_paths_are_named(tmp_path):
    """A path that is not there, or a folder with nothing to read, is a ValueError with its name."""
    with pytest.raises(ValueError, match=r"no file or folder .*absent"):
        list(user_files([tmp_path / "absent.txt"]))
    with pytest.raises(ValueError, match=r"holds no text, code"):
        list(user_files([tmp_path]))


def test_documents_of_a_file_are_held_out_together(tmp_path, monkeypatch):
    """The pieces of a long text are all in training or all held out."""
    monkeypatch.setattr(files, "PIECE_BYTES", 8)
    for n in range(20):
        (tmp_path / f"{n}.txt").write_text("word\n" * 10)
    found = list(user_files([tmp_path], ReadOptions(heldout=0.5)))
    for n in range(20):
        assert len({d.heldout for d in found if d.name.startswith(f"{tmp_path}/{n}.txt")}) == 1
    assert {d.heldout for d in found} == {True, False}
    assert dataclasses.replace(found[0], quality=0.5).quality == 0.5 and found[0].quality is None
