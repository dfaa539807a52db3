"""Reinforcement learning after GLM-4.5 (paper 3.2 to 3.5): pure functions for the mathematics, rollouts around them.

One step reads: `rollout` samples G answers to each of P prompts, an environment scores them, `grpo.live_groups` drops
the groups that teach nothing, `grpo.advantages` compares the answers of a group, `grpo.policy_loss` gives a loss per
token and `aggregation` makes one number of it. `curriculum` and `temperature` decide what is asked and how freely it is
answered; `pathology` finds faults of form; `distill` turns good answers into training data for the next model.
"""
