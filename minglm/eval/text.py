"""Score a checkpoint on held-out text: bits per byte, and the acceptance of MTP drafts (paper 2.1, 4).

    bits per byte = sum over tokens of -log2 p / bytes of text
    acceptance    = mean over positions of sum_v min(p_v, q_v)

Bits per byte does not depend on the tokenizer. The acceptance is the probability that a token drafted by the
MTP layer (q) passes the speculative test against the trunk (p).

Ranks divide the batches; their sums are added in the order of one process, so the result has its bits.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange

from minglm.common.ranks import Ranks
from minglm.data.packing import Batch, TokensAndMask, fill
from minglm.data.tokenizer import Tokenizer
from minglm.model.glm import GLM
from minglm.train.loss import AFTER_NEXT, NEXT_TOKEN, next_token_targets

TOKENS_PER_PASS = 8192
"""Tokens of one forward pass."""

ROWS_PER_PASS = 32
"""Answers of one forward pass."""

GUESSES = 1024
"""Positions whose distributions exist at the same time."""

MIN_TOKENS = 3
"""A shorter span of text has no token after next."""


def _batches(documents: Sequence[np.ndarray], length: int, limit: int) -> list[Batch]:
    """Cut documents into rows of at most `length` tokens, one span a row, and return them in batches.

    limit: the number of rows is limit / length. Raises ValueError if every document is shorter than MIN_TOKENS.
    """
    spans = []
    for document in documents:
        for start in range(0, len(document), length):
            span = document[start : start + length]
            if len(span) >= MIN_TOKENS:
                spans.append(span)
    if not spans:
        raise ValueError(f"no held-out document has {MIN_TOKENS} tokens: there is nothing to score")
    rows = [[(span, None)] for span in spans[: max(1, limit // length)]]
    batch = fill(rows, length, separate=True)
    return batch.split(max(1, TOKENS_PER_PASS // length))


def bits_per_byte(
    model: GLM,
    tokenizer: Tokenizer,
    documents: Sequence[np.ndarray],
    length: int,
    limit: int,
    ranks: Ranks | None = None,
) -> float:
    """Return the bits per byte of documents, in rows of `length` tokens, up to `limit` tokens.

    ranks: divide the rows, each with the whole model, or in step where they share one
    (`minglm.parallel.reading`); None: one process reads them all.
    """

    @torch.no_grad()
    def measure(part: Batch) -> tuple[float, int]:
        """Return nats and bytes of a batch."""
        batch = part.to(model.device)
        out = model.hidden(batch.tokens_BS, batch.positions_BS, batch.documents_BS)
        targets = next_token_targets(batch.tokens_BS, batch.mask_BS, batch.documents_BS, NEXT_TOKEN)
        log_p_T, _ = model.lm_head.token_log_probabilities(
            rearrange(out.hidden_BSD, "b s d -> (b s) d"), targets.tokens_BS.flatten()
        )
        nats = -log_p_T[targets.counts_BS.flatten()].sum().item()
        predicted = batch.tokens_BS[batch.mask_BS]
        return nats, len(tokenizer.bytes(predicted, skip_special=True))

    measured = (ranks or Ranks()).divide(measure, _batches(documents, length, limit))
    nats = sum(nats for nats, _ in measured)
    text_bytes = sum(size for _, size in measured)
    return nats / math.log(2) / max(1, text_bytes)


def mtp_acceptance(
    model: GLM,
    documents: Sequence[np.ndarray],
    length: int,
    limit: int,
    ranks: Ranks | None = None,
) -> float:
    """Return the acceptance on documents, in rows of `length` tokens, up to `limit` tokens.

    ranks: as in `bits_per_byte`.
    """
    return _acceptance(model, _batches(documents, length, limit), ranks)


def mtp_acceptance_on_answers(
    model: GLM, answers: Sequence[TokensAndMask], limit: int, ranks: Ranks | None = None
) -> float | None:
    """Return the acceptance on the tokens that the model sampled itself, None without any.

    answers: (token ids, whether each was sampled) of whole texts, prompts included; of these the first ones
    with together at most `limit` tokens, and at least one. ranks: as in `bits_per_byte`.
    """
    rows: list[list[TokensAndMask]] = []
    tokens = 0
    for answer in answers:
        tokens += len(answer[0])
        if rows and tokens > limit:
            break
        rows.append([answer])
    rows.sort(key=lambda row: len(row[0][0]))
    batches: list[Batch] = []
    for start in range(0, len(rows), ROWS_PER_PASS):
        part = rows[start : start + ROWS_PER_PASS]
        batches.append(fill(part, len(part[-1][0][0]), separate=True))
    return _acceptance(model, batches, ranks) if batches else None


def _acceptance(model: GLM, batches: Sequence[Batch], ranks: Ranks | None) -> float:
    """Return the mean over positions of sum_v min(p, q): both guess the token two positions on."""

    @torch.no_grad()
    def measure(part: Batch) -> tuple[float, int]:
        """Return the sum over the positions of a batch, and their number."""
        batch = part.to(model.device)
        out = model.hidden(batch.tokens_BS, batch.positions_BS, batch.documents_BS, mtp=True)
        assert out.mtp_hidden_BSD is not None
        targets = next_token_targets(batch.tokens_BS, batch.mask_BS, batch.documents_BS, AFTER_NEXT)
        counts_BS = targets.counts_BS[:, :-1]
        # For token t + 2: the trunk at position t + 1, the MTP layer at position t.
        trunk_TD = out.hidden_BSD[:, 1:][counts_BS]
        mtp_TD = out.mtp_hidden_BSD[:, :-1][counts_BS]
        total = 0.0
        chunks = zip(trunk_TD.split(GUESSES), mtp_TD.split(GUESSES), strict=True)
        for p_states_TD, q_states_TD in chunks:
            p_TV = model.lm_head(p_states_TD).float().softmax(-1)
            q_TV = model.lm_head(q_states_TD).float().softmax(-1)
            total += torch.minimum(p_TV, q_TV).sum().item()
        return total, len(trunk_TD)

    measured = (ranks or Ranks()).divide(measure, batches)
    count = sum(count for _, count in measured)
    return sum(overlap for overlap, _ in measured) / max(1, count)
