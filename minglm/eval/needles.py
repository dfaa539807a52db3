"""Measure whether a longer context is used: needle test, and bits per byte by position (paper 2.3, Figure 3).

    row      filler ... "The key of Ada is 4071." ... filler "The key of Ada is" -> " 4071"?
    found    share of rows in which every token of the answer is the most probable one: what greedy decoding would say
    nats     -log p of the answer per token, mean over rows: falls before anything is found
    bits     sum of -log2 p over the tokens at some positions / bytes of these tokens

A row has exactly `length` tokens; depth 0 puts the needle at its beginning, 1 right before the question. All
depths of a length see the same fillers, names and keys. By position, only documents that fill a whole row
count, so that all positions are measured on the same text; the first tokens of a row cost more bits because
they have no context.

Ranks divide the passes, as in `minglm.eval.text`, and add up in the order of one process.

Simplified: one needle a row, no distractors. The paper names its lengths but no test of them; this is the public one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minglm.common.ranks import Ranks
from minglm.config.run import RunConfig
from minglm.data.tokenizer import Tokenizer
from minglm.model.glm import GLM
from minglm.report.records import BitsByPositionRecord, NeedleRecord
from minglm.train.stages import phases

NAMES = ("Ada", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "Jana", "Karl", "Lea")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TOKENS_PER_PASS = 8192
"""Tokens of one forward pass."""

POSITIONS_PER_HEAD = 2048
"""Positions of a row whose logits exist at the same time."""

FILLER_SOURCES = ("prose", "code")
FIRST_BIN = 64


@dataclass(frozen=True)
class Needle:
    """A statement hidden in a row, the question at its end, and the right answer."""

    statement: list[int]
    question: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.statement) + len(self.question) + len(self.answer)


class NeedleResult(NamedTuple):
    """The needle test at one length and depth."""

    length: int
    depth: float
    found: float
    """Share of rows whose answer is what greedy decoding would say."""
    nats: float
    """Mean over rows of -log p of the answer per token."""


class AnswerScore(NamedTuple):
    """How a model answers one question."""

    is_right: float
    """1 if every token of the answer is the most probable one, else 0."""
    nats: float
    """-log p of the answer per token."""


class PositionBin(NamedTuple):
    """Bits per byte of the positions `start` to `stop` of a row."""

    start: int
    stop: int
    bits: float | None
    """None for a bin without text."""


def written_needles(tokenizer: Tokenizer, count: int, seed: int = 0) -> list[Needle]:
    """Write needles in words: a name, and a key of four digits that is different in each."""
    rng = np.random.default_rng([seed, 5])
    needles = []
    for key in rng.permutation(9000)[:count] + 1000:
        question = tokenizer.encode(f"\nThe key of {rng.choice(NAMES)} is")
        answer = tokenizer.encode(f" {key}")
        statement = [*question, *answer, *tokenizer.encode(".\n")]
        needles.append(Needle(statement, question, answer))
    return needles


def hide(filler: np.ndarray, needle: Needle, length: int, depth: float) -> np.ndarray:
    """Return a row of `length` ids: the needle hidden in the filler, then its question and answer.

    Args:
        filler: ids; its first ones are used.
        depth: 0 (the beginning) to 1 (right before the question).

    Raises:
        ValueError: if the needle does not fit, or the filler is too short.
    """
    room = length - len(needle)
    if room < 0:
        raise ValueError(f"a needle of {len(needle)} tokens does not fit into a row of {length}")
    if len(filler) < room:
        raise ValueError(
            f"a row of {length} tokens needs {room} tokens of filler, got {len(filler)}"
        )
    cut = round(depth * room)
    return np.concatenate(
        [filler[:cut], needle.statement, filler[cut:room], needle.question, needle.answer]
    )


def needle_test(
    model: GLM,
    filler: np.ndarray,
    needles: Sequence[Needle],
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    ranks: Ranks | None = None,
) -> list[NeedleResult]:
    """Measure how often, and how surely, a model answers with what was hidden in its context.

    Args:
        filler: integer array (ids,), at least as long as the longest row.
        needles: one for each row.
        ranks: divide the rows; None: one process reads them all.

    Returns the results in the order of lengths, then depths. Raises ValueError as `hide` does.
    """
    sizes = [len(needle.answer) for needle in needles]
    results = []
    for length in lengths:
        # Each row has other filler.
        starts = np.linspace(0, max(0, len(filler) - length), len(needles)).astype(int)
        fillers = [filler[start : start + length] for start in starts]
        for depth in depths:
            rows = [
                hide(row_filler, needle, length, depth)
                for row_filler, needle in zip(fillers, needles, strict=True)
            ]
            scores = answer_scores(model, rows, sizes, ranks)
            found = sum(score.is_right for score in scores) / len(scores)
            nats = sum(score.nats for score in scores) / len(scores)
            results.append(NeedleResult(length, depth, found, nats))
    return results


def answer_scores(
    model: GLM,
    rows: Sequence[np.ndarray],
    sizes: Sequence[int],
    ranks: Ranks | None = None,
) -> list[AnswerScore]:
    """Score the answer at the end of each row.

    Args:
        rows: ids, all of the same length.
        sizes: the number of tokens of each row's answer.
        ranks: as in `needle_test`.
    """
    longest = max(sizes)
    rows_per_pass = max(1, TOKENS_PER_PASS // len(rows[0]))

    @torch.no_grad()
    def score(start: int) -> list[AnswerScore]:
        """Score the rows of the pass that begins with this one."""
        batch = np.stack(rows[start : start + rows_per_pass])
        batch_sizes = sizes[start : start + rows_per_pass]
        tokens_BS = torch.tensor(batch, dtype=torch.int64, device=model.device)
        # The hidden state of a position predicts the token after it.
        hidden_BSD = model.hidden(tokens_BS).hidden_BSD[:, -longest - 1 : -1]
        log_p_BSV = model.lm_head(hidden_BSD).float().log_softmax(-1)
        answer_BS = tokens_BS[:, -longest:]
        right_BS = log_p_BSV.argmax(-1) == answer_BS
        log_p_BS = log_p_BSV.gather(2, answer_BS[..., None])[..., 0]
        scores = []
        for right_S, log_p_S, size in zip(right_BS, log_p_BS, batch_sizes, strict=True):
            is_right = float(right_S[-size:].all())
            nats = -log_p_S[-size:].mean().item()
            scores.append(AnswerScore(is_right, nats))
        return scores

    passes = (ranks or Ranks()).divide(score, range(0, len(rows), rows_per_pass))
    return [score for scores in passes for score in scores]


def bin_edges(length: int, first: int = FIRST_BIN) -> list[int]:
    """Return the edges of the bins of positions: 0, first, 2 first, 4 first, ... and `length`."""
    edges = [0]
    edge = first
    while edge < length:
        edges.append(edge)
        edge *= 2
    edges.append(length)
    return edges


def bits_by_position(
    model: GLM,
    tokenizer: Tokenizer,
    documents: Sequence[np.ndarray],
    length: int,
    limit: int,
    ranks: Ranks | None = None,
) -> list[PositionBin] | None:
    """Measure the bits per byte of text by its position in a row of `length` tokens, over at most `limit` tokens.

    ranks: divide the rows; None: one process reads them all.

    Returns one result for each bin of `bin_edges`, or None if no document fills a row. Shorter documents are left out.
    """
    spans = []
    for document in documents:
        for start in range(0, len(document) - length + 1, length):
            spans.append(document[start : start + length])
    spans = spans[: max(1, limit // length)]
    if not spans:
        return None
    rows_BS = np.stack(spans).astype(np.int64)

    # The first token of a row is not predicted, so it has neither nats nor bytes.
    bytes_S = np.zeros(length)
    bytes_S[1:] = _token_bytes(tokenizer, rows_BS)[:, 1:].sum(0)

    @torch.no_grad()
    def measure(tokens_BS: Tensor) -> np.ndarray:
        """Return the nats of a pass at each position but the first."""
        nats_BS = _next_token_nats(model, tokens_BS.to(model.device))
        return nats_BS.double().sum(0).cpu().numpy()

    passes = torch.from_numpy(rows_BS).split(max(1, TOKENS_PER_PASS // length))
    nats_S = np.zeros(length)
    for nats in (ranks or Ranks()).divide(measure, passes):
        nats_S[1:] += nats

    bins = []
    for start, stop in pairwise(bin_edges(length)):
        bits = nats_S[start:stop].sum() / math.log(2)
        size = bytes_S[start:stop].sum()
        bins.append(PositionBin(start, stop, bits / size if size else None))
    return bins


def _token_bytes(tokenizer: Tokenizer, tokens_BS: np.ndarray) -> np.ndarray:
    """Return the number of bytes of each token, zero for special tokens: int64 (B, S)."""
    ids, index_of_token = np.unique(tokens_BS, return_inverse=True)
    sizes = np.array([len(tokenizer.bytes([int(token)], skip_special=True)) for token in ids])
    return sizes[index_of_token.reshape(tokens_BS.shape)]


def _next_token_nats(model: GLM, tokens_BS: Tensor) -> Tensor:
    """Return -log p of every token but the first of each row: float32 (B, S - 1)."""
    hidden_BSD = model.hidden(tokens_BS).hidden_BSD[:, :-1]
    hidden_chunks = hidden_BSD.split(POSITIONS_PER_HEAD, dim=1)
    target_chunks = tokens_BS[:, 1:].split(POSITIONS_PER_HEAD, dim=1)
    nats = []
    for chunk_BSD, targets_BS in zip(hidden_chunks, target_chunks, strict=True):
        logits_BSV = model.lm_head(chunk_BSD).float()
        nats.append(F.cross_entropy(logits_BSV.mT, targets_BS, reduction="none"))
    return torch.cat(nats, dim=1)


def measure(
    model: GLM,
    tokenizer: Tokenizer,
    heldout: Mapping[str, Sequence[np.ndarray]],
    run: RunConfig,
    stage: str,
    ranks: Ranks | None = None,
) -> Iterator[NeedleRecord | BitsByPositionRecord]:
    """Yield both measurements after a stage with longer rows than the one before, as records for a log.

    Needles are hidden in prose and code, which are repeated if they are too short.

    Args:
        heldout: {source: documents}.
        run: its `evaluation` says how many rows each length and depth has (`needles`; 0: nothing is measured), and how
            many `heldout_tokens` of each source are read.
        ranks: as in `needle_test`.
    """
    count = run.evaluation.needles
    lengths = {phase.name: phase.sequence_length for phase in phases(run)}
    length = lengths[stage]
    position = list(lengths).index(stage)
    if position == 0 or not count:
        return
    before = list(lengths.values())[position - 1]
    if length <= before:
        return

    text = [document for source in FILLER_SOURCES for document in heldout.get(source, ())]
    if text:
        tokens = np.concatenate(text)
        filler = np.resize(tokens, max(2 * length, len(tokens)))
        needles = written_needles(tokenizer, count, run.seed)
        tested = sorted({before, max(before, length // 2), length})
        for result in needle_test(model, filler, needles, tested, ranks=ranks):
            yield NeedleRecord(stage=stage, **result._asdict())
    for source in sorted(heldout):
        documents = heldout[source]
        limit = run.evaluation.heldout_tokens
        bins = bits_by_position(model, tokenizer, documents, length, limit, ranks)
        if bins is not None:
            bits: list[list[float | None]] = [[b.start, b.stop, b.bits] for b in bins]
            yield BitsByPositionRecord(stage=stage, source=source, length=length, bits=bits)
