"""Your own text: every kind of file, bounded memory, bad records counted and named, unreadable files refused."""

import builtins
import bz2
import dataclasses
import gzip
import json
import lzma
import os
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
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
    """Return bytes, compressed."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def write_rows(path, rows):
    """Write rows as JSON lines, compressed where the name says so, or as parquet."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(zstd(data) if path.suffix == ".zst" else data)
    return path


def test_user_files_of_every_kind(tmp_path):
    """Text, code, folders, JSON lines and parquet become documents of the sources they name."""
    (tmp_path / "note.md").write_text("# Title\n\nSome prose.\n", encoding="utf-8")
    (tmp_path / "tool.py").write_text("x = 1\n", encoding="utf-8")
    some = [
        {"text": "one"},
        {"text": "二", "source": "math", "language": "zh"},
        {"text": "three", "source": "mail"},
    ]
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(map(json.dumps, some)) + "\n\n", encoding="utf-8"
    )
    (tmp_path / "repo" / ".git").mkdir(parents=True)
    (tmp_path / "repo" / ".git" / "hidden.py").write_text("secret = 1\n", encoding="utf-8")
    (tmp_path / "repo" / "a.py").write_text("import b\n", encoding="utf-8")
    (tmp_path / "repo" / "b.py").write_text("y = 2\n", encoding="utf-8")
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
        (tmp_path / name).write_text(text, encoding="utf-8")
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
        (tmp_path / f"{n}.py").write_text("x = 123456789\n", encoding="utf-8")
    skipped = Skipped()
    assert [d.source for d in user_files([tmp_path], ReadOptions(skipped=skipped))] == ["code"] * 4
    assert skipped.count == 1 and "not joined" in next(iter(skipped.reasons))


@given(st.lists(st.text(max_size=30), max_size=12), st.integers(6, 40))
def test_pieces_of_a_long_text_join_to_it(lines, size):
    """Read in pieces of any size, a text is the text as Python reads it, and no character is cut in two."""
    text = "\n".join(lines).encode("utf-8", "replace")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE_CHARACTERS", size)
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
    monkeypatch.setattr(files, "PIECE_CHARACTERS", 2**20)
    path = tmp_path / name
    line = "some words and some more of them, " * 60 + "\n"
    if name.endswith(".txt"):
        path.write_text(line * 12_000, encoding="utf-8")
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
        json.loads(line)
        for line in (tmp_path / "log" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(record["file"].rpartition("/")[2], record["where"]) for record in log] == [
        *(("latin.txt", "file"), ("none.txt", "file")),
        *(("rows.jsonl", f"line {n}") for n in range(2, 9)),
    ]
    assert skipped.count == len(log) == sum(skipped.reasons.values()) == 9
    assert "byte 3" in log[0]["why"]
    assert log[1]["why"] == "empty"
    assert log[3]["why"] == 'needs a string "text"'


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
    original = builtins.__import__
    package = "datasets" if name == "hf:a" else "pyarrow"
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
    monkeypatch.setattr(files, "PIECE_CHARACTERS", 8)
    for n in range(20):
        (tmp_path / f"{n}.txt").write_text("word\n" * 10, encoding="utf-8")
    found = list(user_files([tmp_path], ReadOptions(heldout=0.5)))
    for n in range(20):
        assert len({d.heldout for d in found if d.name.startswith(f"{tmp_path}/{n}.txt")}) == 1
    assert {d.heldout for d in found} == {True, False}
    assert dataclasses.replace(found[0], quality=0.5).quality == 0.5
    assert found[0].quality is None


ROWS = b'{"text": "one"}\n{"text": "two"}\n'


