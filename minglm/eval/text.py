"""Scores of a checkpoint: tasks by avg@k and pass@k with intervals, bits per byte, MTP acceptance (paper 4).

    avg@k = mean over problems of the mean over k answers;   pass@k = share of problems with a right answer among k
    bits per byte = sum over tokens of -log2 p / bytes of text;   acceptance = mean of sum_v min(p_v, q_v)

Problems are from the test split, which no training stage sees, and all different. The interval is over problems, not
answers, because the answers to one problem are not independent. Bits per byte does not depend on the tokenizer. The
acceptance is the probability that a token drafted by the MTP layer (q) survives the speculative test against the trunk
(p).
"""

import math

import torch

from minglm.data.packing import fill
from minglm.train.loss import AFTER_NEXT, NEXT_TOKEN, next_token_targets


def _rows(documents, length, limit):
    """Documents cut into rows of `length` tokens, at most `limit` tokens in all, each row one span."""
    spans = [d[at : at + length] for d in documents for at in range(0, len(d), length)]
    spans = [span for span in spans if len(span) > 2][: max(1, limit // length)]
    return fill([[(span, None)] for span in spans], length, separate=True) if spans else None


@torch.inference_mode()
def bits_per_byte(model, tokenizer, documents, length, limit):
    """Bits per byte of the text of `documents` (arrays of ids), in rows of `length` tokens, up to `limit` tokens."""
    batch = _rows(documents, length, limit)
    nats = count = 0
    for part in batch.split(max(1, 8192 // length)):
        part = part.to(model.device)
        log_p = model(part.tokens_BS, part.positions_BS, part.documents_BS).float().log_softmax(-1)
        target_BS, counts_BS = next_token_targets(
            part.tokens_BS, part.mask_BS, part.documents_BS, NEXT_TOKEN
        )
        nats -= log_p.gather(2, target_BS[..., None])[..., 0][counts_BS].sum().item()
        predicted = part.tokens_BS[part.mask_BS].tolist()
        count += len(tokenizer.bytes(predicted, skip_special=True))
    return nats / math.log(2) / max(1, count)


@torch.inference_mode()
def mtp_acceptance(model, documents, length, limit):
    """Mean over positions of sum_v min(p, q): trunk and MTP layer, each guessing the token two positions on."""
    batch = _rows(documents, length, limit)
    overlap = count = 0.0
    for part in batch.split(max(1, 8192 // length)):
        part = part.to(model.device)
        out = model.hidden(part.tokens_BS, part.positions_BS, part.documents_BS, mtp=True)
        p = model.lm_head(out.hidden_BSD[:, 1:]).float().softmax(-1)  # at t + 1, for token t + 2
        q = model.lm_head(out.mtp_hidden_BSD[:, :-1]).float().softmax(-1)
        _, counts_BS = next_token_targets(
            part.tokens_BS, part.mask_BS, part.documents_BS, AFTER_NEXT
        )
        counts = counts_BS[:, :-1]
        overlap += torch.minimum(p, q).sum(-1)[counts].sum().item()
        count += int(counts.sum())
    return overlap / max(1.0, count)
