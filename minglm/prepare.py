"""From a config to a tokenizer and token shards: what a run reads before its first step (paper 2.2, 2.3).

    corpus -> held-out split -> decontamination -> near duplicates -> quality buckets -> tokenizer -> shards;
    solved tasks of the environments beside it, which are apart from the test tasks by a hash of their content

The sources of the shards are those of the corpus (prose, code, math, science, qa, long, repository, user:NAME) and
`tasks:ENVIRONMENT`, the oracle's trajectories for mid-training. Built once and kept in the run's folder; the same
config finds them again.
"""

import json
import time

import numpy as np

from minglm.chat import render, render_text
from minglm.common import write_json
from minglm.config import older, to_dict
from minglm.data import corpus, quality
from minglm.data.decontaminate import decontaminate
from minglm.data.mixture import load_shards, save_shards, tokenize
from minglm.data.tokenizer import Tokenizer
from minglm.envs import ENVIRONMENTS
from minglm.evaluate import TEST_SEED

TASK_SEED = 1


def check_environments(run):
    """Raises ValueError for a stage of post-training without tasks, or with tasks that do not exist."""
    post = run.posttraining
    named = {f"{name}.environments": expert.environments for name, expert in post.experts()}
    named |= {f"{name}.rl.environments": expert.rl.environments for name, expert in post.experts()}
    named |= {f"{name}.environments": getattr(post, name).environments for name in ("general_rl", "pathology_rl")}
    for name, environments in named.items():
        if not environments or not set(environments) <= set(ENVIRONMENTS):
            given = " ".join(environments) or "nothing"
            raise ValueError(f"posttraining.{name} = {given}: must be some of {', '.join(ENVIRONMENTS)}")


def prepare(run, folder):
    """(tokenizer, training shards, held-out shards, what was done) of a Run, from `folder` or built there.

    What was done, for the log: tokens of each source, number of documents, what each step of cleaning took, seconds.
    Raises ValueError when a mixture names no source, when the tokenizer has more ids than the model, or as the corpus
    does for unreadable files.
    """
    key = {"data": older(to_dict(run)["data"]), "vocab_size": run.model.vocab_size, "seed": run.seed}
    path, about = folder / "tokenizer.json", folder / "about.json"
    shards, heldout = (load_shards(folder / part, key) for part in ("train", "heldout"))
    if shards is not None and heldout is not None and path.exists() and about.exists():
        _check_mixtures(run, shards)
        return Tokenizer.load(path), shards, heldout, json.loads(about.read_text())
    began = time.time()
    documents = corpus.build(run.data, run.seed)
    kept, cleaning = clean(run, documents)
    solved = solutions(run)
    tokenizer = build_tokenizer(run, kept, solved)
    tokenizer.save(path)
    save_shards(folder / "heldout", tokenize([d for d in documents if d.heldout], tokenizer), key)
    shards = tokenize(kept, tokenizer, run.data.fim_rate, run.seed, run.data.fim_characters)
    for name, conversations in solved.items():
        shards[f"tasks:{name}"] = [np.array(render(tokenizer, *c).ids, np.uint32) for c in conversations]
    counts = {name: int(sum(map(len, arrays))) for name, arrays in shards.items()}
    done = {"tokens": counts, "documents": len(kept), "cleaning": cleaning, "seconds": round(time.time() - began, 1)}
    write_json(about, done)
    save_shards(folder / "train", shards, key)  # last: what has an index is complete
    return prepare(run, folder)


def clean(run, documents):
    """(training documents, what was done, for the log): without evaluation items, by quality."""
    training, done = [document for document in documents if not document.heldout], {}
    if run.data.decontaminate:
        items = evaluation_sets(run, documents)
        training, done["decontamination"] = decontaminate(training, items, run.data.decontaminate)
    times = quality.epochs(training)
    return [d for d, n in zip(training, times, strict=True) for _ in range(n)], done


def evaluation_sets(run, documents):
    """The text of everything a run is scored on, {name: texts}: test tasks by environment, held-out text by source."""
    sets = {}
    for name, environment in ENVIRONMENTS.items():
        tasks = environment.tasks(run.evaluation.problems, TEST_SEED, "test")
        sets[f"tasks:{name}"] = ["\n".join(m["content"] for m in t.messages if m["role"] == "user") for t in tasks]
    for document in documents:
        if document.heldout:
            sets.setdefault(document.source, []).append(document.text)
    return sets


def _check_mixtures(run, shards):
    """Refuse a mixture now, and not when its stage is reached."""
    for name, stage in run.stages.items():
        for source in stage.mixture:
            if stage.tokens and source not in shards:
                known = ", ".join(sorted(shards))
                raise ValueError(f"stages.{name}.mixture names the source {source!r}; the corpus has {known}")


def build_tokenizer(run, documents, solved):
    """The tokenizer of the config, or one trained on the corpus and the trajectories."""
    if run.data.tokenizer:
        tokenizer = Tokenizer.load(run.data.tokenizer)
    else:
        texts = [document.text for document in documents if document.source != "repository"]
        texts += [render_text(*conversation) for conversations in solved.values() for conversation in conversations]
        tokenizer = Tokenizer.train(texts, run.model.vocab_size)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ValueError(f"model.vocab_size = {run.model.vocab_size}: the tokenizer has {tokenizer.vocab_size} ids")
    return tokenizer


def solutions(run):
    """Solved tasks for mid-training, {environment: [(messages, tools, thinking)]}; three in four with thinking.

    Only one trajectory in four lists its tools: the block is longer than the conversation, and always the same.
    """
    post, found = run.posttraining, {}
    names = [name for _, expert in post.experts() for name in expert.environments]
    for name in dict.fromkeys([*names, *post.pathology_rl.environments]):
        found[name] = []
        for number, task in enumerate(ENVIRONMENTS[name].tasks(run.data.trajectories, run.seed * 100 + TASK_SEED)):
            thinking, tools = number % 4 != 3, task.tools if number % 8 < 2 else ()
            found[name].append((ENVIRONMENTS[name].demonstrate(task, thinking), tools, thinking))
    return found
