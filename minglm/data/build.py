"""Build the data of a run: a tokenizer and token shards, made from its config before the first step (paper 2.2, 2.3).

    sources -> documents -> held-out split -> cleaning -> repeats -> tokenizer -> shards;
    solved tasks beside them, which differ from the test tasks by a hash of their content

The sources of the shards are those of the corpus (`sources.files.BUILT_IN_SOURCES` and user:NAME) and
`tasks:ENVIRONMENT`, the oracle's trajectories for mid-training. The data is built once and kept in the run's
folder; the same config finds it again. A build that was stopped continues where it was:

    FOLDER/documents/00000.documents ...   the corpus, then `repeats.npy` and `done.json`, which says it is complete,
                                           with the checksums of these and of the tokenizer
    FOLDER/tokenizer.json
    FOLDER/train, FOLDER/heldout           token shards (`minglm.data.store.shards`)
    FOLDER/about.json                      what was done, for the log
"""

import itertools
import json
import pickle
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from minglm.chat import render_text
from minglm.common.files import atomic_path
from minglm.common.threads import thread_count
from minglm.config.data import Quality
from minglm.config.run import RunConfig, to_dict
from minglm.data.cleaning import classifier, quality, selection
from minglm.data.cleaning.classifier import MarkedDocument
from minglm.data.cleaning.decontaminate import Index
from minglm.data.dialogues import Conversation, examples
from minglm.data.sources import corpus
from minglm.data.sources.files import Skipped
from minglm.data.store import shards
from minglm.data.store.documents import Document, chunk_path, read_documents, write_documents
from minglm.data.store.sealed import file_checksum, read_sealed, write_sealed
from minglm.data.tokenization import FimOptions, ShardTask, token_dtype, write_shards
from minglm.data.tokenizer import Tokenizer
from minglm.data.workers import Executor, map_tasks

MARKED_PER_KIND = 2000
"""Documents of each kind that the rubric marks for the classifier."""

REASONS = 20
"""The most frequent reasons for skipping a record, that are noted with their counts."""

FORMAT = 5
"""Shards of another format are built again."""


@dataclass(frozen=True)
class TaskData:
    """What environments contribute to the data; functions, because a build that finds its shards calls neither."""

    solved: Callable[[], dict[str, list[Conversation]]]
    """Solved tasks by environment: training documents of the source `tasks:ENVIRONMENT`."""
    evaluation_texts: Callable[[], dict[str, list[str]]]
    """Texts that the model will be scored on, by the name of their set; no training document may contain one."""


NO_TASKS = TaskData(solved=dict, evaluation_texts=dict)


class PreparedData(NamedTuple):
    """What a run reads."""

    tokenizer: Tokenizer
    train: dict[str, shards.Shard]
    """Training documents by source."""
    heldout: dict[str, shards.Shard]
    """Held-out documents by source."""
    about: dict[str, Any]
    """For the log: tokens of each source, documents, what each step of cleaning removed, skipped records, seconds."""


@dataclass(frozen=True)
class Workers:
    """Who computes the tasks of a build."""

    executor: Executor
    count: int

    def map(self, function: Callable, tasks: Sequence, label: str, paths: Sequence[Path]) -> list:
        """Return the function of every task; the progress bar counts the bytes of the file of each task."""
        sizes = [path.stat().st_size for path in paths]
        return map_tasks(function, tasks, self.executor, self.count, label, sizes)


