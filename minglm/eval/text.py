"""Score a checkpoint on held-out text: bits per byte, and the acceptance of MTP drafts (paper 2.1, 4).

    bits per byte = sum over tokens of -log2 p / bytes of text
    acceptance    = mean over positions of sum_v min(p_v, q_v)

Bits per byte does not depend on the tokenizer. The acceptance is the probability that a token drafted by the MTP layer
(q) passes the speculative test against the trunk (p).
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from minglm.data.packing import Batch, fill
from minglm.data.tokenizer import Tokenizer
from minglm.model.glm import GLM
from minglm.train.loss import AFTER_NEXT, NEXT_TOKEN, next_token_targets

TOKENS_PER_PASS = 8192
"""Tokens of one forward pass."""

MIN_TOKENS = 3
"""A shorter span of text has no token after next."""


def _batches(
    model: GLM, documents: Sequence[np.ndarray], length: int, limit: int
) -> Iterator[Batch]:
    """Cut documents into rows of at most `length` tokens, one span a row, and yield them in batches on the device.

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
    for part in batch.split(max(1, TOKENS_PER_PASS // length)):
        yield part.to(model.device)


@torch.inference_mode()
def bits_per_byte(
    model: GLM,
    tokenizer: Tokenizer,
    documents: Sequence[np.ndarray],
    length: int,
    limit: int,
) -> float:
    """Return the bits per byte of documents, in rows of `length` tokens, up to `limit` tokens."""
    nats = 0.0
    text_bytes = 0
    for batch in _batches(model, documents, length, limit):
        logits_BSV = model(batch.tokens_BS, batch.positions_BS, batch.documents_BS)
        log_p_BSV = logits_BSV.float().log_softmax(-1)
        targets = next_token_targets(batch.tokens_BS, batch.mask_BS, batch.documents_BS, NEXT_TOKEN)
        log_p_BS = log_p_BSV.gather(2, targets.tokens_BS[..., None])[..., 0]
        nats -= log_p_BS[targets.counts_BS].sum().item()
        predicted = batch.tokens_BS[batch.mask_BS]
        text_bytes += len(tokenizer.bytes(predicted, skip_special=True))
    return nats / math.log(2) / max(1, text_bytes)


@torch.inference_mode()
def mtp_acceptance(model: GLM, documents: Sequence[np.ndarray], length: int, limit: int) -> float:
    """Return the mean over positions of sum_v min(p, q): both guess the token two positions on."""
    overlap = 0.0
    count = 0
    for batch in _batches(model, documents, length, limit):
        out = model.hidden(batch.tokens_BS, batch.positions_BS, batch.documents_BS, mtp=True)
        assert out.mtp_hidden_BSD is not None
        # For token t + 2: the trunk at position t + 1, the MTP layer at position t.
        p_BSV = model.lm_head(out.hidden_BSD[:, 1:]).float().softmax(-1)
        q_BSV = model.lm_head(out.mtp_hidden_BSD[:, :-1]).float().softmax(-1)
        targets = next_token_targets(batch.tokens_BS, batch.mask_BS, batch.documents_BS, AFTER_NEXT)
        counts_BS = targets.counts_BS[:, :-1]
        overlap_BS = torch.minimum(p_BSV, q_BSV).sum(-1)
        overlap += overlap_BS[counts_BS].sum().item()
        count += int(counts_BS.sum())
    return overlap / max(1, count)
