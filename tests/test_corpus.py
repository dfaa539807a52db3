"""The corpus: repeatable, bounded, nothing held out leaks into training; your own files; the quality rubric."""

import builtins
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import DataConfig
from minglm.data import corpus
from minglm.data.corpus import Document, bounded, build, docstrings, is_heldout, repositories, user_files

SMALL = DataConfig(corpus_megabytes=0.7, synthetic_documents=40, heldout=0.2)


@pytest.fixture(scope="module")
def documents():
    return build(SMALL, 0)


def test_every_source_is_there_and_bounded(documents):
    """Each built-in source has documents, no more text than asked for, names of its own and a quality in 0..1."""
    for source in corpus.BUILT_IN:
        some = [d for d in documents if d.source == source]
        assert some and sum(len(d.text.encode()) for d in some) <= 0.7e6, source
        assert len({d.name for d in some}) == len(some)
    assert all(0 <= d.quality <= 1 and d.text.strip() for d in documents)


def test_build_is_repeatable_and_the_seed_only_moves_synthetic_text(documents):
    """The same config and seed give the same documents; another seed changes the generated ones alone."""
    assert build(SMALL, 0) == documents
    other = build(SMALL, 1)
    read = [d for d in documents if d.source not in corpus.SYNTHETIC]
    assert [d for d in other if d.source not in corpus.SYNTHETIC] == read
    assert [d for d in other if d.source == "math"] != [d for d in documents if d.source == "math"]


def test_no_heldout_text_stands_in_a_training_document(documents):
    """Every held-out text is absent from all training text, repositories and docstrings included."""
    training = "\0".join(d.text for d in documents if not d.heldout)
    heldout = [d for d in documents if d.heldout]
    assert {d.source for d in heldout} >= {"code", "prose", "math", "qa"}
    assert not [d.name for d in heldout if d.text.strip() in training]
    # and the same for what repositories strip or re-indent: a held-out file's header is in no repository
    assert not [d.name for d in heldout if d.source == "code" and f"# {d.name.removeprefix('python/')}\n" in training]


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_heldout_shares_are_nested(name, one, other):
    """What a small share holds out, a larger one holds out too; 0 holds out nothing and 1 everything."""
    small, large = sorted((one, other))
    assert not is_heldout(name, 0.0) and is_heldout(name, 1.0)
    assert is_heldout(name, large) or not is_heldout(name, small)


def test_heldout_is_the_share():
    """Of 4,000 names 5 % are held out, within four standard deviations (1.4 %)."""
    assert abs(sum(is_heldout(f"name/{n}", 0.05) for n in range(4000)) / 4000 - 0.05) < 0.014


def file(name, text, repository=None, heldout=False):
    return Document(text, "code", "python", 0.5, name, repository, heldout)


def test_docstrings_follow_their_file():
    """A docstring is held out only when all files that have it are, and stands once; labels are left out."""
    long, other = "All the words of a long docstring. " * 5, "Quite another long docstring, for a test. " * 4
    both = f'def f():\n    """{long}"""\n\ndef g():\n    """Short."""\n'
    found = list(
        docstrings([file("a", both, heldout=True), file("b", f'"""{other}"""\n', heldout=True), file("c", both)])
    )
    assert [(d.text, d.heldout) for d in found] == [(long.strip(), False), (other.strip(), True)]


def test_repositories_leave_heldout_files_out():
    """A repository document is made of two training files or more, and holds no held-out one."""
    files = [file(f"r/{n}.py", f"x = {n}{n}{n}\n", "r", heldout=n == 2) for n in range(3)]
    (joined,) = repositories(files)
    assert joined.source == "repository" and "111" in joined.text and "222" not in joined.text
    assert not list(repositories(files[1:])) and not list(repositories([file("a.py", "x"), file("b.py", "y")]))


@given(st.lists(st.integers(0, 50), max_size=12), st.floats(0, 300))
def test_bounded_keeps_order_and_bound(sizes, limit):
    """What is kept is in order and within the bound, and whatever was left out did not fit any more."""
    some = [file(f"f{n}", "x" * size) for n, size in enumerate(sizes)]
    kept = bounded(some, limit / 1e6)
    total = sum(len(d.text) for d in kept)
    assert [d for d in some if d in kept] == kept and total <= limit + 1e-6
    assert all(total + len(d.text) > limit - 1e-6 for d in some if d not in kept)


def test_user_files_of_every_kind(tmp_path):
    """Text, code, folders, JSON lines and parquet become documents of the sources they name."""
    (tmp_path / "note.md").write_text("# Title\n\nSome prose.\n")
    (tmp_path / "tool.py").write_text("x = 1\n")
    rows = [{"text": "one"}, {"text": "二", "source": "math", "language": "zh"}, {"text": "three", "source": "mail"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "repo" / ".git").mkdir(parents=True)
    (tmp_path / "repo" / ".git" / "hidden.py").write_text("secret = 1\n")
    (tmp_path / "repo" / "a.py").write_text("import b\n")
    (tmp_path / "repo" / "b.py").write_text("y = 2\n")
    (tmp_path / "repo" / "c.bin").write_bytes(b"\xff\xfe")
    paths = [str(tmp_path / name) for name in ("note.md", "tool.py", "rows.jsonl", "repo")]
    found = list(user_files(paths))
    assert [(d.source, d.language) for d in found] == [
        *(("prose", "en"), ("code", "python"), ("prose", "en"), ("math", "zh"), ("user:mail", "en")),
        *(("code", "python"), ("code", "python")),
    ]
    built = build(dataclasses.replace(SMALL, files=tuple(paths), corpus_megabytes=0.1, heldout=0.0))
    (joined,) = [d for d in built if d.source == "repository" and d.repository.endswith("repo")]
    assert joined.text == "# repo/b.py\ny = 2\n\n# repo/a.py\nimport b\n"


def test_parquet(tmp_path):
    """A parquet file gives one document a row; a file cut short or without texts is named."""
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"], "source": ["math", None]}), path)
    assert [(d.text, d.source) for d in user_files([path])] == [("one", "math"), ("two", "prose")]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cannot read .*rows\.parquet after row 0"):
        list(user_files([path]))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one"]}), path)
    with pytest.raises(ValueError, match=r"rows\.parquet, row 1: needs a string"):
        list(user_files([path]))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    """The message names the extra to install."""
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs pyarrow; pip install 'minglm\[parquet\]'"):
        list(user_files([tmp_path / "rows.parquet"]))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("b.jsonl", b'{"text": "x"}\n\n{"body": "y"}\n', r'b\.jsonl, line 3: needs a string "text"'),
        ("c.jsonl", b'{"text": "x", "source": 3}\n', r'c\.jsonl, line 1: "source" and "language" must be strings'),
        ("d.jsonl", b"[1]\n", r"d\.jsonl, line 1: needs"),
        ("e.txt", b"ab\xff", r"e\.txt is not UTF-8 text \(byte 2\)"),
        ("f.pdf", b"%PDF", r"f\.pdf is none of"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, said):
    """A file that cannot be used is a ValueError with its name, and the line where there are lines."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        list(user_files([tmp_path / name]))


def test_missing_and_empty_paths_are_named(tmp_path):
    """A path that is not there, or a folder with nothing to read, is a ValueError with its name."""
    with pytest.raises(ValueError, match=r"no file or folder .*absent"):
        list(user_files([tmp_path / "absent.txt"]))
    with pytest.raises(ValueError, match=r"holds no text or code files"):
        list(user_files([tmp_path]))
