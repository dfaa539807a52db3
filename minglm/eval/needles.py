"""Is a longer context used? A needle by depth and length, and bits per byte by position (paper 2.3, Figure 3).

    row      filler ... "The key of Ada is 4071." ... filler "The key of Ada is" -> " 4071"?
    found    share of rows in which every token of the answer is the most probable one: what greedy decoding would say
    nats     -log p of the answer per token, mean over rows: falls before anything is found
    bits     sum of -log2 p over the tokens at some positions / bytes of these tokens

A row has exactly `length` tokens; depth 0 puts the needle at its beginning, 1 right before the question. All depths of
a length see the same fillers, names and keys. By position, only documents that fill a whole row count, so that all
positions are measured on the same text; the first tokens of a row are dear because nothing stands before them.

Simplified: one needle a row, no distractors. The paper names its lengths and no test of them; this is the public one.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from minglm.report.records import BitsByPositionRecord, NeedleRecord
from minglm.train.stages import phases

NAMES = ("Ada", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "Jana", "Karl", "Lea")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PASS_TOKENS, HEAD_TOKENS = 8192, 2048  # in one forward pass; whose logits exist at one time


@dataclass(frozen=True)
class Needle:
    """What is hidden in a row, what is asked at its end, and the right answer: lists of ids."""

    statement: list
    question: list
    answer: list


def written_needles(tokenizer, count, seed=0):
    """`count` needles in words: a name, and a key of four digits that is another in each."""
    random = np.random.default_rng([seed, 5])
    found = []
    for key in random.permutation(9000)[:count] + 1000:
        question = tokenizer.encode(f"\nThe key of {random.choice(NAMES)} is")
        answer = tokenizer.encode(f" {key}")
        found.append(Needle([*question, *answer, *tokenizer.encode(".\n")], question, answer))
    return found


def hide(filler, needle, length, depth):
    """A row of `length` ids: `needle` at `depth` (0 to 1) in the first ids of `filler`, then its question and answer.

    Raises ValueError when the needle does not fit or the filler does not reach.
    """
    room = length - sum(map(len, (needle.statement, needle.question, needle.answer)))
    if room < 0:
        raise ValueError(f"a needle of {length - room} tokens does not fit into a row of {length}")
    if len(filler) < room:
        raise ValueError(
            f"a row of {length} tokens needs {room} tokens of filler, got {len(filler)}"
        )
    at = round(depth * room)
    return np.concatenate(
        [filler[:at], needle.statement, filler[at:room], needle.question, needle.answer]
    )


@torch.inference_mode()
def needle_test(model, filler, needles, lengths, depths=DEPTHS):
    """How often, and how surely, a model answers with what was hidden in its context.

    model: a GLM. filler: integer array (ids,), at least as long as the longest row. needles: `Needle`s, one a row.
    Returns [{"length", "depth", "found", "nats"}] in the order of lengths, then depths. Raises ValueError as `hide`.
    """
    records = []
    for length in lengths:
        begins = np.linspace(0, max(0, len(filler) - length), len(needles)).astype(
            int
        )  # other text in each row
        for depth in depths:
            rows = [
                hide(filler[at : at + length], n, length, depth) for at, n in zip(begins, needles)
            ]
            scores = answer_scores(model, rows, [len(needle.answer) for needle in needles])
            found, nats = (sum(column) / len(scores) for column in zip(*scores))
            records.append({"length": length, "depth": depth, "found": found, "nats": nats})
    return records


def answer_scores(model, rows, sizes):
    """[(whether each of a row's last `size` ids is the most probable one, their mean -log p)]; rows of one length."""
    scores, at_once, longest = [], max(1, PASS_TOKENS // len(rows[0])), max(sizes)
    for at in range(0, len(rows), at_once):
        tokens_BS = torch.tensor(
            np.stack(rows[at : at + at_once]), dtype=torch.int64, device=model.device
        )
        hidden_BSD = model.hidden(tokens_BS).hidden_BSD[:, -longest - 1 : -1]
        log_p_BSV = model.lm_head(hidden_BSD).float().log_softmax(-1)
        answer_BS = tokens_BS[:, -longest:]
        right_BS = log_p_BSV.argmax(-1) == answer_BS
        log_p_BS = log_p_BSV.gather(2, answer_BS[..., None])[..., 0]
        for right_S, log_p_S, size in zip(right_BS, log_p_BS, sizes[at : at + at_once]):
            scores.append((float(right_S[-size:].all()), -log_p_S[-size:].mean().item()))
    return scores


def bounds(length, first=64):
    """Where the bins of positions begin and end: 0, first, 2 first, 4 first, ... and `length`."""
    return [0] + [first << i for i in range(length.bit_length()) if first << i < length] + [length]


@torch.inference_mode()
def bits_by_position(model, tokenizer, documents, length, limit):
    """Bits per byte of text by its position in a row of `length` tokens, over at most `limit` tokens.

    documents: integer arrays; those shorter than a row are left out. Returns [[first position, end, bits per byte]] of
    `bounds`, or None where no document fills a row. Bits are None for a bin without text.
    """
    spans = [
        d[at : at + length]
        for d in documents
        if len(d) >= length
        for at in range(0, len(d) - length + 1, length)
    ]
    spans = spans[: max(1, limit // length)]
    if not spans:
        return None
    rows_BS, (nats_S, bytes_S) = np.stack(spans).astype(np.int64), np.zeros((2, length))
    ids, at_BS = np.unique(rows_BS, return_inverse=True)
    sizes = np.array([len(tokenizer.bytes([token], skip_special=True)) for token in ids])
    bytes_S[1:] = sizes[at_BS.reshape(rows_BS.shape)][:, 1:].sum(0)
    for tokens_BS in torch.from_numpy(rows_BS).split(max(1, PASS_TOKENS // length)):
        tokens_BS = tokens_BS.to(model.device)
        hidden_BSD = model.hidden(tokens_BS).hidden_BSD[:, :-1]
        parts = zip(hidden_BSD.split(HEAD_TOKENS, 1), tokens_BS[:, 1:].split(HEAD_TOKENS, 1))
        nats = [F.cross_entropy(model.lm_head(h).float().mT, t, reduction="none") for h, t in parts]
        nats_S[1:] += torch.cat(nats, 1).double().sum(0).cpu().numpy()
    bins = pairwise(bounds(length))
    bits = [
        (nats_S[a:b].sum() / math.log(2), bytes_S[a:b].sum()) for a, b in pairwise(bounds(length))
    ]
    return [[a, b, found / size if size else None] for (a, b), (found, size) in zip(bins, bits)]


def measure(model, tokenizer, heldout, run, stage):
    """Both measurements after a stage with longer rows than the one before, as records for a log.

    heldout: {source: documents}; needles are hidden in prose and code, repeated if they are too short. run: RunConfig, whose
    `evaluation` says how many rows for each length and depth (`needles`; 0: nothing is measured), and how many
    `heldout_tokens` of each source.
    """
    rows = [(phase.name, phase.sequence_length) for phase in phases(run)]
    at, count = [name for name, _ in rows].index(stage), run.evaluation.needles
    before, length = rows[at - 1][1] if at else math.inf, rows[at][1]
    if not count or length <= before:
        return
    text = [document for source in ("prose", "code") for document in heldout.get(source, ())]
    if text:
        filler = np.resize(np.concatenate(text), max(2 * length, sum(map(len, text))))
        needles = written_needles(tokenizer, count, run.seed)
        for record in needle_test(
            model, filler, needles, sorted({before, max(before, length // 2), length})
        ):
            yield NeedleRecord(stage=stage, **record)
    for source in sorted(heldout):
        bits = bits_by_position(
            model, tokenizer, heldout[source], length, run.evaluation.heldout_tokens
        )
        if bits is not None:
            yield BitsByPositionRecord(stage=stage, source=source, length=length, bits=bits)
