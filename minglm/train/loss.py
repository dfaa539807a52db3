"""The training loss: next-token targets, cross-entropy, MTP and balance terms (paper 2.1, 2.4)."""

from minglm.model.mtp import shift


def targets(tokens_BS, mask_BS, documents_BS, ahead):
    """What a position is to predict `ahead` tokens on, and whether it counts.

    Returns tokens int64 (B, S) and a bool mask (B, S): the target exists, is a training target, and lies in the same
    document as the position. ahead is 1 for the trunk, 2 for the MTP layer.
    """
    counts_BS = shift(mask_BS, ahead, False)
    if documents_BS is not None:
        counts_BS = counts_BS & (shift(documents_BS, ahead, -1) == documents_BS)
    return shift(tokens_BS, ahead, 0), counts_BS
