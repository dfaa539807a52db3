"""One number from a loss per token: the mean whose denominator is named (paper 3.2, code RL).

    token      sum over all tokens / number of tokens          long answers weigh more: GLM-4.5's choice for code RL
    sequence   mean over samples of the mean over its tokens   every answer weighs the same: GRPO as first published
    constant   sum over all tokens / (samples * length)        no answer's length matters (Dr. GRPO, arXiv 2503.20783)

The three differ in what a token of a long answer is worth. With `sequence` a wrong answer dilutes its penalty by being
long, a right one gains by being short; the paper finds `token` faster and less biased towards trivially short samples.

The choice that matters is *whose* tokens are counted. A batch is cut into micro-batches and over ranks, and a mean per
piece weighs pieces, not tokens. Here `denominator` counts once over the whole batch (sum it over ranks) and every piece
divides by it, so the pieces add up to the whole batch. Rows without any target (padding, infrastructure failures) count
nowhere, and a batch without targets gives exactly zero with zero gradient, never NaN.

Simplified: a row holds one sample, so a piece never cuts through a sample.
"""

import torch

MODES = ("token", "sequence", "constant")


def denominator(mask_BS, mode, length=None):
    """What `aggregate` divides by: a scalar int64 tensor counted over the whole batch.

    mask_BS: bool, True on the tokens the model produced. mode: one of MODES.
    length: only for `constant`: the bound on produced tokens of a sample, the same at every step.
    Counts of two sets of rows add up to the count of their union, so ranks all-reduce it with a sum.
    Raises ValueError for an unknown mode or for `constant` without a length.
    """
    if mode == "token":
        return mask_BS.sum()
    if mode == "sequence":
        return mask_BS.any(1).sum()
    if mode == "constant":
        if not length:
            raise ValueError(
                "aggregation = 'constant' needs a length: the bound on the tokens of one sample"
            )
        return mask_BS.any(1).sum() * length
    raise ValueError(f"aggregation = {mode!r}: must be one of {', '.join(MODES)}")


_count = denominator  # the argument of `aggregate` hides the name


def aggregate(loss_BS, mask_BS, mode, denominator=None):
    """Sum of the masked losses of these rows, divided by the denominator of the whole batch.

    loss_BS: float; values where the mask is False are never read, not even NaN. mask_BS: bool.
    denominator: number or scalar tensor from `denominator` of the whole batch; None: these rows are the whole batch.
    Returns a scalar float32 tensor; over any split of the rows the results add up to the unsplit result.
    Raises ValueError for an unknown mode, and for `constant` without a denominator.
    """
    if denominator is None:
        denominator = _count(mask_BS, mode)
    loss_BS = torch.where(mask_BS, loss_BS.float(), 0.0)  # not a product: NaN * 0 is NaN
    if mode == "sequence":
        total = (loss_BS.sum(1) / mask_BS.sum(1).clamp(min=1)).sum()
    elif mode in MODES:
        total = loss_BS.sum()
    else:
        raise ValueError(f"aggregation = {mode!r}: must be one of {', '.join(MODES)}")
    return total / torch.as_tensor(denominator, device=total.device).clamp(min=1)
