"""Train on a stream of batches: pre-training, mid-training and supervised fine-tuning alike (paper 2.4, 3.1).

    for each step:  batch -> micro-batches -> loss.backward() -> clip -> optimizer step -> bias step -> log

Every number that changes over time is a function of the tokens seen, given by the `Phase`. A batch is cut
into micro-batches that fit the memory; the loss of each (`minglm.train.loss`) is divided by the targets of
the whole batch, so the cut does not change the gradient. The router's selection bias steps once per optimizer
step, from the loads of all micro-batches, the MTP layer's router included. `minglm.train.guard` decides which
steps are skipped, and when a run rolls back to its last checkpoint. A skipped step moves nothing: not the
weights, nor the momenta, nor the bias.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from minglm.common.log import Log
from minglm.common.signals import Stopped, stop_between_steps
from minglm.config import OptimizerConfig
from minglm.data.packing import Batch
from minglm.model.balance import update_expert_bias
from minglm.model.glm import GLM
from minglm.parallel import Replicas, Workers
from minglm.parallel.pipeline import PipelineGLM
from minglm.parallel.sequence import cut
from minglm.parallel.workers import ShardedWorker
from minglm.plan.counts import flops_per_token
from minglm.report.records import RollbackRecord, SlowRankRecord, StepMetrics, StepRecord
from minglm.train.checkpoint import StageCheckpoints
from minglm.train.guard import Guard, guarded_step
from minglm.train.loss import LossWeights, count_targets, training_loss
from minglm.train.pipeline import accumulate_stages
from minglm.train.state import Stateful, TrainingState

PACE_STEPS = 100
"""Steps between two comparisons of the speed of the ranks."""


@dataclass(frozen=True)
class Phase:
    """Settings of one training stage. The callables take the tokens seen since training began."""

    name: str
    tokens: int
    """Tokens to train on in this phase."""
    start: int
    """Tokens seen before it."""
    sequence_length: int
    """Positions of a row."""
    learning_rate: Callable[[int], float]
    batch_tokens: Callable[[int], int]
    """Tokens of the next batch."""
    mtp_weight: Callable[[int], float]
    """Weight of the MTP loss."""
    bias_rate: Callable[[int], float]
    """Step of the router's selection bias."""
    balance_weight: float
    """Weight of the sequence-wise balance loss."""
    optimizer: OptimizerConfig
    """Micro-batches, clipping, and which steps are skipped; the rates above replace its schedule."""

    def guard(self) -> Guard:
        """Return a guard with this phase's settings, for its first step."""
        return Guard(self.optimizer.spike_factor, self.optimizer.rollback_after)


class Stream(Stateful, Protocol):
    """An endless stream of batches, such as `minglm.data.mixture.Mixture`."""

    def next(self, rows: int) -> Batch:
        """Return the next `rows` rows."""
        ...


class BatchTerms(NamedTuple):
    """The terms of the loss of a whole batch, whose gradients are in the model."""

    loss: float
    """Cross-entropy of the next token, nats."""
    mtp_loss: float
    """Cross-entropy of the token after next, nats; 0 when the MTP layer is not trained."""
    balance_loss: float
    """Sequence-wise balance loss, without its weight."""
    tokens_per_expert_LE: Tensor | None
    """float32: tokens routed to each expert by each router that was used; None without any."""


