"""Compare the answers to one prompt: advantages within a group, and groups that teach nothing (paper 3.2, 3.3).

For each prompt the policy answers G times. An answer is good when it beats its siblings, so no value network is needed:

    A_i   = (r_i - mean r) / (std r + 1e-6)               over the answers of one prompt

`minglm.rl.losses` weighs the tokens of an answer by its advantage.

Choices
- The standard deviation is the sample one (divided by G - 1). A group whose rewards are all equal carries no
  information and gets exactly zero; the division must not turn rounding into a signal.
- A sample whose episode failed for reasons of infrastructure says nothing about the policy: it leaves the statistics.
  So does one whose reward is no number: it is refused where the environment returns it (`rl.episode`).

The agentic objective is printed in the paper as the mean over a group of r_i - mean r, which is zero for any
policy: no probability appears in it. We read it as the advantage of the same policy gradient, without the
division: `advantages(..., normalize_std=False)`. Dr. GRPO (arXiv 2503.20783) leaves the division out too.

Paper: group-wise, no value network. Left open there and chosen here: deviation, epsilon.
"""

import torch
from torch import Tensor

EQUAL_WITHIN = 1e-6  # rewards no further apart than this are equal
EPSILON = 1e-6  # added to the standard deviation


def _all_valid(rewards_PG: Tensor, valid_PG: Tensor | None) -> Tensor:
    """Return the mask, or one that is True everywhere."""
    return torch.ones_like(rewards_PG, dtype=torch.bool) if valid_PG is None else valid_PG


def _check_finite(rewards_PG: Tensor, valid_PG: Tensor) -> None:
    """Raise ValueError for a valid reward that is NaN or infinite: one would silence or poison its whole group."""
    wrong_PG = valid_PG & ~rewards_PG.isfinite()
    if wrong_PG.any():
        p, g = wrong_PG.nonzero()[0].tolist()
        raise ValueError(
            f"the reward of sample {g} of prompt {p} is {float(rewards_PG[p, g])}: it must be finite, or the sample "
            "not valid"
        )


def informative_groups(rewards_PG: Tensor, valid_PG: Tensor | None = None) -> Tensor:
    """Return which groups are live, that is teach something: bool of axis P, True where two valid rewards differ.

    Args:
        rewards_PG: float, P prompts by G samples.
        valid_PG: bool, False for infrastructure failures; None: all valid.

    Rewards are compared by their spread, not by their mean: a group in which every reward is 0.5 carries as
    little signal as one in which every reward is 0. Raises ValueError for a valid reward that is not finite.
    """
    valid_PG = _all_valid(rewards_PG, valid_PG)
    _check_finite(rewards_PG, valid_PG)
    highest_P = rewards_PG.masked_fill(~valid_PG, -torch.inf).amax(1)
    lowest_P = rewards_PG.masked_fill(~valid_PG, torch.inf).amin(1)
    return highest_P - lowest_P > EQUAL_WITHIN


def advantages(
    rewards_PG: Tensor, normalize_std: bool = True, valid_PG: Tensor | None = None
) -> Tensor:
    """Return how much better than its siblings each sample is: float32 (P, G) that sums to zero in each group.

    Args:
        rewards_PG: float, P prompts by G samples.
        normalize_std: False is the agentic form of paper 3.3.
        valid_PG: bool; samples with False leave the statistics and get 0; None: all valid.

    Raises ValueError for a valid reward that is not finite.
    """
    valid_PG = _all_valid(rewards_PG, valid_PG)
    _check_finite(rewards_PG, valid_PG)
    rewards_PG = torch.where(valid_PG, rewards_PG.float(), 0.0)
    count_P1 = valid_PG.sum(1, keepdim=True)
    # r_i - mean r
    mean_P1 = rewards_PG.sum(1, keepdim=True) / count_P1.clamp(min=1)
    advantage_PG = torch.where(valid_PG, rewards_PG - mean_P1, 0.0)
    if normalize_std:
        # / (std r + epsilon)
        squares_P1 = advantage_PG.square().sum(1, keepdim=True)
        variance_P1 = squares_P1 / (count_P1 - 1).clamp(min=1)
        advantage_PG = advantage_PG / (variance_P1.sqrt() + EPSILON)
    # Exactly zero in a group of equal rewards, whatever the rounding of its mean.
    informative_P = informative_groups(rewards_PG, valid_PG)
    return torch.where(informative_P[:, None], advantage_PG, 0.0)
