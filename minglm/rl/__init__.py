"""Reinforcement learning after GLM-4.5: pure functions for the mathematics, episodes around them (paper 3.2 to 3.5).

One step reads: `rollout` samples G answers to each of P prompts, an environment scores them,
`grpo.informative_groups` drops the groups that teach nothing, `grpo.advantages` compares the answers of a
group, `grpo.policy_loss` gives a loss per token and `aggregation` reduces it to one number. `trainer` makes
an update of it, `loop` decides when. `curriculum` and `temperature` decide what is asked and how freely it is
answered; `distill` turns good answers into training data for the next model.
"""
