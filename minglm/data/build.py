"""From a config to a tokenizer and token shards: what a run reads before its first step (paper 2.2, 2.3).

    corpus -> held-out split -> decontamination -> near duplicates -> quality buckets -> tokenizer -> shards;
    solved tasks of the environments beside it, which are apart from the test tasks by a hash of their content

The sources of the shards are those of the corpus (prose, code, math, science, qa, long, repository, user:NAME) and
`tasks:ENVIRONMENT`, the oracle's trajectories for mid-training. Built once and kept in the run's folder; the same
config finds them again. `minglm.data.store.documents` says which step is computed by how many processes.
"""

import itertools
import json
import pickle
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minglm.chat import render, render_text
from minglm.common.files import atomic_path, write_json
from minglm.common.threads import thread_count
from minglm.config.run import to_dict
from minglm.data.cleaning import classifier, quality
from minglm.data.cleaning.decontaminate import Index
from minglm.data.sources import corpus
from minglm.data.sources.files import Skipped
from minglm.data.store import documents as parts
from minglm.data.store import shards
from minglm.data.tokenizer import Tokenizer
from minglm.data.workers import Executor, map_tasks

MARKED = 2000
"""Documents of a kind that the rubric marks for the classifier."""


Conversation = tuple[list[dict], Sequence[dict], bool]
"""Messages, tools and thinking: the arguments of `minglm.chat.render`."""


@dataclass(frozen=True)
class TaskData:
    """What environments contribute to the data; functions, because a build that finds its shards needs neither."""

    solved: Callable[[], dict[str, list[Conversation]]]
    """Solved tasks by environment: training documents of the source `tasks:ENVIRONMENT`."""
    evaluation_texts: Callable[[], dict[str, list[str]]]
    """Texts that the model will be scored on, by the name of their set; no training document may contain one."""


NO_TASKS = TaskData(solved=dict, evaluation_texts=dict)


def prepare(run, folder, tasks=NO_TASKS, executor=Executor.LOCAL):
    """(tokenizer, training shards, held-out shards, what was done) of a RunConfig, from `folder` or built there.

    What was done, for the log: tokens of each source, number of documents, what each step of cleaning took, records
    that could not be used, seconds. A build that was stopped goes on, and a shard that was cut short is made again.
    tasks: what the environments contribute. executor: see `minglm.data.workers`. Raises ValueError when a mixture names no source, when the tokenizer
    has more ids than the model, or as the corpus does for unreadable files.
    """
    key = {
        "data": to_dict(run)["data"],
        "vocab_size": run.model.vocab_size,
        "seed": run.seed,
        "format": 2,
    }
    about, parts_of = folder / "about.json", [folder / "train", folder / "heldout"]
    for part in parts_of:
        if shards.index(part, key) is not None:
            for number, wrong in shards.damaged(part).items():
                print(f"minglm: {wrong}; it is built again", file=sys.stderr)
                shards.forget(part, number)
    if None in [shards.index(part, key) for part in parts_of] or not about.exists():
        build(run, folder, key, tasks, executor)
    train, heldout = (shards.load_shards(part, key) for part in parts_of)
    _check_mixtures(run, train)
    return Tokenizer.load(folder / "tokenizer.json"), train, heldout, json.loads(about.read_text())


