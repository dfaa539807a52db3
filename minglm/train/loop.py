"""The training loop: pre-training, mid-training and supervised fine-tuning are the same loop (paper 2.4, 3.1).

    loss = CE(trunk, next token) + mtp_weight * CE(MTP layer, token after next) + balance_weight * balance loss

Every number that changes over time is a function of the tokens seen, given by the `Phase`. A batch is cut into
micro-batches that fit the memory; each token's weight in the loss is one over the targets of the whole batch, so the
cut does not change the gradient. A batch without any target has loss exactly zero. The router's selection bias steps
once per optimizer step, from the loads of all micro-batches, the MTP layer's router included.
Which steps are left out, and when a run goes back to its last checkpoint, is decided by `minglm.train.guard`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from minglm.model.balance import update_expert_bias
from minglm.parallel.replicas import Replicas
from minglm.train.checkpoint import Interrupted, stop_between_steps
from minglm.train.guard import Guard
from minglm.train.loss import targets


@dataclass(frozen=True)
class Phase:
    """What the loop needs to know of one stage. The callables take the tokens seen since training began."""

    name: str
    tokens: int
    """Tokens to train on in this phase."""
    start: int
    """Tokens seen before it."""
    sequence_length: int
    learning_rate: Callable[[int], float]
    batch_tokens: Callable[[int], int]
    mtp_weight: Callable[[int], float]
    bias_rate: Callable[[int], float]
    balance_weight: float = 1e-4
    microbatch_tokens: int = 32768
    clip_norm: float = 1.0
    spike_factor: float = 0.0
    rollback_after: int = 0


def accumulate(model, batch, phase, mtp_weight, replicas=None):
    """Gradients of one batch, micro-batch by micro-batch. Returns the loss terms and the loads of every router used.

    replicas: `Replicas` of the model that share the rows among threads; by default there is only the model.
    """
    replicas, rows = replicas or Replicas(model), len(batch.tokens_BS)
    ahead = (1, 2) if model.mtp is not None and mtp_weight else (1,)
    total = {
        a: int(targets(batch.tokens_BS, batch.mask_BS, batch.documents_BS, a)[1].sum())
        for a in ahead
    }

    def work(model, share):
        sums, loads = {"loss": 0.0, "mtp_loss": 0.0, "balance_loss": 0.0}, 0
        for part in share.split(max(1, phase.microbatch_tokens // share.tokens_BS.shape[1])):
            out = model.hidden(
                part.tokens_BS, part.positions_BS, part.documents_BS, mtp=len(ahead) == 2
            )
            balance = (
                sum(r.balance_loss for r in out.routing)
                / max(1, len(out.routing))
                * len(part.tokens_BS)
                / rows
            )
            loss, states = phase.balance_weight * balance, (out.hidden_BSD, out.mtp_hidden_BSD)
            for a, hidden_BSD, weight in zip(ahead, states, (1.0, mtp_weight), strict=False):
                target_BS, counts_BS = targets(part.tokens_BS, part.mask_BS, part.documents_BS, a)
                weights_T = counts_BS.flatten().float() / max(1, total[a])
                hidden_TD = hidden_BSD.flatten(0, 1)
                term = model.lm_head.cross_entropy(hidden_TD, target_BS.flatten(), weights_T)
                sums["loss" if a == 1 else "mtp_loss"] += term.item()
                loss = loss + weight * term
            loss.backward()
            if out.routing:
                sums["balance_loss"] += balance.item()
                loads = loads + torch.stack([r.tokens_per_expert_E for r in out.routing])
        return sums, loads

    found = replicas.run(work, batch.split(-(-rows // len(replicas))))
    return {name: sum(sums[name] for sums, _ in found) for name in found[0][0]}, sum(
        loads for _, loads in found
    )


def step(model, optimizer, batch, phase, seen, guard=None, replicas=None):
    """One optimizer step at `seen` tokens. Returns the metrics that are logged (see the README's table).

    guard: a `Guard` that may leave the step out; by default one that knows only this step. replicas: see `accumulate`.
    """
    rate, mtp_weight = phase.learning_rate(seen), phase.mtp_weight(seen)
    sums, loads = accumulate(model, batch, phase, mtp_weight, replicas)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    left_out = (guard or Guard()).reason(float(norm))
    if left_out:
        optimizer.zero_grad()
    elif phase.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), phase.clip_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    if not left_out:
        optimizer.step()
    optimizer.zero_grad()
    metrics = {**sums, "learning_rate": rate, "grad_norm": float(norm), "mtp_weight": mtp_weight}
    if left_out:
        metrics["left_out"] = left_out
    if not torch.is_tensor(loads):  # no router was used
        return metrics
    for router, load_E in zip(model.routers(), loads, strict=False):
        update_expert_bias(router.e_score_correction_bias, load_E, phase.bias_rate(seen))
    share, experts = loads / loads.sum(1, keepdim=True), loads.shape[1]
    entropy = torch.special.entr(share).sum(1) / math.log(experts)
    metrics["load_max_over_mean"] = [round(v, 3) for v in (share.amax(1) * experts).tolist()]
    metrics["load_entropy"] = [round(v, 4) for v in entropy.tolist()]
    metrics["dead_experts"] = int((loads == 0).sum())
    metrics["bias_rate"] = phase.bias_rate(seen)
    return metrics


def train(
    model,
    optimizer,
    stream,
    phase,
    checkpoints,
    log,
    quiet=False,
    evaluate=None,
    every=0,
    ceiling=0.0,
    threads=1,
):
    """Train on `stream` for `phase.tokens` tokens, resuming from `checkpoints` where a partial state is there.

    evaluate: called without arguments whenever another `every` tokens have been seen (0: never).
    ceiling: tokens a second at which the device's matrix products would be never idle, measured FLOP/s over the model's
    FLOPs a token; with it each step says its utilisation, `mfu` (0: unknown).
    threads: how many share the rows of each batch (`minglm.parallel.replicas`); results equal bit for bit at equal counts.
    Ctrl-C saves and raises `Interrupted`. Leaves a partial checkpoint behind; the caller marks the stage final.
    """
    device, guard = model.device, Guard(phase.spike_factor, phase.rollback_after)
    replicas = Replicas(model, threads)
    done, number, state = 0, 0, checkpoints.load()
    if state is not None:
        restore(model, optimizer, state)
        stream.load_state_dict(state["stream"])
        if "guard" in state:
            guard.load_state_dict(state["guard"])
        done, number = state["tokens"], state["step"]
    bar = tqdm(
        total=phase.tokens,
        initial=done,
        desc=phase.name,
        unit="tok",
        unit_scale=True,
        disable=quiet or None,
    )

    def save():
        parts = {"model": model, "optimizer": optimizer, "stream": stream, "guard": guard}
        checkpoints.save(
            {n: part.state_dict() for n, part in parts.items()} | {"tokens": done, "step": number}
        )

    if guard.rollback_after and state is None:
        save()  # something to go back to
    with stop_between_steps() as stop, bar:
        while done < phase.tokens:
            began = time.perf_counter()
            rows = max(1, round(phase.batch_tokens(phase.start + done) / phase.sequence_length))
            batch = stream.next(rows)
            metrics = step(
                model, optimizer, batch.to(device), phase, phase.start + done, guard, replicas
            )
            count = batch.tokens_BS.numel()
            done, number = done + count, number + 1
            speed = count / (time.perf_counter() - began)
            used = {"mfu": round(speed / ceiling, 4)} if ceiling else {}
            log.write(
                "step",
                stage=phase.name,
                step=number,
                tokens=phase.start + done,
                batch_tokens=count,
                tokens_per_second=round(speed),
                **used,
                **metrics,
            )
            if guard.gives_up:
                back = roll_back(model, optimizer, checkpoints, guard)
                log.write(
                    "rollback", stage=phase.name, step=number, to_step=back, left_out=guard.left_out
                )
                bar.write(
                    f"{phase.name}: step {number} went back to the weights of step {back}; its batches are skipped"
                )
            load = max(metrics.get("load_max_over_mean", [0]))
            share = f", mfu {used['mfu']:.0%}" if used else ""
            bar.set_postfix_str(
                f"loss {metrics['loss']:.3f}, load {load:.1f}{share}", refresh=False
            )
            bar.update(min(count, bar.total - bar.n))
            if every and done // every > (done - count) // every and done < phase.tokens:
                evaluate()
            try:
                stop()
            except Interrupted:
                save()
                raise
            if checkpoints.due() and not guard.in_a_row:
                save()
    save()


def restore(model, optimizer, state):
    """Put back the weights and the optimizer's state of a checkpoint."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def roll_back(model, optimizer, checkpoints, guard):
    """Return to the last good checkpoint; the data go on. Returns the step that it was made at."""
    state = checkpoints.newest()
    restore(model, optimizer, state)
    guard.in_a_row = 0
    return state["step"]
