"""Compute the training loss of a batch: next token, token after next, and expert balance (paper 2.1, 2.4).

    loss = CE(trunk, token s + 1) + mtp_weight * CE(MTP layer, token s + 2) + balance_weight * balance

    CE       = sum over positions that count of -log p(target) / N,   N = such positions of the whole batch
    balance  = mean over routers of the sequence-wise balance loss, averaged over the rows of the whole batch

N and the number of rows are counted once, over the whole batch (`count_targets`), before it is cut into
micro-batches. The losses of the micro-batches then add up to the loss of the batch, whatever the cut, and so
do their gradients. A batch without any target has loss exactly zero.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minglm.data.packing import Batch
from minglm.model.glm import GLM
from minglm.model.mtp import shift

NEXT_TOKEN = 1  # offset of the trunk's target
AFTER_NEXT = 2  # offset of the MTP layer's target


class Targets(NamedTuple):
    """What each position is to predict."""

    tokens_BS: Tensor
    """int64: the token at the offset; 0 beyond the end of the row."""
    counts_BS: Tensor
    """bool: whether the target exists, is trained on, and lies in the position's own document."""


class TargetCounts(NamedTuple):
    """The denominators of a whole batch, by which the terms of its micro-batches are divided."""

    next_token: int
    """Positions whose next token counts."""
    after_next: int
    """Positions whose token after next counts; 0 when the MTP layer is not trained."""
    rows: int
    """Rows of the batch."""


class LossWeights(NamedTuple):
    """The weight of each term of the loss; that of the next token is 1."""

    mtp: float
    """Weight of the MTP layer's cross-entropy; 0 leaves the layer out of the forward pass."""
    balance: float
    """Weight alpha of the sequence-wise balance loss."""


class LossTerms(NamedTuple):
    """The loss of a micro-batch and its terms, each a scalar that is already divided by the counts of the batch."""

    loss: Tensor
    """The weighted sum, on which `backward()` is called."""
    cross_entropy: Tensor
    """Of the next token, nats."""
    mtp: Tensor | None
    """Cross-entropy of the token after next, nats; None when the MTP layer is not trained."""
    balance: Tensor
    """The balance loss without its weight; 0 when no router was used."""
    tokens_per_expert_LE: Tensor | None
    """float32: tokens routed to each expert by each router that was used, the MTP layer's last; None without any."""


def next_token_targets(
    tokens_BS: Tensor, mask_BS: Tensor, documents_BS: Tensor | None, offset: int = NEXT_TOKEN
) -> Targets:
    """Return the token `offset` positions later for each position, and whether it counts as a target.

    tokens_BS: int64. mask_BS: bool, True for tokens that may be targets. documents_BS: int32 document ids, or
    None when each row is one document. offset: 1 for the trunk, 2 for the MTP layer.
    """
    counts_BS = shift(mask_BS, offset, False)
    if documents_BS is not None:
        same_document_BS = shift(documents_BS, offset, -1) == documents_BS
        counts_BS = counts_BS & same_document_BS
    return Targets(shift(tokens_BS, offset, 0), counts_BS)


def batch_targets(batch: Batch, offset: int) -> Targets:
    """Return what each position that the model computes is to predict: the token `offset` positions later."""
    targets = next_token_targets(batch.tokens_BS, batch.mask_BS, batch.documents_BS, offset)
    length = batch.tokens_BS.shape[1] - batch.ahead
    return Targets(targets.tokens_BS[:, :length], targets.counts_BS[:, :length])


def trains_mtp(model: GLM, mtp_weight: float) -> bool:
    """Return whether the MTP layer takes part: the model has one, and its loss has a weight."""
    return model.mtp is not None and bool(mtp_weight)


def count_targets(model: GLM, batch: Batch, weights: LossWeights) -> TargetCounts:
    """Count the targets and rows of a whole batch, before it is cut into micro-batches."""

    def count(offset: int) -> int:
        return int(batch_targets(batch, offset).counts_BS.sum())

    return TargetCounts(
        next_token=count(NEXT_TOKEN),
        after_next=count(AFTER_NEXT) if trains_mtp(model, weights.mtp) else 0,
        rows=len(batch.tokens_BS),
    )


def cross_entropy_term(
    model: GLM, hidden_BSD: Tensor, batch: Batch, offset: int, count: int
) -> Tensor:
    """Return the summed cross-entropy of the tokens at `offset`, divided by `count`: a float32 scalar."""
    targets = batch_targets(batch, offset)
    weights_T = targets.counts_BS.flatten().float() / max(1, count)
    return model.lm_head.cross_entropy(
        hidden_BSD.flatten(0, 1), targets.tokens_BS.flatten(), weights_T
    )


def training_loss(
    model: GLM, batch: Batch, counts: TargetCounts, weights: LossWeights
) -> LossTerms:
    """Compute the loss of a micro-batch of the batch that `counts` were counted over.

    batch: rows on the model's device; any subset of the rows of the counted batch. The terms of all subsets
    add up to those of the batch.
    """
    with_mtp = trains_mtp(model, weights.mtp)
    inputs = batch.inputs()
    out = model.hidden(
        inputs.tokens_BS,
        inputs.positions_BS,
        inputs.documents_BS,
        mtp=with_mtp,
        next_BS=batch_targets(batch, NEXT_TOKEN).tokens_BS,
    )

    # balance: mean over routers, then this micro-batch's share of the rows
    balance = torch.zeros((), device=batch.tokens_BS.device)
    for routing in out.routing:
        balance = balance + routing.balance_loss
    balance = balance / max(1, len(out.routing))
    balance = balance * len(batch.tokens_BS) / counts.rows
    loss = weights.balance * balance

    # CE(trunk, token s + 1)
    cross_entropy = cross_entropy_term(model, out.hidden_BSD, batch, NEXT_TOKEN, counts.next_token)
    loss = loss + cross_entropy

    # mtp_weight * CE(MTP layer, token s + 2)
    mtp = None
    if with_mtp:
        assert out.mtp_hidden_BSD is not None
        mtp = cross_entropy_term(model, out.mtp_hidden_BSD, batch, AFTER_NEXT, counts.after_next)
        loss = loss + weights.mtp * mtp

    tokens_LE = (
        torch.stack([routing.tokens_per_expert_E for routing in out.routing])
        if out.routing
        else None
    )
    return LossTerms(loss, cross_entropy, mtp, balance, tokens_LE)
