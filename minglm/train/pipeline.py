"""Train a batch through the stages of a pipeline, micro-batch by micro-batch (no section in the paper).

    time ->       0    1    2    3    4    5    6    7
    stage 0      F0   F1        B0   F2   B1        B2        F: forward, B: backward, of a micro-batch
    stage 1           F0   B0   F1   B1   F2   B2

PyTorch's schedules (`torch.distributed.pipelining`) decide who does what when, and send states and gradients:
1F1B, or interleaved 1F1B where a rank has several stages. `minglm.plan.pipeline` has the order, what waits,
and what is kept. With p ranks and m micro-batches a rank waits for (p - 1) / (m + p - 1) of the time: take
many, or interleave.

- All micro-batches have the same shape, since a stage must know what it will receive. Rows that are missing
  are filled up by padding, which counts nowhere; so are micro-batches that are missing to fill the pipeline.
- The gradient is that of the batch: the loss is divided by the counts of the whole batch, and the schedule does not scale.
- Schedules that split the backward pass in two (zero bubble) compute the gradients of weights later than FSDP
  reduces them, and fail with divided experts. They are not offered.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
)

from minglm.data.packing import Batch
from minglm.parallel.pipeline import PipelineGLM, Stage
from minglm.parallel.workers import ShardedWorker
from minglm.plan.pipeline import whole_rounds
from minglm.train.loss import (
    AFTER_NEXT,
    NEXT_TOKEN,
    LossWeights,
    TargetCounts,
    cross_entropy_term,
)

Terms = tuple[float, float, float, Tensor]
"""Cross-entropies of the next token and of the one after it, balance loss, and tokens (L, E) by router and expert."""


def accumulate_stages(
    model: PipelineGLM,
    batch: Batch,
    counts: TargetCounts,
    weights: LossWeights,
    microbatch_rows: int,
    passes: int,
    workers: ShardedWorker,
) -> Terms:
    """Add the gradients of this rank's rows to its stages.

    Return the terms that this rank knows; the sum is the batch's.

    batch: the rows of this rank's data group, perhaps none. counts: of the whole batch. passes: micro-batches
    of the group with the most rows; every rank makes as many.
    """
    passes = whole_rounds(workers.meshes.layout, passes)
    padded = fill_up(batch, passes * microbatch_rows).to(model.device)
    total_routers = routers_of(model, bool(weights.mtp))
    model.with_mtp = bool(weights.mtp) and model.config.num_nextn_predict_layers > 0
    rows_share = microbatch_rows / counts.rows
    model.balance_factor = weights.balance * rows_share / max(1, total_routers)
    model.reports = []
    cross_entropies: list[Tensor] = []
    mtp_losses: list[Tensor] = []

    def loss_of(output: tuple[Tensor, ...] | Tensor, rows: Tensor) -> Tensor:
        """Compute the loss of a micro-batch; called in the last stage."""
        states = [output] if isinstance(output, Tensor) else list(output)
        microbatch = padded.map(lambda tensor: tensor[rows])
        loss = cross_entropy_term(model, states[0], microbatch, NEXT_TOKEN, counts.next_token)
        cross_entropies.append(loss.detach())
        if model.with_mtp:
            mtp = cross_entropy_term(model, states[1], microbatch, AFTER_NEXT, counts.after_next)
            mtp_losses.append(mtp.detach())
            loss = loss + weights.mtp * mtp
        return loss

    schedule = schedule_of(model, padded, microbatch_rows, passes, loss_of, workers)
    inputs: dict[str, Any] = {"tokens_BS": padded.tokens_BS}
    for name in ("positions_BS", "documents_BS"):
        if getattr(padded, name) is not None:
            inputs[name] = getattr(padded, name)
    arguments = (padded.tokens_BS,) if model.is_first else ()
    numbers = torch.arange(len(padded.tokens_BS), device=model.device)
    schedule.step(
        *arguments, target=numbers if model.is_last else None, return_outputs=False, **inputs
    )

    balance = 0.0
    load_LE = torch.zeros(total_routers, model.config.n_routed_experts)
    for stage, routings in model.reports:
        for number, routing in zip(model.own_routers[stage], routings):
            balance += routing.balance_loss.item() * rows_share / total_routers
            load_LE[number] += routing.tokens_per_expert_E.cpu()
    return (
        sum(loss.item() for loss in cross_entropies),
        sum(loss.item() for loss in mtp_losses),
        balance,
        load_LE,
    )


def routers_of(model: PipelineGLM, with_mtp: bool) -> int:
    """Count the routers of all stages that a step uses."""
    config = model.config
    layers = config.num_hidden_layers - config.first_k_dense_replace
    return layers + (config.num_nextn_predict_layers if with_mtp else 0)


def fill_up(batch: Batch, rows: int) -> Batch:
    """Return the batch with rows of padding after its own: no targets, and no document, so that no router counts them."""
    missing = rows - len(batch.tokens_BS)
    if not missing:
        return batch
    tokens_BS = batch.tokens_BS
    documents_BS = batch.documents_BS
    if documents_BS is None:  # each row is one document
        documents_BS = torch.zeros_like(tokens_BS, dtype=torch.int32)
    values = {
        "tokens_BS": (tokens_BS, 0),
        "mask_BS": (batch.mask_BS, False),
        "documents_BS": (documents_BS, -1),
        "positions_BS": (batch.positions_BS, 0),
    }
    filled = {}
    for name, (tensor, fill) in values.items():
        if tensor is not None:
            padding = tensor.new_full((missing, tensor.shape[1]), fill)
            filled[name] = torch.cat([tensor, padding])
    return replace(batch, **filled)


def schedule_of(
    model: PipelineGLM,
    batch: Batch,
    microbatch_rows: int,
    passes: int,
    loss_of: Callable[[tuple[Tensor, ...] | Tensor, Tensor], Tensor],
    workers: ShardedWorker,
) -> Schedule1F1B | ScheduleInterleaved1F1B:
    """Return the schedule of one step, whose stages know the shapes of what they send and receive."""
    shape = (microbatch_rows, batch.tokens_BS.shape[1], model.config.hidden_size)
    states = torch.empty(shape, dtype=model.dtype, device="meta", requires_grad=True)
    between = (states, states) if model.with_mtp else (states,)
    first = (batch.tokens_BS[:microbatch_rows].to("meta"),)
    group = workers.meshes.dense.get_group("pp")
    stages = [
        PipelineStage(
            Stage(model, number),
            number,
            model.last_stage + 1,
            model.device,
            input_args=between if number else first,
            output_args=between,
            group=group,
        )
        for number in model.own_stages
    ]
    if len(stages) == 1:
        return Schedule1F1B(stages[0], passes, loss_fn=loss_of, scale_grads=False)
    return ScheduleInterleaved1F1B(list(stages), passes, loss_fn=loss_of, scale_grads=False)