def prepare(
    run: RunConfig,
    folder: Path,
    tasks: TaskData = NO_TASKS,
    executor: Executor = Executor.LOCAL,
) -> PreparedData:
    """Return the data of a run, from `folder` or built there.

    A build that was stopped continues, and a file that was damaged is made again.

    Args:
        tasks: what the environments contribute.
        executor: see `minglm.data.workers`.

    Raises:
        ValueError: if a mixture names no source, if the tokenizer has more ids than the model, or for unreadable files.
    """
    key = {
        "data": to_dict(run)["data"],
        "vocab_size": run.model.vocab_size,
        "seed": run.seed,
        "format": FORMAT,
    }
    splits = [folder / "train", folder / "heldout"]
    for split in splits:
        for number, fault in shards.find_damage(split).items():
            print(f"minglm: {fault}; it is built again", file=sys.stderr)
            shards.discard_chunk(split, number)
    about = read_sealed(folder / "about.json")
    shard_key = _shard_key(key, folder)
    complete = all(shards.chunk_numbers(split, shard_key) is not None for split in splits)
    if not complete or about is None:
        workers = Workers(executor, thread_count(run.threads))
        about = build(run, folder, key, tasks, workers)
    train, heldout = (shards.load_shards(split, _shard_key(key, folder)) for split in splits)
    assert train is not None and heldout is not None
    _check_mixtures(run, train)
    return PreparedData(Tokenizer.load(folder / "tokenizer.json"), train, heldout, about)


