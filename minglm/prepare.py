"""From a config to a tokenizer and token shards: what a run reads before its first step (paper 2.2, 2.3).

    corpus -> held-out split -> quality buckets -> tokenizer -> shards;   solved tasks of the environments beside it

The sources of the shards are those of the corpus (prose, code, math, science, qa, long, repository, user:NAME) and
`tasks:ENVIRONMENT`, the oracle's trajectories for mid-training. Built once and kept in the run's folder; the same
config finds them again.
"""

import time

import numpy as np

from minglm.chat import render, render_text
from minglm.config import to_dict
from minglm.data import corpus, quality
from minglm.data.mixture import load_shards, save_shards, tokenize
from minglm.data.tokenizer import Tokenizer
from minglm.envs import ENVIRONMENTS

TASK_SEED = 1


def prepare(run, folder, log):
    """(tokenizer, training shards, held-out shards) of a Run, from `folder` or built there.

    Raises ValueError when the tokenizer has more ids than the model, or as the corpus does for unreadable files.
    """
    key = {"data": to_dict(run)["data"], "vocab_size": run.model.vocab_size, "seed": run.seed}
    path = folder / "tokenizer.json"
    shards, heldout = (load_shards(folder / part, key) for part in ("train", "heldout"))
    if shards is not None and heldout is not None and path.exists():
        return Tokenizer.load(path), shards, heldout
    began = time.time()
    documents = corpus.build(run.data, run.seed)
    kept = quality.keep([document for document in documents if not document.heldout])
    solved = solutions(run)
    tokenizer = build_tokenizer(run, kept, solved)
    tokenizer.save(path)
    save_shards(folder / "heldout", tokenize([d for d in documents if d.heldout], tokenizer), key)
    shards = tokenize(kept, tokenizer, run.data.fim_rate, run.seed, run.data.fim_characters)
    for name, conversations in solved.items():
        shards[f"tasks:{name}"] = [np.array(render(tokenizer, *c).ids, np.uint32) for c in conversations]
    save_shards(folder / "train", shards, key)
    counts = {name: int(sum(map(len, arrays))) for name, arrays in shards.items()}
    log.write("data", tokens=counts, documents=len(kept), seconds=round(time.time() - began, 1))
    return tokenizer, *(load_shards(folder / part, key) for part in ("train", "heldout"))


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
    found = {}
    for name in (name for _, expert in run.posttraining.experts() for name in expert.environments):
        found[name] = []
        for number, task in enumerate(ENVIRONMENTS[name].tasks(run.data.trajectories, run.seed * 100 + TASK_SEED)):
            thinking, tools = number % 4 != 3, task.tools if number % 8 < 2 else ()
            found[name].append((ENVIRONMENTS[name].demonstrate(task, thinking), tools, thinking))
    return found
