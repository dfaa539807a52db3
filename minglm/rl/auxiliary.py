"""What an update of reinforcement learning may train beside the policy: the MTP layer, and the balance (paper 2.1, 2.4).

    loss = policy loss + mtp_loss_weight * CE(MTP layer, token s + 2) + sequence_loss_weight * balance

The MTP layer drafts what the policy samples, and RL moves the policy: a layer that is left alone drafts for a
model that is no more. Here it learns from the rollouts themselves.

    z = MTP layer( states of the trunk, embedding of the next token ),   both without gradient;   the head without gradient

So nothing of its loss reaches the trunk, the embedding or the head: the policy is trained by rewards alone,
as without it. The gradient of the layer has its own bound on its norm (`guarded_step`), or it would shrink
the policy's. A target counts if the policy sampled it: prompts and tool results are not what the layer will
be asked to draft.

The balance of the experts is left alone in RL by default. The sequence loss pulls the router towards
something that has no reward, and others saw worse rewards with it; the selection bias changes which experts a
token takes between rollout and training. Both can be switched on (`balance_loss`, `balance_bias`), with the
weight and the rate of pre-training.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minglm.config import BalanceConfig, RLConfig
from minglm.model.glm import GLM, Output
from minglm.model.mtp import shift
from minglm.rl.batch import SegmentBatch
from minglm.train.loss import AFTER_NEXT, next_token_targets


class AuxiliaryWeights(NamedTuple):
    """Weights of what is trained beside the policy; 0: it is not."""

    mtp: float
    balance: float
    bias_rate: float
    """Step of the selection bias, once per update."""


class AuxiliaryTerms(NamedTuple):
    """The terms of a micro-batch, each already divided by what was counted over the whole batch."""

    loss: Tensor
    """A scalar: the weighted sum, 0 where nothing is trained beside the policy."""
    mtp: float
    """Cross-entropy of the MTP layer, nats."""
    tokens_per_expert_LE: Tensor | None
    """float32: tokens routed to each expert by each router of the trunk; None where nobody asks."""


def auxiliary_weights(config: RLConfig, balance: BalanceConfig, model: GLM) -> AuxiliaryWeights:
    """Return the weights of a stage. A model whose MTP layer is to learn has one: the config was checked."""
    assert not config.mtp_loss_weight or model.mtp is not None, "no MTP layer to train"
    return AuxiliaryWeights(
        config.mtp_loss_weight,
        balance.sequence_loss_weight if config.balance_loss else 0.0,
        balance.bias_rate if config.balance_bias else 0.0,
    )


def count_mtp_targets(mask_BS: Tensor) -> int:
    """Count the positions whose token after next was sampled. mask bool (B, S), each row one text."""
    return int(shift(mask_BS, AFTER_NEXT, False).sum())


def mtp_loss(model: GLM, out: Output, batch: SegmentBatch, targets: int) -> Tensor:
    """Return the cross-entropy of the MTP layer on sampled tokens, with gradients in that layer alone: a scalar, nats.

    Args:
        model: has an MTP layer.
        out: the trunk's pass over the tokens.
        batch: the tokens.
        targets: the denominator, `count_mtp_targets` of the whole batch.
    """
    S = batch.computed
    next_BSD = model.embed(shift(batch.tokens_BS, 1, 0)[:, :S]).detach()
    positions_BS = batch.positions_BS
    if positions_BS is not None:
        positions_BS = positions_BS[:, :S]
    rotation = model.rotation(batch.tokens_BS[:, :S], positions_BS)
    trunk_BSD = out.hidden_BSD if batch.shared is None else batch.shared.unpack(out.hidden_BSD)
    states_BSD, _ = model.apply_layer(
        model.mtp, trunk_BSD.detach(), next_BSD, rotation, batch.documents_BS[:, :S]
    )
    wanted = next_token_targets(batch.tokens_BS, batch.mask_BS, batch.documents_BS, AFTER_NEXT)
    weights_T = wanted.counts_BS[:, :S].flatten().float() / max(1, targets)
    return model.lm_head.cross_entropy(
        states_BSD.flatten(0, 1), wanted.tokens_BS[:, :S].flatten(), weights_T, frozen=True
    )


def auxiliary_terms(
    model: GLM,
    out: Output,
    batch: SegmentBatch,
    weights: AuxiliaryWeights,
    targets: int,
    rows: int,
) -> AuxiliaryTerms:
    """Return what a micro-batch trains beside the policy.

    Args are those of `mtp_loss`, the weights, and the rows of the whole batch.
    """
    loss = torch.zeros((), device=batch.tokens_BS.device)
    cross_entropy = 0.0
    if weights.mtp:
        mtp = mtp_loss(model, out, batch, targets)
        cross_entropy = float(mtp.detach())
        loss = loss + weights.mtp * mtp
    if weights.balance and out.routing:
        # The mean over routers, and this micro-batch's share of the rows.
        balance = torch.stack([routing.balance_loss for routing in out.routing]).mean()
        loss = loss + weights.balance * balance * len(batch.tokens_BS) / rows
    load_LE = None
    if weights.bias_rate and out.routing:
        load_LE = torch.stack([routing.tokens_per_expert_E for routing in out.routing])
    return AuxiliaryTerms(loss, cross_entropy, load_LE)