def _shard_key(key: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what shards are made from: what the documents are, and the tokenizer, whose ids they hold."""
    return {**key, "tokenizer": file_checksum(folder / "tokenizer.json")}


def build(
    run: RunConfig, folder: Path, key: dict[str, Any], tasks: TaskData, workers: Workers
) -> dict[str, Any]:
    """Write documents, tokenizer and shards of a run under `folder`, unless they are there under this key.

    Returns what was done, for the log, and writes it to about.json.
    """
    began = time.time()
    solved = tasks.solved()
    tokenizer_path = folder / "tokenizer.json"

    done = _read_done(folder, key)
    if done is None:
        done = _build_documents(run, folder, key, tasks, solved, workers)

    shard_key = _shard_key(key, folder)
    shard_tasks = plan_shards(run, folder, shard_key, done["chunks"])
    paths = [Path(task.path) for task in shard_tasks]
    workers.map(write_shards, shard_tasks, "tokenize", paths)
    # The solved tasks are the last chunk of the training shards.
    if shards.chunk_entries(folder / "train", done["chunks"], shard_key) is None:
        tokenizer = Tokenizer.load(tokenizer_path)
        save_solutions(solved, tokenizer, folder / "train", done["chunks"], shard_key)
    shards.write_index(folder / "heldout", range(done["chunks"]), shard_key)
    shards.write_index(folder / "train", range(done["chunks"] + 1), shard_key)

    totals = shards.source_totals(folder / "train")
    about: dict[str, Any] = {"tokens": {source: total.tokens for source, total in totals.items()}}
    for name in ("documents", "cleaning", "skipped", "skipped_log", "skipped_reasons", "not_read"):
        about[name] = done[name]
    about["seconds"] = round(time.time() - began, 1)
    write_sealed(folder / "about.json", about)
    if done["skipped"]:
        message = f"{done['skipped']:,} records could not be used; see {done['skipped_log']}"
        print(f"minglm: {message}", file=sys.stderr)
    return about


def _read_done(folder: Path, key: Any) -> dict[str, Any] | None:
    """Return what was noted when the documents under this key were complete, or None if they are not, or changed."""
    done = read_sealed(folder / "documents" / "done.json")
    if done is None or done["key"] != json.loads(json.dumps(key)):
        return None
    for name, checksum in done["files"].items():
        if file_checksum(folder / name) != checksum:
            print(
                f"minglm: damaged {folder / name}; the sources are read again to build it",
                file=sys.stderr,
            )
            return None
    return done


def _build_documents(
    run: RunConfig,
    folder: Path,
    key: Any,
    tasks: TaskData,
    solved: Mapping[str, Sequence[Conversation]],
    workers: Workers,
) -> dict[str, Any]:
    """Read and clean the corpus, train the tokenizer, and return what was done, as noted in done.json."""
    documents = folder / "documents"
    shutil.rmtree(documents, ignore_errors=True)
    skipped = Skipped(documents / "skipped.log")
    stream = corpus.documents(run.data, run.seed, skipped)
    bar = tqdm(stream, desc="read", unit=" documents", disable=None)
    paths = write_documents(bar, documents)

    repeats, report = clean(run, paths, folder, tasks.evaluation_texts, workers)
    tokenizer = build_tokenizer(run, training_texts(paths, repeats), solved)
    tokenizer.save(folder / "tokenizer.json")
    with atomic_path(documents / "repeats.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, repeats)

    files = [*paths, documents / "repeats.npy", folder / "tokenizer.json"]
    done = {
        "key": key,
        "files": {f"{path.relative_to(folder)}": file_checksum(path) for path in files},
        "chunks": len(paths),
        "documents": report.pop("documents"),
        "cleaning": report,
        "skipped": skipped.count,
        "skipped_log": f"{skipped.path}" if skipped.count else "",
        "skipped_reasons": dict(skipped.reasons.most_common(REASONS)) or None,
        "not_read": dict(skipped.not_read.most_common()) or None,
    }
    write_sealed(documents / "done.json", done)
    return done


def clean(
    run: RunConfig,
    paths: Sequence[Path],
    folder: Path,
    evaluation_texts: Callable[[], Mapping[str, Sequence[str]]] = dict,
    workers: Workers = Workers(Executor.LOCAL, 1),
) -> selection.Selection:
    """Decide how often each document of these chunks is used; see `minglm.data.cleaning.selection`."""
    records = selection.read_records(paths)
    config = run.data
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)

    index_path = None
    searched = {}
    if config.decontaminate:
        sets = {name: list(texts) for name, texts in evaluation_texts().items()}
        for source, texts in _heldout_texts(paths, records).items():
            sets.setdefault(source, []).extend(texts)
        index = Index(sets, config.decontaminate)
        searched = {
            "n": config.decontaminate,
            "items": index.searched,
            "not_searched": index.not_searched,
        }
        index_path = work / "items.pickle"
        with atomic_path(index_path) as temporary:
            temporary.write_bytes(pickle.dumps(index))

    judge_path = None
    judge_reports = {}
    if config.quality != Quality.RUBRIC:
        judge, judge_reports = classifier.train_judge(labels(config.quality, paths), run.seed)
        judge_path = work / "judge.npz"
        judge.save(judge_path)

    tasks = [
        selection.FeatureTask(
            path=f"{path}",
            index=f"{index_path}" if index_path else None,
            judge=f"{judge_path}" if judge_path else None,
            near=bool(config.near_duplicates),
            semantic=bool(config.semantic_duplicates),
            educational=bool(config.educational),
        )
        for path in paths
    ]
    features = workers.map(selection.compute_features, tasks, "clean", paths)
    repeats, report = selection.select(records, features, config)
    if config.decontaminate:
        report["decontamination"] = {**searched, "removed": report["decontamination"]}
    if judge_reports:
        report["judges"] = judge_reports
    shutil.rmtree(work)
    return selection.Selection(repeats, report)


def _heldout_texts(
    paths: Sequence[Path], records: Sequence[selection.DocumentRecord]
) -> dict[str, list[str]]:
    """Return the text of the held-out documents by source, without exact copies."""
    kept = {n for n in selection.find_originals(records) if records[n].heldout}
    texts: dict[str, list[str]] = {}
    for n, document in enumerate(_read_all(paths)):
        if n in kept:
            texts.setdefault(document.source, []).append(document.text)
    return texts


def _read_all(paths: Iterable[Path]) -> Iterator[Document]:
    for path in paths:
        yield from read_documents(path)


def labels(teacher: str, paths: Sequence[Path]) -> list[MarkedDocument]:
    """Return marked documents for the classifiers.

    Args:
        teacher: the path of a .jsonl file of marks, or "learned": then the rubric marks MARKED_PER_KIND documents of
            each kind, chosen by a hash of their names.
        paths: the chunks of the corpus.
    """
    if teacher != Quality.LEARNED:
        return classifier.read_labels(teacher)
    by_kind: dict[str, list[tuple[int, Document]]] = {}
    for document in _read_all(paths):
        if document.heldout or document.source in ("repository", "long", "qa"):
            continue
        kind = classifier.document_kind(document.source, document.language)
        place = zlib.crc32(document.name.encode())
        by_kind.setdefault(kind, []).append((place, document))

    marked = []
    for documents in by_kind.values():
        documents.sort(key=lambda pair: pair[0])
        for _, document in documents[:MARKED_PER_KIND]:
            if document.source in quality.SCIENCE:
                mark = quality.educational(document.text)
            else:
                mark = quality.score(document.text, document.language, document.source)
            marked.append(MarkedDocument(document.text, mark, document.source, document.language))
    return marked


def plan_shards(run: RunConfig, folder: Path, key: Any, chunks: int) -> list[ShardTask]:
    """Return a task for each of the corpus' chunks that has no shards under this key."""
    repeats = np.load(folder / "documents" / "repeats.npy")
    fim = FimOptions(run.data.fim_rate, run.data.fim_characters, run.seed)
    tasks = []
    start = 0  # position of the chunk's first document in the corpus
    first = 0  # the same among the training documents, repeats counted
    for number in range(chunks):
        path = chunk_path(folder / "documents", number)
        heldout = np.array([document.heldout for document in read_documents(path)], bool)
        chunk_repeats = repeats[start : start + len(heldout)]
        written = [
            shards.chunk_entries(folder / split, number, key) for split in ("train", "heldout")
        ]
        if None in written:
            task = ShardTask(
                path=f"{path}",
                number=number,
                repeats=chunk_repeats.tolist(),
                first=first,
                folder=f"{folder}",
                key=key,
                tokenizer=f"{folder / 'tokenizer.json'}",
                fim=fim,
            )
            tasks.append(task)
        start += len(chunk_repeats)
        first += int(chunk_repeats[~heldout].sum())
    return tasks


def save_solutions(
    solved: Mapping[str, Sequence[Conversation]],
    tokenizer: Tokenizer,
    folder: Path,
    number: int,
    key: Any,
) -> None:
    """Write solved tasks as one chunk of the training shards, one document a user turn; see `dialogues`."""
    dtype = token_dtype(tokenizer)
    arrays = {}
    masks = {}
    sizes = {}
    for environment, conversations in solved.items():
        source = f"tasks:{environment}"
        found = [
            example
            for conversation in conversations
            for example in examples(tokenizer, *conversation, language_modelling=True)
        ]
        arrays[source] = [example.tokens_S.astype(dtype) for example in found]
        masks[source] = [example.mask_S for example in found]
        sizes[source] = sum(len(tokenizer.bytes(example.tokens_S)) for example in found)
    shards.write_chunk(folder, number, arrays, key, sizes, masks)


def training_texts(paths: Iterable[Path], repeats: np.ndarray) -> Iterator[str]:
    """Yield the text of each training document as often as it is used.

    Repositories are left out, because their files are documents too.
    """
    for document, count in zip(_read_all(paths), repeats.tolist(), strict=True):
        if not document.heldout and document.source != "repository":
            yield from itertools.repeat(document.text, count)


def _check_mixtures(run: RunConfig, train: Mapping[str, shards.Shard]) -> None:
    """Refuse a mixture that names an unknown source now, and not when its stage is reached."""
    for name, stage in run.stages.items():
        for source in stage.mixture:
            if stage.tokens and source not in train:
                known = ", ".join(sorted(train))
                raise ValueError(
                    f"stages.{name}.mixture names the source {source!r}; the corpus has {known}"
                )


def build_tokenizer(
    run: RunConfig,
    texts: Iterable[str],
    solved: Mapping[str, Sequence[Conversation]],
) -> Tokenizer:
    """Return the tokenizer of the config, or train one on the corpus and the solved tasks."""
    if run.data.tokenizer:
        tokenizer = Tokenizer.load(run.data.tokenizer)
    else:
        conversations = itertools.chain.from_iterable(solved.values())
        rendered = (render_text(*conversation) for conversation in conversations)
        tokenizer = Tokenizer.train(itertools.chain(texts, rendered), run.model.vocab_size)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ValueError(
            f"model.vocab_size = {run.model.vocab_size}: the tokenizer has {tokenizer.vocab_size} ids"
        )
    return tokenizer
