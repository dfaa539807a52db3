"""Shape a reward: take a penalty off for faults of form (paper 3.4, pathology RL).

    shaped = score - fault_penalty * [the turn has a fault, or disobeys the thinking switch]

Choices: the penalty is one amount, however many faults there are. It applies to the samples of every
environment, and only to what RL learns from; evaluation reports the unshaped score.
"""

from collections.abc import Mapping


def shaped_reward(
    value: float, flags: Mapping[str, bool], switch_obeyed: bool, fault_penalty: float
) -> float:
    """Return a score less the penalty if it applies.

    Args:
        value: the environment's score, 0 to 1.
        flags: {fault: whether it was detected} of the last turn.
        switch_obeyed: whether every turn reasoned exactly when thinking was on.
        fault_penalty: the amount.
    """
    faulty = any(flags.values()) or not switch_obeyed
    return value - fault_penalty if faulty else value