def build(run, folder, key, task_data=NO_TASKS, executor=Executor.LOCAL):
    """Write documents, tokenizer and shards of a run under `folder`, as far as they are not there under this key."""
    began, workers, solved = time.time(), thread_count(run.threads), task_data.solved()
    documents, tokenizer = folder / "documents", folder / "tokenizer.json"
    done = _done(documents, key)
    if done is None:
        shutil.rmtree(documents, ignore_errors=True)
        skipped = Skipped(documents / "skipped.log")
        bar = tqdm(
            corpus.documents(run.data, run.seed, skipped),
            desc="read",
            unit=" documents",
            disable=None,
        )
        paths = parts.write(bar, documents)
        times, cleaning = clean(run, paths, folder, task_data.evaluation_texts, executor, workers)
        build_tokenizer(run, texts(paths, times), solved).save(tokenizer)
        with atomic_path(documents / "times.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, times)
        done = {
            "key": key,
            "parts": len(paths),
            "documents": cleaning.pop("documents"),
            "cleaning": cleaning,
        }
        done |= {
            "skipped": skipped.count,
            "skipped_log": f"{skipped.path}" if skipped.count else "",
        }
        write_json(documents / "done.json", done)
    tasks = shard_tasks(run, folder, key, done["parts"])
    sizes = [Path(task["path"]).stat().st_size for task in tasks]
    map_tasks(parts.shard, tasks, executor, workers, "tokenize", sizes)
    if shards.part(folder / "train", done["parts"], key) is None:
        save_solutions(solved, Tokenizer.load(tokenizer), folder / "train", done["parts"], key)
    shards.finish(folder / "heldout", range(done["parts"]), key)
    shards.finish(folder / "train", range(done["parts"] + 1), key)
    totals = shards.totals(folder / "train")
    about = {"tokens": {name: row["tokens"] for name, row in totals.items()}}
    about |= {name: done[name] for name in ("documents", "cleaning", "skipped", "skipped_log")}
    write_json(folder / "about.json", about | {"seconds": round(time.time() - began, 1)})
    if done["skipped"]:
        print(
            f"minglm: {done['skipped']:,} records could not be used; see {done['skipped_log']}",
            file=sys.stderr,
        )


def _done(documents, key):
    """What `build` noted when the documents under this key were complete; None where they are not."""
    try:
        done = json.loads((documents / "done.json").read_text())
        return done if done["key"] == json.loads(json.dumps(key)) else None
    except (OSError, ValueError, KeyError):
        return None


def clean(run, paths, folder, evaluation_texts=dict, executor=Executor.LOCAL, workers=1):
    """(how often each document of the parts is used, what each step took); see `minglm.data.store.documents.decide`."""
    found, work, data = parts.records(paths), folder / "work", run.data
    work.mkdir(parents=True, exist_ok=True)
    task, noted = dict.fromkeys(("index", "judge")), {}
    task |= {"near": bool(data.near_duplicates), "semantic": bool(data.semantic_duplicates)}
    task["educational"] = bool(data.educational)
    if data.decontaminate:
        originals = set(corpus.originals([(r.digest, r.heldout) for r in found]))
        sets = {name: list(some) for name, some in evaluation_texts().items()}
        for n, document in enumerate(d for path in paths for d in parts.read(path)):
            if document.heldout and n in originals:
                sets.setdefault(document.source, []).append(document.text)
        index = Index(sets, data.decontaminate)
        noted["decontamination"] = {
            "n": data.decontaminate,
            "items": index.sets,
            "not_searched": index.passed,
        }
        task["index"] = f"{work / 'items.pickle'}"
        with atomic_path(task["index"]) as temporary:
            temporary.write_bytes(pickle.dumps(index))
    if data.quality != "rubric":
        judge, noted["judges"] = classifier.train(labels(data.quality, paths), run.seed)
        task["judge"] = f"{work / 'judge.npz'}"
        judge.save(task["judge"])
    tasks = [{**task, "path": f"{path}"} for path in paths]
    features = map_tasks(
        parts.measure, tasks, executor, workers, "clean", [path.stat().st_size for path in paths]
    )
    times, done = parts.decide(found, features, data)
    if "decontamination" in noted:
        done["decontamination"] = noted["decontamination"] | {"removed": done["decontamination"]}
    if "judges" in noted:
        done["judges"] = noted["judges"]
    shutil.rmtree(work)
    return times, done


def labels(quality_of, paths):
    """Marked documents for the classifiers: those of a file, or MARKED of each kind with the rubric's marks.

    quality_of: "learned" or the path of a .jsonl file. paths: of the parts.
    """
    if quality_of != "learned":
        return classifier.read_labels(quality_of)
    chosen = {}
    for path in paths:
        for document in parts.read(path):
            if not document.heldout and document.source not in ("repository", "long", "qa"):
                kind = chosen.setdefault(classifier.kind(document.source, document.language), [])
                kind.append((zlib.crc32(document.name.encode()), document))
        chosen = {
            kind: sorted(some, key=lambda pair: pair[0])[:MARKED] for kind, some in chosen.items()
        }
    rows = []
    for _, document in (pair for some in chosen.values() for pair in some):
        science = document.source in ("math", "science")
        mark = (
            quality.educational(document.text)
            if science
            else quality.score(document.text, document.language)
        )
        rows.append((document.text, mark, document.source, document.language))
    return rows


def shard_tasks(run, folder, key, count):
    """What `parts.shard` has to do for those of `count` parts that have no shards under this key."""
    documents, tasks, at, first = folder / "documents", [], 0, 0
    times = np.load(documents / "times.npy")
    for number in range(count):
        path = documents / f"{number:05d}.documents"
        heldout = np.array([d.heldout for d in parts.read(path)], bool)
        mine = times[at : at + len(heldout)]
        if None in [shards.part(folder / name, number, key) for name in ("train", "heldout")]:
            options = {
                "seed": run.seed,
                "fim_rate": run.data.fim_rate,
                "fim_characters": run.data.fim_characters,
            }
            options |= {"path": f"{path}", "number": number, "times": mine.tolist(), "first": first}
            tasks.append(
                options
                | {"folder": f"{folder}", "key": key, "tokenizer": f"{folder / 'tokenizer.json'}"}
            )
        at, first = at + len(mine), first + int(mine[~heldout].sum())
    return tasks


def save_solutions(solved, tokenizer, folder, number, key):
    """Solved tasks as the last part of the training shards."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    tokens = {
        f"tasks:{n}": [np.array(render(tokenizer, *c).ids, dtype) for c in some]
        for n, some in solved.items()
    }
    sizes = {
        f"tasks:{n}": sum(len(render_text(*c).encode()) for c in some) for n, some in solved.items()
    }
    shards.write_part(folder, number, tokens, key, sizes)


def texts(paths, times):
    """The text of each training document, as often as it is used, except repositories, whose files stand alone too."""
    times = iter(times.tolist())
    for path in paths:
        for document in parts.read(path):
            for _ in range(next(times)):
                if not document.heldout and document.source != "repository":
                    yield document.text


def _check_mixtures(run, shards):
    """Refuse a mixture now, and not when its stage is reached."""
    for name, stage in run.stages.items():
        for source in stage.mixture:
            if stage.tokens and source not in shards:
                known = ", ".join(sorted(shards))
                raise ValueError(
                    f"stages.{name}.mixture names the source {source!r}; the corpus has {known}"
                )


def build_tokenizer(run, corpus_texts, solved):
    """The tokenizer of the config, or one trained on the corpus and the trajectories."""
    if run.data.tokenizer:
        tokenizer = Tokenizer.load(run.data.tokenizer)
    else:
        rendered = (
            render_text(*conversation)
            for conversations in solved.values()
            for conversation in conversations
        )
        tokenizer = Tokenizer.train(itertools.chain(corpus_texts, rendered), run.model.vocab_size)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ValueError(
            f"model.vocab_size = {run.model.vocab_size}: the tokenizer has {tokenizer.vocab_size} ids"
        )
    return tokenizer
