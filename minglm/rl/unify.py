"""Make one model of several experts without their answers: on-policy distillation, and the mean of their weights.

    on-policy    y ~ student(x)        loss_t = -sg[log expert_x(y_t) - log student(y_t)] log student(y_t)
    average      weights = sum_k weights_k / K

On-policy distillation (MOPD, arXiv 2606.30406) lets the student answer, and the expert of each prompt says of
every token how likely it is. The loss is a policy gradient whose reward is that difference of
log-probabilities; its expectation is the gradient of the reverse KL divergence at the drawn tokens. So the
student is corrected where it goes itself, and at every token, while rejection sampling (`minglm.rl.distill`,
paper 3.1) shows it whole answers of others. No reward is asked for.

The mean of the weights costs no token. It presumes that the experts began with the same weights, and did not move far.

Choices: each rollout serves one update, so the student of the loss is the one that drew the tokens, and no
ratio is needed. The log-probabilities of both are the trainer's, at temperature 1, so that equal weights give
no reward but for rounding. The loss is the mean over the tokens that the student drew; prompts and results of
tools count nothing.

Workers divide the answers to the prompts of one expert after another, so that ranks meet in the passes of the same one.

Simplified: the drawn token alone is scored, not the whole vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minglm.config import Aggregation
from minglm.model.glm import GLM
from minglm.parallel import Replicas, Workers
from minglm.rl.batch import Row, Sample, collate, rows_of, sampled_log_probabilities
from minglm.rl.episode import Trajectory
from minglm.rl.trainer import WARMUP_STEPS, divide
from minglm.train.guard import Guard, guarded_step


class Distilled(NamedTuple):
    """What an update of on-policy distillation saw."""

    reverse_kl: float
    """Mean of log student - log expert over the drawn tokens, nats: an estimate of the divergence."""
    tokens: int
    """Tokens that the student drew."""
    segment_tokens: int
    """The same with the prompts, as a stage of RL counts them."""
    grad_norm: float


def distillation_loss(
    logprobs_BS: Tensor, expert_logprobs_BS: Tensor, mask_BS: Tensor, tokens: int
) -> Tensor:
    """Return the loss of some rows, a scalar.

    Args:
        logprobs_BS: float, log-probabilities of the drawn tokens under the student, with gradient, nats.
        expert_logprobs_BS: float, those under the expert of each row's prompt.
        mask_BS: bool, True on the drawn tokens; nothing else is read.
        tokens: drawn tokens of the whole batch, which the sum is divided by.
    """
    reward_BS = (expert_logprobs_BS - logprobs_BS).detach()
    loss_BS = -reward_BS * logprobs_BS
    return torch.where(mask_BS, loss_BS, 0.0).sum() / tokens


class Distiller:
    """The student, its optimizer, and the experts that judge its answers.

    experts: by the environment of the prompts that each judges; one expert may judge several. peak_lr:
    learning rate after five steps of warm-up. clip_norm: bound on the gradient norm. pad: id of the padding
    token. workers: threads or ranks that share the answers of an update; None: the student alone.
    """

    def __init__(
        self,
        student: GLM,
        optimizer: torch.optim.Optimizer,
        experts: Mapping[str, GLM],
        peak_lr: float,
        clip_norm: float,
        pad: int,
        workers: Workers | None = None,
    ) -> None:
        self.student = student
        self.optimizer = optimizer
        self.experts = experts
        self.peak_lr = peak_lr
        self.clip_norm = clip_norm
        self.pad = pad
        self.workers = workers or Replicas(student)
        self.guard = Guard()

    def learn(self, trajectories: Iterable[Trajectory], step: int) -> Distilled:
        """Take one optimizer step on the student's own answers. step: number of the step from 0, for the warm-up."""
        by_environment: dict[str, list[Sample]] = {}
        for trajectory in trajectories:
            if trajectory.length:
                group = by_environment.setdefault(trajectory.task.environment, [])
                group.append(Sample(trajectory.segments, 0.0))
        rows = {
            name: rows_of(samples, Aggregation.TOKEN) for name, samples in by_environment.items()
        }
        segments = [row.segment for group in rows.values() for row in group]
        tokens = sum(sum(segment.mask) for segment in segments)
        assert tokens, "a rollout whose environments all failed teaches nothing"

        divergence = 0.0
        for name, group in rows.items():
            divergence += self._accumulate(self.experts[name], group, tokens)
        rate = self.peak_lr * min(1.0, (step + 1) / WARMUP_STEPS)
        found = guarded_step(self.student, self.optimizer, rate, self.clip_norm, self.guard)
        segment_tokens = sum(len(segment.tokens) for segment in segments)
        return Distilled(divergence / tokens, tokens, segment_tokens, found.grad_norm)

    def _accumulate(self, expert: GLM, rows: Sequence[Row], tokens: int) -> float:
        """Add the gradients of the rows that one expert judges.

        Return the sum of log student - log expert over them.
        """
        shares, passes = divide(rows, self.workers, self.student.device)

        def work(student: GLM, share: Sequence[Sequence[Row]] | None) -> float:
            share = share or []
            found = sum(self._backward(student, expert, microbatch, tokens) for microbatch in share)
            if self.workers.in_step:
                # A worker with fewer rows makes the passes that the others wait for, and learns nothing from them.
                for _ in range(passes - len(share)):
                    self._backward(student, expert, shares[0][0], tokens, weight=0.0)
            return found

        found = sum(self.workers.run(work, shares))
        return float(self.workers.sum(torch.tensor(found, dtype=torch.float64)))

    def _backward(
        self, student: GLM, expert: GLM, rows: Sequence[Row], tokens: int, weight: float = 1.0
    ) -> float:
        """Add the gradients of a micro-batch, times `weight`. Return its sum of log student - log expert."""
        part = self.workers.row_part
        batch = collate([row.segment for row in rows], self.pad, part.ranks)
        batch = batch.cut(part).to(self.student.device)
        with torch.no_grad():
            expert_logprobs_BS = sampled_log_probabilities(expert, batch, 1.0).logprobs_BS
        logprobs_BS = sampled_log_probabilities(student, batch, 1.0).logprobs_BS
        mask_BS = batch.predicted_BS
        loss = distillation_loss(logprobs_BS, expert_logprobs_BS, mask_BS, tokens)
        (weight * loss).backward()
        return weight * float((logprobs_BS.detach() - expert_logprobs_BS)[mask_BS].sum())


@torch.no_grad()
def average_into(model: GLM, experts: Sequence[GLM]) -> None:
    """Replace the weights of a model, the selection bias of its routers among them, by the mean of the experts'."""
    states = [expert.state_dict() for expert in experts]
    for name, x in model.state_dict().items():
        if x.is_floating_point():
            x.copy_(torch.stack([state[name].float() for state in states]).mean(0))