def accumulate(
    model: GLM,
    batch: Batch,
    phase: Phase,
    mtp_weight: float,
    workers: Workers | None = None,
) -> BatchTerms:
    """Add the gradients of one batch to the model, micro-batch by micro-batch. Return the terms of the loss.

    batch: the whole batch, the same on all ranks. workers: share its rows; None: the model alone.
    """
    weights = LossWeights(mtp=mtp_weight, balance=phase.balance_weight)
    microbatch_rows = max(1, phase.optimizer.microbatch_tokens // batch.tokens_BS.shape[1])
    return accumulate_batch(model, batch, weights, microbatch_rows, workers or Replicas(model))


def accumulate_batch(
    model: GLM, batch: Batch, weights: LossWeights, microbatch_rows: int, workers: Workers
) -> BatchTerms:
    """Add the gradients of one batch to the model, `microbatch_rows` rows at a time on each worker."""
    counts = count_targets(model, batch, weights)
    shares = batch.split(math.ceil(len(batch.tokens_BS) / len(workers)))
    passes = math.ceil(len(shares[0].tokens_BS) / microbatch_rows)  # of the largest share
    if isinstance(model, PipelineGLM):
        assert isinstance(workers, ShardedWorker)
        nothing = batch.map(lambda tensor: tensor[:0])
        share = workers.own_share(shares) or nothing
        terms = accumulate_stages(model, share, counts, weights, microbatch_rows, passes, workers)
        return total_of_all(BatchTerms(*terms), workers)

    def work(model: GLM, share: Batch | None) -> BatchTerms:
        microbatches = [] if share is None else share.split(microbatch_rows)
        total = BatchTerms(0.0, 0.0, 0.0, None)
        for microbatch in microbatches:
            part = cut(microbatch, workers.row_part).to(model.device)
            terms = training_loss(model, part, counts, weights)
            terms.loss.backward()
            added = BatchTerms(
                loss=terms.cross_entropy.item(),
                mtp_loss=0.0 if terms.mtp is None else terms.mtp.item(),
                balance_loss=terms.balance.item(),
                tokens_per_expert_LE=terms.tokens_per_expert_LE,
            )
            total = add_terms(total, added)
        if workers.in_step:
            # A worker with fewer rows makes the passes that the others wait for, and learns nothing from them.
            row = cut(batch.split(1)[0], workers.row_part).to(model.device)
            for _ in range(passes - len(microbatches)):
                (0.0 * training_loss(model, row, counts, weights).loss).backward()
        return total

    total = BatchTerms(0.0, 0.0, 0.0, None)
    for terms in workers.run(work, shares):
        total = add_terms(total, terms)
    if total.tokens_per_expert_LE is None:  # this process had no row
        routers = len(model.routers())
        if model.mtp is not None and not weights.mtp:
            routers -= 1
        load_LE = torch.zeros(routers, model.config.n_routed_experts)
        total = total._replace(tokens_per_expert_LE=load_LE)
    return total_of_all(total, workers)


def total_of_all(terms: BatchTerms, workers: Workers) -> BatchTerms:
    """Add up the terms of all processes, in one sum."""
    load_LE = terms.tokens_per_expert_LE
    assert load_LE is not None
    values = torch.tensor([terms.loss, terms.mtp_loss, terms.balance_loss], dtype=torch.float64)
    total = workers.sum(torch.cat([values, load_LE.flatten().cpu().double()]))
    loss, mtp_loss, balance_loss = total[:3].tolist()
    total_LE = total[3:].reshape(load_LE.shape).float() if len(load_LE) else None
    return BatchTerms(loss, mtp_loss, balance_loss, total_LE)


def add_terms(a: BatchTerms, b: BatchTerms) -> BatchTerms:
    """Add the terms of two parts of a batch."""
    if a.tokens_per_expert_LE is None:
        load_LE = b.tokens_per_expert_LE
    elif b.tokens_per_expert_LE is None:
        load_LE = a.tokens_per_expert_LE
    else:
        load_LE = a.tokens_per_expert_LE + b.tokens_per_expert_LE
    return BatchTerms(
        loss=a.loss + b.loss,
        mtp_loss=a.mtp_loss + b.mtp_loss,
        balance_loss=a.balance_loss + b.balance_loss,
        tokens_per_expert_LE=load_LE,
    )


def step(
    model: GLM,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    phase: Phase,
    tokens_seen: int,
    guard: Guard | None = None,
    workers: Workers | None = None,
) -> StepMetrics:
    """Take one optimizer step at `tokens_seen` tokens. Return the metrics that are logged.

    guard: judges the gradient; None: one that knows this step only. workers: see `accumulate`.
    """
    learning_rate = phase.learning_rate(tokens_seen)
    mtp_weight = phase.mtp_weight(tokens_seen)
    bias_rate = phase.bias_rate(tokens_seen)

    terms = accumulate(model, batch, phase, mtp_weight, workers)
    result = guarded_step(
        model, optimizer, learning_rate, phase.optimizer.clip_norm, guard or Guard()
    )
    metrics = StepMetrics(
        loss=terms.loss,
        mtp_loss=terms.mtp_loss,
        balance_loss=terms.balance_loss,
        learning_rate=learning_rate,
        grad_norm=result.grad_norm,
        mtp_weight=mtp_weight,
        left_out=result.left_out,
    )
    load_LE = terms.tokens_per_expert_LE
    if load_LE is None:
        return metrics
    if result.left_out is None:
        for number, router in zip(model.router_numbers(), model.routers(), strict=True):
            if number >= len(load_LE):  # the MTP layer's, which is not trained
                break
            load_E = load_LE[number]
            bias_E = router.e_score_correction_bias
            update_expert_bias(bias_E, load_E.to(bias_E.device), bias_rate)
    expert_ranks = workers.expert_ranks if workers is not None else 1
    return replace(metrics, bias_rate=bias_rate, **load_metrics(load_LE, expert_ranks))


def load_metrics(load_LE: Tensor, expert_ranks: int = 1) -> dict[str, Any]:
    """Return the fields of `StepMetrics` that describe the loads of the experts, one value a router.

    expert_ranks: ranks that hold E / expert_ranks consecutive experts each.
    """
    experts = load_LE.shape[1]
    share_LE = load_LE / load_LE.sum(1, keepdim=True)
    worst_L = share_LE.amax(1) * experts
    share_of_ranks = rearrange(share_LE, "l (ranks e) -> l ranks e", ranks=expert_ranks).sum(2)
    worst_rank_L = share_of_ranks.amax(1) * expert_ranks
    rounded = [round(value, 3) for value in worst_rank_L.tolist()]
    entropy_L = torch.special.entr(share_LE).sum(1) / math.log(experts)
    return {
        "rank_load_max_over_mean": rounded if expert_ranks > 1 else None,
        "load_max_over_mean": [round(value, 3) for value in worst_L.tolist()],
        "load_entropy": [round(value, 4) for value in entropy_L.tolist()],
        "dead_experts": int((load_LE == 0).sum()),
    }


def log_slow_rank(workers: Workers, log: Log, stage: str, step: int) -> None:
    """Compare the speed of the ranks once in `PACE_STEPS` steps, and log the slowest if it holds up the others."""
    if step % PACE_STEPS:
        return
    slow = workers.slowest()
    if slow is not None:
        log.write(SlowRankRecord(stage=stage, step=step, **slow._asdict()))


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How a training loop behaves around its steps; none of it changes what is learned."""

    quiet: bool = False
    """Whether to show no progress bar."""
    evaluate: Callable[[], object] | None = None
    """Called during the training, each time that `evaluate_every` more tokens have been seen."""
    evaluate_every: int = 0
    """Tokens between two evaluations; 0: never."""
    peak_flops: float = 0.0
    """Measured FLOP/s of all devices in matrix products. Each step then logs its utilisation, `mfu`. 0: unknown."""
    workers: Workers | None = None
    """Threads or ranks that share the rows of each batch; None: the model alone."""


class Trainer:
    """Trains a model on `phase.tokens` tokens of a stream, resuming where a partial checkpoint is found."""

    def __init__(
        self,
        model: GLM,
        optimizer: torch.optim.Optimizer,
        stream: Stream,
        phase: Phase,
        checkpoints: StageCheckpoints,
        log: Log,
        options: LoopOptions = LoopOptions(),
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.stream = stream
        self.phase = phase
        self.checkpoints = checkpoints
        self.log = log
        self.options = options
        self.workers = options.workers or Replicas(model)
        self.guard = phase.guard()
        self.state = TrainingState(model, optimizer, self.guard, stream)

    def run(self) -> None:
        """Train to the end. Leaves a partial checkpoint; the caller marks the stage complete.

        A request to end saves and raises `Stopped`.
        """
        resumed = self.state.restore(self.checkpoints)
        if self.guard.rollback_after and not resumed:
            self.state.save(self.checkpoints)  # something to roll back to

        with stop_between_steps(self.workers.agree) as stop, self.progress_bar() as bar:
            while self.state.tokens < self.phase.tokens:
                with self.workers.watched(f"stage {self.phase.name}, step {self.state.step + 1}"):
                    record = self.step()
                self.log.write(record)
                log_slow_rank(self.workers, self.log, self.phase.name, self.state.step)
                if self.guard.gives_up:
                    bar.write(self.roll_back())
                self.show(bar, record)
                self.evaluate(record.batch_tokens)
                try:
                    stop()
                except Stopped:
                    self.state.save(self.checkpoints)
                    raise
                due = self.workers.agree(self.checkpoints.due())  # the clocks of ranks differ
                if due and not self.guard.in_a_row:
                    self.state.save(self.checkpoints, background=True)
        self.state.save(self.checkpoints)

    def step(self) -> StepRecord:
        """Take the next step. Return its record."""
        began = time.perf_counter()
        tokens_seen = self.phase.start + self.state.tokens
        rows = max(1, round(self.phase.batch_tokens(tokens_seen) / self.phase.sequence_length))
        batch = self.stream.next(rows)
        metrics = step(
            self.model,
            self.optimizer,
            batch,
            self.phase,
            tokens_seen,
            self.guard,
            self.workers,
        )
        batch_tokens = batch.tokens_BS.numel()
        self.state.tokens += batch_tokens
        self.state.step += 1

        speed = batch_tokens / (time.perf_counter() - began)
        peak = self.options.peak_flops
        flops = flops_per_token(self.model.config, round(batch.attended_length()))
        done = flops.total if metrics.mtp_weight else flops.total - flops.mtp
        return StepRecord(
            stage=self.phase.name,
            step=self.state.step,
            tokens=self.phase.start + self.state.tokens,
            batch_tokens=batch_tokens,
            tokens_per_second=round(speed),
            mfu=round(speed * done / peak, 4) if peak else None,
            **vars(metrics),
        )

    def roll_back(self) -> str:
        """Restore the last good checkpoint, while the data continue, and log it.

        Return a line for the terminal.
        """
        to_step = self.state.roll_back(self.checkpoints)
        self.log.write(
            RollbackRecord(
                stage=self.phase.name,
                step=self.state.step,
                to_step=to_step,
                left_out=self.guard.left_out,
            )
        )
        return (
            f"{self.phase.name}: step {self.state.step} rolled back to the weights of step {to_step}; "
            "the batches in between are skipped"
        )

    def evaluate(self, batch_tokens: int) -> None:
        """Evaluate when the last `batch_tokens` tokens completed another interval, except at the very end."""
        every = self.options.evaluate_every
        tokens = self.state.tokens
        if not every or self.options.evaluate is None or tokens >= self.phase.tokens:
            return
        if tokens // every > (tokens - batch_tokens) // every:
            self.options.evaluate()

    def progress_bar(self) -> "tqdm[NoReturn]":
        """Return the progress bar, in tokens, from where the training resumes."""
        return tqdm(
            total=self.phase.tokens,
            initial=self.state.tokens,
            desc=self.phase.name,
            unit="tok",
            unit_scale=True,
            disable=self.options.quiet or None,
        )

    def show(self, bar: "tqdm[NoReturn]", record: StepRecord) -> None:
        """Advance the progress bar by one step, with its loss, worst load and utilisation."""
        load = max(record.load_max_over_mean or [0])
        text = f"loss {record.loss:.3f}, load {load:.1f}"
        if record.mfu is not None:
            text += f", mfu {record.mfu:.0%}"
        bar.set_postfix_str(text, refresh=False)
        bar.update(min(record.batch_tokens, bar.total - bar.n))
