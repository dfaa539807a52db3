"""Reduce a loss per token to one number, by a mean whose denominator is named (paper 3.2, code RL).

    token      sum over all tokens / number of tokens          long answers weigh more: GLM-4.5's choice for code RL
    sequence   mean over samples of the mean over its tokens   every answer weighs the same: GRPO as first published
    prompt     mean over prompts of the mean over its tokens   every problem weighs the same, its long answers more
    constant   sum over all tokens / (samples * length)        no answer's length matters (Dr. GRPO, arXiv 2503.20783)

They differ in the weight of a token of a long answer. With `sequence` a wrong answer dilutes its penalty by
being long, and a right one gains by being short; the paper finds `token` faster and less biased towards
trivially short samples.

What matters is *whose* tokens are counted. A batch is cut into micro-batches and over ranks, and a mean per
micro-batch weighs micro-batches, not tokens. Here `denominator` counts once over the whole batch (sum it over
ranks) and every micro-batch divides by it, so the micro-batches add up to the whole batch. Rows without any
target (padding, infrastructure failures) are not counted, and a batch without targets gives exactly zero with
zero gradient, never NaN.

A sample is a whole trajectory, and one with several user turns is several rows (`rl.episode`). It has one vote all the
same: `owners_B` says which rows belong together when samples are counted, and `tokens_B` how many tokens the
whole trajectory of a row has, so its rows may lie in different micro-batches. For `prompt` both speak of
prompts.
"""

import torch
from torch import Tensor

from minglm.config.posttraining import Aggregation


def aggregation_mode(mode: str) -> Aggregation:
    """Return the member of `Aggregation` with this name. Raises ValueError for an unknown one."""
    try:
        return Aggregation(mode)
    except ValueError:
        names = ", ".join(Aggregation)
        raise ValueError(f"aggregation = {mode!r}: must be one of {names}") from None


def denominator(
    mask_BS: Tensor, mode: str, length: int | None = None, owners_B: Tensor | None = None
) -> Tensor:
    """Return what `aggregate` divides by: a scalar int64 tensor, counted over the whole batch.

    Args:
        mask_BS: bool, True on the tokens that the model produced.
        mode: one of `Aggregation`.
        length: only for `constant`: the bound on the tokens of one sample, equal at every step.
        owners_B: int64, rows with equal numbers are one trajectory, or for `prompt` one prompt; None: each row is one.

    The counts of two sets of owners add up to the count of their union, so ranks all-reduce it with a sum.
    Raises ValueError for an unknown mode or for `constant` without a length.
    """
    match aggregation_mode(mode):
        case Aggregation.TOKEN:
            return mask_BS.sum()
        case Aggregation.SEQUENCE | Aggregation.PROMPT:
            return _count_owners(mask_BS, owners_B)
        case Aggregation.CONSTANT:
            if not length:
                raise ValueError(
                    "aggregation = 'constant' needs a length: the bound on the tokens of one sample"
                )
            return _count_owners(mask_BS, owners_B) * length


def _count_owners(mask_BS: Tensor, owners_B: Tensor | None) -> Tensor:
    """Return the number of owners with a produced token: a scalar int64 tensor."""
    rows_B = mask_BS.any(1)
    if owners_B is None:
        return rows_B.sum()
    return torch.tensor(owners_B[rows_B].unique().numel(), device=mask_BS.device)


_count = denominator  # the argument of `aggregate` hides the name


def aggregate(
    loss_BS: Tensor,
    mask_BS: Tensor,
    mode: str,
    denominator: Tensor | int | None = None,
    tokens_B: Tensor | None = None,
) -> Tensor:
    """Return the sum of the masked losses of these rows, divided by the denominator of the whole batch.

    Args:
        loss_BS: float; values where the mask is False are never read, not even NaN.
        mask_BS: bool, True on the tokens that the model produced.
        mode: one of `Aggregation`.
        denominator: what the function `denominator` returned for the whole batch; None: these rows are the whole batch,
            each a trajectory.
        tokens_B: int64, produced tokens of the whole trajectory of each row (`sequence`), or of its whole prompt
            (`prompt`); None: those of the row.

    Returns a scalar float32 tensor. Over any split of the rows the results add up to the result without a
    split. Raises ValueError for an unknown mode, and for `constant` without a denominator.
    """
    if denominator is None:
        denominator = _count(mask_BS, mode)
    loss_BS = torch.where(mask_BS, loss_BS.float(), 0.0)  # not a product: NaN * 0 is NaN
    if aggregation_mode(mode) in (Aggregation.SEQUENCE, Aggregation.PROMPT):
        if tokens_B is None:
            tokens_B = mask_BS.sum(1)
        total = (loss_BS.sum(1) / tokens_B.clamp(min=1)).sum()
    else:
        total = loss_BS.sum()
    return total / torch.as_tensor(denominator, device=total.device).clamp(min=1)