def truncated(data):
    """Return bytes without their end."""
    return data[: len(data) * 2 // 3]


def parquet_bytes(rows):
    """Return rows as the bytes of a parquet file."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


DAMAGED = {
    "a.parquet": truncated(parquet_bytes([{"text": "x"}] * 9)),
    "b.jsonl.zst": truncated(zstd(bytes(range(256)) * 90)),
    "c.jsonl.gz": truncated(gzip.compress(ROWS)),
    "d.jsonl.gz": b"no gzip",
    "e.jsonl.xz": truncated(lzma.compress(ROWS)),
    "f.jsonl.bz2": truncated(bz2.compress(ROWS)),
    "g.txt.gz": gzip.compress(b"caf\xe9"),
    "h.jsonl": b'{"body": "x"}\n',
    "i.txt": b"caf\xe9",
    "j.parquet": parquet_bytes([{"body": "x"}]),
    "k.jsonl": b"[" * 100_000,
    "l.py": None,  # a link to nothing
    "m.jsonl": b"\x00" * 50,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_does_not_end_the_reading_of_its_folder(tmp_path, name):
    """It is counted and named; the files before and after it are read. Named by itself it is an error of one line."""
    path = tmp_path / name
    if DAMAGED[name] is None:
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_bytes(DAMAGED[name])
    (tmp_path / "0.txt").write_text("before", encoding="utf-8")
    (tmp_path / "z.txt").write_text("after", encoding="utf-8")
    skipped = Skipped(tmp_path / ".log")
    found = [d.text for d in user_files([tmp_path], ReadOptions(skipped=skipped))]
    assert found[0] == "before" and found[-1] == "after"
    record = json.loads((tmp_path / ".log").read_text(encoding="utf-8").splitlines()[-1])
    assert record["file"] == f"{path}"
    assert len(record["why"]) < 300
    with pytest.raises(ValueError, match=f"^data.files: [^\\n]*{name}"):
        list(user_files([path]))
    for other in ("0.txt", "z.txt"):
        (tmp_path / other).unlink()
    if not name.startswith(("c", "e", "f")):  # these may hold a row before the damage
        with pytest.raises(ValueError, match=rf"the folder .* can be used; .*{name}"):
            list(user_files([tmp_path]))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstd])
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.txt", "a.md", "a.rs", "a.py"])
def test_packed_files_are_read_as_what_they_hold(tmp_path, pack, name):
    """Rows, text and code give the same documents packed and plain."""
    suffix = {gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz"}.get(pack, ".zst")
    plain = tmp_path / name
    plain.write_bytes(ROWS)
    packed = tmp_path / f"{name}{suffix}"
    packed.write_bytes(pack(ROWS))
    (texts, other) = (
        [(d.text, d.source, d.language) for d in user_files([path])] for path in (plain, packed)
    )
    assert texts == other


@given(
    st.lists(
        st.sampled_from([".cc", ".tsx", ".cs", ".kt", ".swift", ".scala", ".rb", ".php", ".txt"])
        | st.sampled_from([".json", ".gz", ".pdf", ".json.gz", "", ".exe", ".TXT", ".zzz"]),
        max_size=8,
    )
)
def test_every_file_of_a_folder_is_read_or_counted(suffixes):
    """No file vanishes: its text is a document, or its suffix is counted."""
    with tempfile.TemporaryDirectory() as folder:
        for n, suffix in enumerate(["", *suffixes]):
            (Path(folder) / f"{n}{suffix}").write_text("some words\n", encoding="utf-8")
        (Path(folder) / "last.txt").write_text("some words\n", encoding="utf-8")
        skipped = Skipped()
        found = [
            d
            for d in user_files([folder], ReadOptions(skipped=skipped))
            if d.source != "repository"
        ]
        assert len(found) + skipped.not_read.total() == len(suffixes) + 2
        assert skipped.count == 0
        not_read = {suffix for suffix in suffixes if suffix in (".json", ".pdf", ".exe", ".zzz")}
        assert not_read <= set(skipped.not_read)


def test_folders_that_are_passed_over_are_counted(tmp_path, monkeypatch):
    """A folder that cannot be read, a link to a folder and the folder of a run are named, each with its reason."""
    (tmp_path / "a.txt").write_text("words", encoding="utf-8")
    (tmp_path / "closed").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "closed")
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "log.jsonl").write_text("", encoding="utf-8")
    original = os.scandir

    def scandir(path):
        if f"{path}".endswith("closed"):
            raise PermissionError(13, "Permission denied", f"{path}")
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    skipped = Skipped(tmp_path / ".log")
    assert [d.text for d in user_files([tmp_path], ReadOptions(skipped=skipped))] == ["words"]
    records = [
        json.loads(line) for line in (tmp_path / ".log").read_text(encoding="utf-8").splitlines()
    ]
    assert {Path(record["file"]).name for record in records} == {"closed", "linked", "run"}


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    # Halves of surrogate pairs too, which JSON may escape and no file may hold.
    | st.text(st.characters(categories=["Cs", "L"]), min_size=1, max_size=3),
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text", "html", "source", "language"]), inside, max_size=4
        )
    ),
    max_leaves=6,
)
LINES = (
    VALUES.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=20).map(lambda data: data.replace(b"\n", b" "))
    | st.sampled_from(
        [b"9" * 5000, b"[" * 5000, b'"' + b"x" * 5000 + b'"', b"NaN", b'{"text": "\\ud800"}']
    )
    | st.sampled_from([b'{"text": "a", "source": "\\ud800"}', b'{"text": "\\ud83d\\ude00"}'])
)


@given(st.lists(LINES, max_size=6))
def test_any_line_is_a_document_or_counted(lines):
    """Whatever stands in a line, it gives a text that can be written, or one record in the log with a short reason."""
    with tempfile.TemporaryDirectory() as folder:
        name = os.fsdecode(b"caf\xe9.jsonl")  # a name that is not UTF-8
        path = Path(folder) / name
        path.write_bytes(b"\n".join([b'{"text": "good"}', *lines]))
        skipped = Skipped(Path(folder) / "log")
        found = list(user_files([path], ReadOptions(heldout=0.5, skipped=skipped)))
        for document in found:
            for value in (document.text, document.source, document.language, document.name):
                value.encode()
        log = (Path(folder) / "log").read_text(encoding="utf-8").splitlines()
        assert len(found) + len(log) == 1 + sum(bool(line.strip()) for line in lines)
        assert all(len(json.loads(record)["why"]) < 100 for record in log)
        assert len(skipped.reasons) <= 12


def test_the_log_of_a_file_of_bad_rows_is_bounded(tmp_path, monkeypatch):
    """A file of nothing but bad rows has a bounded part of the log, and every row is counted."""
    monkeypatch.setattr(files, "NAMED_RECORDS", 10)
    (tmp_path / "a.jsonl").write_text('"x"\n' * 500 + '{"text": "good"}\n', encoding="utf-8")
    skipped = Skipped(tmp_path / "log")
    assert len(list(user_files([tmp_path / "a.jsonl"], ReadOptions(skipped=skipped)))) == 1
    assert skipped.count == 500
    lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 10
    assert "only counted" in lines[-1]


def test_a_long_row_comes_in_pieces(tmp_path, monkeypatch):
    """A row of any length gives documents of a bounded length, which join to it and are held out together."""
    monkeypatch.setattr(files, "PIECE_CHARACTERS", 100)
    text = "some words and more\n" * 30 + "x" * 350
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    found = list(user_files([tmp_path / "a.jsonl"], ReadOptions(heldout=0.5)))
    assert "".join(d.text for d in found) == text
    assert max(len(d.text) for d in found) <= 100
    assert len({d.name for d in found}) == len(found)
    assert len({d.heldout for d in found}) == 1


def test_parquet_with_strings_that_are_no_utf8(tmp_path):
    """Such a row is one record; the rows around it are read."""
    offsets = pyarrow.py_buffer(np.array([0, 3, 7, 10], np.int32))
    data = pyarrow.py_buffer(b"onecaf\xe9two")
    texts = pyarrow.StringArray.from_buffers(3, offsets, data)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    skipped = Skipped()
    found = list(user_files([tmp_path / "a.parquet"], ReadOptions(skipped=skipped)))
    assert [d.text for d in found] == ["one", "two"]
    assert skipped.reasons == {"not UTF-8": 1}
