"""From documents to shards: what each step of cleaning takes, any engine, any number of processes, any accident."""

import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import DataConfig, load_config
from minglm.data import build, tokenization, workers
from minglm.data.cleaning import selection
from minglm.data.mixture import Mixture
from minglm.data.store import documents as store
from minglm.data.store import shards
from minglm.data.store.documents import Document
from minglm.data.store.shards import find_damage, load_shards, write_chunk, write_index
from minglm.data.workers import map_tasks
from minglm.recipe.solutions import task_data
from minglm.testing.cleaning import document, made_up, templates

OVERRIDES = [
    "--data.corpus_megabytes",
    "0.04",
    "--data.synthetic_documents",
    "12",
    "--data.trajectories",
    "4",
]
OVERRIDES += ["--data.near_duplicates", "0.8", "--data.semantic_duplicates", "0.95"]


def small(*words):
    return load_config("configs/nano.py", [*OVERRIDES, *words])


def prepare(run, folder, **options):
    """Prepare the data of a run with the tasks of its environments."""
    return build.prepare(run, folder, task_data(run), **options)


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Limit parts to 15 thousand characters, so that a small corpus has several."""
    monkeypatch.setattr(store, "CHUNK_CHARACTERS", 15_000)


def contents(folder):
    """Return {file: its bytes} of the shards under a folder, without what was noted about paths and time."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.glob("*/*"))
        if path.suffix == ".npy"
    }


documents = st.builds(
    Document,
    st.text(max_size=40),
    st.sampled_from(["code", "prose"]),
    st.just("en"),
    st.none() | st.floats(0, 1),
    st.text(max_size=4),
    st.none() | st.text(max_size=4),
    st.booleans(),
)


@given(st.lists(documents, max_size=12), st.integers(1, 100))
def test_parts_hold_every_document(some, size):
    """Read again, the parts are the documents that were written, in order, without the empty ones."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_CHARACTERS", size)
        paths = store.write_documents(some, folder)
        assert [d for path in paths for d in store.read_documents(path)] == [
            d for d in some if d.text.strip()
        ]
        assert len(selection.read_records(paths)) == sum(bool(d.text.strip()) for d in some)


def clean(some, **settings):
    """Return (how often each document stays, what was done) of documents, by these fields of DataConfig."""
    run = load_config("configs/nano.py")
    settings = {"decontaminate": 0, "lowest_share": 0.0, "top_share": 0.0} | settings
    run = dataclasses.replace(run, data=dataclasses.replace(DataConfig(), **settings))
    with tempfile.TemporaryDirectory() as folder:
        times, done = build.clean(
            run, store.write_documents(some, f"{folder}/documents"), Path(folder)
        )
    return dict(zip([d.name for d in some], times.tolist(), strict=True)), done


def test_each_step_takes_what_it_should_and_says_so():
    """A corpus with an exact copy, a near copy, pages of a form and bad pages loses each to its own step."""
    rng = random.Random(0)
    good = [document(f"good{n}", made_up(rng, 200), quality=0.5 + n / 100) for n in range(20)]
    words = good[3].text.split()
    near = document("near", words[:100] + made_up(rng, 2) + words[102:], quality=0.1)
    copy = dataclasses.replace(good[4], name="copy")
    form = templates(rng, 1, 5)
    some = [*good, near, copy, *form]
    times, done = clean(some)
    assert [name for name, n in times.items() if not n] == ["copy"]
    assert done["exact_copies"] == 1
    times, done = clean(some, near_duplicates=0.7)
    assert [name for name, n in times.items() if not n] == ["near", "copy"]
    assert done["near_duplicates"] == {"prose": 1}
    times, done = clean(some, near_duplicates=0.7, semantic_duplicates=0.65)
    best = max(form, key=lambda d: d.quality).name
    assert [name for name, n in times.items() if n and name.startswith("0.")] == [best]
    assert done["semantic_duplicates"] == {"prose": 4}
    times, done = clean(good, lowest_share=0.25, top_share=0.1, top_epochs=4.0)
    assert [times[d.name] for d in good] == [0] * 5 + [1] * 13 + [4] * 2
    assert done["lowest_quality"] == {"prose": 5}
    assert done["repeated"] == {"prose": 2}
    assert done["documents"] == 21


def test_duplicates_are_looked_for_inside_a_source():
    """The same text may stand in two sources."""
    page = document("a", made_up(random.Random(0), 100))
    times, _ = clean(
        [page, dataclasses.replace(page, name="b", source="user:mail")], near_duplicates=0.5
    )
    assert times == {"a": 1, "b": 1}


@pytest.mark.parametrize("taught_by", ["rubric", "labels"])
def test_a_learned_score_decides_the_buckets(tmp_path, taught_by):
    """Taught by the rubric, or by marks that say the opposite, the classifier drops what its teacher calls bad."""
    rng = random.Random(1)
    good = " ".join(["A sentence of quite ordinary words follows another one."] * 3)
    pages = [document(f"{n}", [*good.split(), *made_up(rng, 5)], quality=None) for n in range(60)]
    noise = [
        document(f"n{n}", ["buy", "now", "$$$", "!!!", "0.1", *made_up(rng, 2)] * 4, quality=None)
        for n in range(60)
    ]
    marks = tmp_path / "marks.jsonl"
    rows = [{"text": d.text, "label": float(d in noise)} for d in pages + noise]
    marks.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    times, done = clean(
        pages + noise, lowest_share=0.5, quality="learned" if taught_by == "rubric" else f"{marks}"
    )
    dropped = [name for name, n in times.items() if not n]
    wrong = sum(name.startswith("n") == (taught_by == "labels") for name in dropped)
    assert len(dropped) == 60
    assert wrong <= 3
    assert done["judges"]["prose"]["documents"] == 120


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the folder of a small corpus in several parts, by one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_CHARACTERS", 15_000)
        prepare(small(), tmp_path_factory.mktemp("built") / "data")
    return tmp_path_factory.getbasetemp() / "built0" / "data"


def test_parts_join_to_the_whole(built, tmp_path):
    """A corpus in several parts holds the documents that one part holds, in the same order."""
    one = prepare(small(), tmp_path)[1]
    many = load_shards(built / "train")
    assert one.keys() == many.keys()
    assert len(shards.chunk_numbers(built / "train")) > 4
    for name, shard in one.items():
        assert [d.tolist() for d in shard] == [d.tolist() for d in many[name]]
        assert shard.lengths.tolist() == many[name].lengths.tolist() == [len(d) for d in shard]


@pytest.mark.slow
def test_two_processes_write_the_same_shards(built, tmp_path, tiny_chunks, monkeypatch):
    """One process and two give the same files."""
    monkeypatch.setattr(workers, "MIN_TASKS_PER_WORKER", 1)
    prepare(dataclasses.replace(small(), threads=2), tmp_path)
    assert contents(tmp_path) == contents(built)


@pytest.mark.ci
def test_ray_writes_the_same_shards(built, tmp_path, tiny_chunks):
    """The same functions as stages of Ray Data, embedded in this process, give the same files. (Ray is not in the extra
    `test`: its wheel has 80 MB and comes months after a new Python. `pip install 'minglm[ray]'` switches this on.)"""
    ray = pytest.importorskip("ray")
    try:
        prepare(small(), tmp_path, executor="ray")
        with pytest.raises(ValueError, match="Expecting"):
            map_tasks(json.loads, ["1", "{"], "ray", 1)
    finally:
        ray.shutdown()
    assert contents(tmp_path) == contents(built)


def test_a_build_that_was_stopped_goes_on(built, tmp_path, tiny_chunks, monkeypatch):
    """Stopped at each of its files in turn, the same command ends with the same shards, and does not begin anew."""
    run = small()
    original = shards.write_chunk
    read = []
    monkeypatch.setattr(
        build.corpus, "documents", lambda *a, f=build.corpus.documents: read.append(1) or f(*a)
    )
    for stop in (0, 1, 3):
        count = iter(range(stop))

        def killed(*args, count=count):
            if next(count, None) is None:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(tokenization, "write_chunk", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(run, tmp_path / "again")
        assert load_shards(tmp_path / "again" / "train") is None
    monkeypatch.setattr(tokenization, "write_chunk", original)
    prepare(run, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(built)
    assert len(read) == 1


def flip(path, bit):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("accident", ["header", "token", "cut short", "gone", "entries"])
def test_a_damaged_shard_is_built_again(built, tmp_path, tiny_chunks, accident, capsys):
    """A chunk with a damaged or missing file is made again from its documents; the other chunks are not touched."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    victim = tmp_path / "train" / "00001.00.tokens.npy"
    other = tmp_path / "train" / "00002.00.tokens.npy"
    stamp = other.stat().st_mtime_ns
    match accident:
        case "header":
            flip(victim, 8 * 100)  # in the padding
        case "token":
            flip(victim, 8 * 1000 + 7)
        case "cut short":
            victim.write_bytes(victim.read_bytes()[:-7])
        case "gone":
            victim.unlink()
        case "entries":
            flip(tmp_path / "train" / "00001.json", 8 * 200)
    prepare(small(), tmp_path)
    assert contents(tmp_path) == before
    assert "00001" in capsys.readouterr().err
    assert other.stat().st_mtime_ns == stamp


def test_any_damaged_file_of_the_data_is_noticed(built, tmp_path, tiny_chunks, capsys):
    """With a bit flipped in the tokenizer, in a document, in the index and in the summary, all is built as it was.

    A tokenizer with other ids would give tokens another meaning, and perhaps ids that the model does not have.
    """
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    tokenizer = (tmp_path / "tokenizer.json").read_bytes()
    for name in ("tokenizer.json", "documents/00002.documents", "heldout/index.json", "about.json"):
        flip(tmp_path / name, 8 * 77 + 1)
    prepare(small(), tmp_path)
    assert contents(tmp_path) == before
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer
    assert "damaged" in capsys.readouterr().err


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a folder of shards: two chunks, one with a mask."""
    folder = tmp_path_factory.mktemp("written")
    for number in range(2):
        ids = [np.arange(n, dtype=np.uint16) for n in (30, 1, 50)]
        masks = {"code": [d % 2 == 0 for d in ids]} if number else None
        write_chunk(folder, number, {"code": ids}, "key", None, masks)
    write_index(folder, [0, 1], "key")
    return folder


@given(st.integers(0, 2**31), st.sampled_from(["flip", "cut", "gone", "empty"]), st.data())
def test_damage_to_any_byte_is_found(written, bit, accident, data):
    """Whatever happens to whichever file, the folder is not complete, or its chunk is named."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(written, folder, dirs_exist_ok=True)
        names = sorted(path.name for path in written.iterdir())
        victim = Path(folder) / data.draw(st.sampled_from(names))
        if accident == "flip":
            flip(victim, bit)
        elif accident == "cut":
            victim.write_bytes(victim.read_bytes()[: bit % victim.stat().st_size])
        elif accident == "gone":
            victim.unlink()
        else:
            victim.write_bytes(b"")
        intact = json.loads(written.joinpath("index.json").read_text(encoding="utf-8"))
        try:
            unchanged = json.loads(victim.read_text(encoding="utf-8")) == intact
        except (OSError, ValueError):
            unchanged = False
        if victim.name == "index.json":
            # A flip between two white spaces changes no value.
            assert unchanged or shards.chunk_numbers(folder) is None
        elif accident == "flip" and victim.suffix == ".json":
            same = json.loads(written.joinpath(victim.name).read_text(encoding="utf-8"))
            with contextlib.suppress(ValueError):
                unchanged = json.loads(victim.read_text(encoding="utf-8")) == same
            assert unchanged or list(find_damage(folder)) == [int(victim.name[:5])]
        else:
            assert list(find_damage(folder)) == [int(victim.name[:5])]


def test_a_damaged_token_is_not_read_from_a_large_folder(written, tmp_path, monkeypatch):
    """Where checksums are not compared at once, the first read from a file compares its own."""
    monkeypatch.setattr(shards, "VERIFIED_BYTES", 0)
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    flip(tmp_path / "00001.00.tokens.npy", 8 * 150)
    assert not find_damage(tmp_path)
    found = load_shards(tmp_path)["code"]
    assert found[0].tolist() == list(range(30))
    with pytest.raises(ValueError, match=r"00001\.00\.tokens\.npy: wrong checksum; .* --verify"):
        found[4]
    assert list(find_damage(tmp_path, verify=True)) == [1]


def test_more_chunks_than_open_files(tmp_path):
    """A process that may open 40 files reads from 100 chunks, in any order."""
    for number in range(100):
        write_chunk(tmp_path, number, {"code": [np.full(3, number, np.uint16)]}, "key")
    write_index(tmp_path, range(100), "key")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    there = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (there + 40, hard))
        documents = load_shards(tmp_path)["code"]
        kept = [documents[n] for n in range(100)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [d.tolist() for d in kept] == [[n] * 3 for n in range(100)]


def test_another_config_builds_other_shards(built, tmp_path, tiny_chunks):
    """The folder of another config is not taken for its own."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    prepare(small("--seed", "1"), tmp_path)
    assert contents(tmp_path) != contents(built)
    prepare(small(), tmp_path)
    assert {
        name: data for name, data in contents(tmp_path).items() if name in contents(built)
    } == contents(built)


def test_shards_come_back_and_damage_is_noticed(tmp_path):
    """Saved shards load equal, only under their key; a file that was cut or changed is named."""
    saved = {"user:my notes/x": [np.arange(n, dtype=np.uint16) for n in (3, 1, 5)], "code": []}
    assert load_shards(tmp_path / "none") is None
    write_chunk(tmp_path, 0, saved, {"hash": "abc"})
    write_index(tmp_path, [0], {"hash": "abc"})
    loaded = load_shards(tmp_path, {"hash": "abc"})
    assert {k: [d.tolist() for d in v] for k, v in loaded.items()} == {
        k: [d.tolist() for d in v] for k, v in saved.items()
    }
    assert shards.source_totals(tmp_path)["user:my notes/x"] == (3, 9, 0)
    with pytest.raises(IndexError):
        loaded["code"][0]
    assert load_shards(tmp_path, {"hash": "other"}) is None
    mixture = Mixture(loaded, {"user:my notes/x": 1}, 4, "best_fit")
    assert json.dumps(mixture.state_dict()) and mixture.next(2).tokens_BS.shape == (2, 4)
    path = tmp_path / "00000.00.tokens.npy"
    array = np.load(path)
    np.save(path, array + 1)
    assert "wrong checksum" in find_damage(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"damaged token shard .*00000\.00\.tokens\.npy"):
        load_shards(tmp_path)


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=5), st.integers(0, 2**31)
)
def test_a_shard_of_parts_is_the_sequence_of_their_documents(sizes, seed):
    """Whatever the parts, some without a document, item k is document k of all."""
    rng = np.random.default_rng(seed)
    some = [[rng.integers(0, 99, n).astype(np.uint16) for n in part] for part in sizes]
    pairs = [
        shards.ShardFiles(
            np.concatenate([*part, np.zeros(0, np.uint16)]),
            np.cumsum([len(d) for d in part], dtype=np.int64),
        )
        for part in some
    ]
    shard = shards.Shard(pairs)
    flat = [d for part in some for d in part]
    assert len(shard) == len(flat)
    assert shard.lengths.tolist() == [len(d) for d in flat]
    assert [shard[n].tolist() for n in range(len(shard))] == [d.tolist() for d in flat]


def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path):
    """With room for 60 kB a file the build ends in one line that names the file; with room again, it completes."""
    words = [
        sys.executable,
        "-m",
        "minglm",
        "run",
        "configs/nano.py",
        "--out",
        str(tmp_path / "run"),
        "--until",
        "general",
    ]
    words += [*OVERRIDES, "--stages.general.tokens", "1024"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, preexec_fn=little_room, timeout=600
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("minglm: ")]
    assert "cannot write" in line and str(tmp_path) in line and "free space" in line
    assert not list(tmp_path.rglob("*.tmp"))


def test_documents_longer_than_any_row_and_sources_that_run_dry(tmp_path):
    """A text of a hundred rows is read in pieces by either packing, and a source of one short text is repeated."""
    (tmp_path / "long.txt").write_text("word after word " * 4000, encoding="utf-8")
    (tmp_path / "short.jsonl").write_text(
        '{"text": "one short text", "source": "tiny"}\n', encoding="utf-8"
    )
    run = small(
        "--data.files",
        str(tmp_path / "long.txt"),
        str(tmp_path / "short.jsonl"),
        "--data.heldout",
        "0",
        "--data.lowest_share",
        "0",
    )
    tokenizer, train, _, about = prepare(run, tmp_path / "data")
    assert max(train["prose"].lengths) > 64 * 100
    assert about["skipped"] == 0
    for packing in ("truncate", "best_fit"):
        mixture = Mixture(train, {"prose": 1, "user:tiny": 1}, 64, packing)
        batch = mixture.next(200)
        assert batch.tokens_BS.shape == (200, 64) and mixture.epochs["user:tiny"] > 10
    with pytest.raises(ValueError, match=r"source 'user:tiny' has no tokens"):
        Mixture({"user:tiny": []}, {"user:tiny": 1}, 64)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--data.near_duplicates", "1.5"],
            r"data\.near_duplicates = 1\.5: must lie between 0 and 1",
        ),
        (
            ["--data.lowest_share", "0.8", "--data.top_share", "0.4"],
            r"data\.lowest_share = 0\.8 .*at most 1",
        ),
        (
            ["--data.quality", "rubrik"],
            r"data\.quality = 'rubrik': must be rubric, learned, or .*\.jsonl file",
        ),
        (
            ["--data.top_epochs", "-1"],
            r"data\.top_epochs = -1\.0: must be a finite number, not negative",
        ),
    ],
)
def test_impossible_cleaning_is_refused(words, said):
    """One line with field and value, before anything is read."""
    with pytest.raises(ValueError, match=said):
        small(*words)


def test_a_step_of_cleaning_is_part_of_the_hash():
    """A field of cleaning that is set makes another run."""
    run = load_config("configs/nano.py")
    assert run.hash() != load_config("configs/nano.py", ["--data.near_duplicates", "0.7"]).hash()
