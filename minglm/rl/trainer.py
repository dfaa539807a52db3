"""The synchronous, co-located loop: roll out, reward, update, with one set of weights (paper 3.2, 3.5).

    for each step:  tasks -> P x G episodes -> advantages within each group -> clipped policy gradient, no KL

Groups whose samples all got the same reward carry no signal and are left out before any gradient is computed; with
fewer than two live groups the step is skipped, because an optimizer that normalises would turn noise into a full-size
step. The gradient is computed in micro-batches of similar length with one denominator counted over the whole batch.
The MTP layer and the router's selection bias stay as they are. Every draw follows from the seed and the step, so a
resumed run repeats nothing and needs no random state.
"""

import math
import time
from statistics import fmean

import torch
from tqdm import tqdm

from minglm.kernels.cross_entropy.eager import token_log_probabilities
from minglm.parallel.replicas import Replicas
from minglm.rewards.pathology import detect, incidence
from minglm.rl.aggregation import aggregate, denominator
from minglm.rl.grpo import advantages, live_groups, policy_loss
from minglm.rl.rollout import rollout
from minglm.train.checkpoint import Interrupted, stop_between_steps

MICROBATCH_TOKENS = 8192
WARMUP_STEPS = 5


def collate(segments, pad):
    """Segments to tensors, right-padded: tokens int64, mask bool, logprobs float32, documents int32 (-1 on padding)."""
    S = max(len(segment.tokens) for segment in segments)

    def rows(values, fill, dtype):
        return torch.tensor([[*v, *[fill] * (S - len(v))] for v in values], dtype=dtype)

    tokens_BS = rows([s.tokens for s in segments], pad, torch.int64)
    mask_BS = rows([s.mask for s in segments], False, torch.bool)
    logprobs_BS = rows([s.logprobs for s in segments], 0.0, torch.float32)
    documents_BS = rows([[0] * len(s.tokens) for s in segments], -1, torch.int32)
    return tokens_BS, mask_BS, logprobs_BS, documents_BS


def sampled_log_probabilities(model, tokens_BS, mask_BS, documents_BS, temperature):
    """Log-probability (B, S) float32 of each sampled token under the model, 0 elsewhere, and the mean entropy."""
    hidden_BSD = model.hidden(tokens_BS, documents_BS=documents_BS).hidden_BSD
    before_BS = mask_BS[:, 1:]  # position s - 1 predicts token s
    hidden_TD = hidden_BSD[:, :-1][before_BS]
    logprobs_T, entropy_T = token_log_probabilities(
        hidden_TD, model.lm_head.weight.to(hidden_TD.dtype), tokens_BS[:, 1:][before_BS], temperature
    )
    where = torch.zeros_like(mask_BS)
    where[:, 1:] = before_BS
    logprobs_BS = torch.zeros(mask_BS.shape, dtype=torch.float32, device=mask_BS.device)
    return logprobs_BS.masked_scatter(where, logprobs_T), entropy_T.sum()


def microbatches(pairs):
    """(segment, advantage) pairs, shortest first, cut so that no padded piece exceeds MICROBATCH_TOKENS."""
    piece = []
    for pair in pairs:
        if piece and len(pair[0].tokens) * (len(piece) + 1) > MICROBATCH_TOKENS:
            yield piece
            piece = []
        piece.append(pair)
    if piece:
        yield piece


def update(model, optimizer, pairs, config, pad, clip_norm=1.0, replicas=None):
    """One optimizer step on (segment, advantage) pairs. Returns metrics for the log.

    replicas: `Replicas` of the model that share the pairs among threads; by default there is only the model.
    """
    replicas, device = replicas or Replicas(model), model.lm_head.weight.device
    pairs = sorted(pairs, key=lambda pair: len(pair[0].tokens))
    longest = len(pairs[-1][0].tokens)
    everything = torch.tensor([[*s.mask, *[False] * (longest - len(s.mask))] for s, _ in pairs])
    total = denominator(everything, config.aggregation, config.max_new_tokens * config.max_turns)
    tokens = int(everything.sum())

    def work(model, share):
        metrics = {"ratio_max": 0.0, "clip_share": 0.0, "kl": 0.0, "entropy": 0.0}
        for piece in microbatches(share):
            tensors = [t.to(device) for t in collate([segment for segment, _ in piece], pad)]
            tokens_BS, mask_BS, behaviour_BS, documents_BS = tensors
            advantages_B = torch.tensor([advantage for _, advantage in piece], device=device)
            logprobs_BS, entropy = sampled_log_probabilities(
                model, tokens_BS, mask_BS, documents_BS, config.temperature
            )
            loss_BS, found = policy_loss(
                logprobs_BS, behaviour_BS, advantages_B, config.clip_low, config.clip_high, mask_BS
            )
            aggregate(loss_BS, mask_BS, config.aggregation, total).backward()
            metrics["ratio_max"] = max(metrics["ratio_max"], float(found["ratio_max"]))
            metrics["entropy"] += float(entropy) / tokens
            for key in ("clip_share", "kl"):
                metrics[key] += float(found[key] * found["tokens"]) / tokens
        return metrics

    count = min(len(replicas), len(pairs))
    found = replicas.run(work, [pairs[i::count] for i in range(count)])  # each gets short and long ones
    metrics = {key: (max if key == "ratio_max" else sum)(part[key] for part in found) for key in found[0]}
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if math.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm, norm)
        optimizer.step()
    optimizer.zero_grad()
    return metrics | {"grad_norm": float(norm)}


def faults(trajectory):
    """The pathologies of a trajectory's last turn, {name: bool}; languages are judged where the task asks for one."""
    language = trajectory.task.label if trajectory.task.environment == "provocation" else None
    return detect(trajectory.texts[-1], language)


def reward(trajectory, fault_penalty):
    """The score of a trajectory, less the penalty when a fault is found in it or the thinking switch disobeyed."""
    faulty = fault_penalty and (any(faults(trajectory).values()) or not trajectory.switch_obeyed)
    return trajectory.score.value - (fault_penalty if faulty else 0.0)


def summarize(groups):
    """Numbers of one rollout for the log: reward, by environment too, length, truncation, calls, faults."""
    everything = [t for group in groups for t in group]
    by_env = {}
    for t in everything:
        by_env.setdefault(t.task.environment, []).append(t.score.value)
    with_tools = [t.score.parts for t in everything if t.task.tools]
    calls, valid = (sum(parts[key] for parts in with_tools) for key in ("calls", "valid_calls"))
    flags = [faults(trajectory) for trajectory in everything]
    return {
        "reward": round(fmean(t.score.value for t in everything), 4),
        "reward_by_env": {name: round(fmean(values), 4) for name, values in by_env.items()},
        "length": round(fmean(t.length for t in everything), 2),
        "truncated": round(fmean(t.truncated for t in everything), 4),
        "switch_ok": round(fmean(t.switch_obeyed for t in everything), 4),
        "valid_calls": round(valid / calls, 4) if calls else None,
        "incidence": {key: round(value, 4) for key, value in incidence(flags).items()},
    }


def draw_tasks(environments, names, count, seed, step, thinking_share=1.0):
    """Training tasks for a step, the environments in `names` taking turns (a name may stand there twice), and thinking
    on or off for each, by whole turns: each environment gets both.
    """
    numbers = range(step * count, (step + 1) * count)
    tasks = [environments[names[n % len(names)]].task(n, seed, "train") for n in numbers]
    turns = [n // len(names) for n in numbers]
    return tasks, [int((turn + 1) * thinking_share) > int(turn * thinking_share) for turn in turns]


def reinforce(model, optimizer, engine, tokenizer, environments, config, name, checkpoints, log, seed=0,
              thinking_share=1.0, quiet=False, threads=1):  # fmt: skip
    """Run `config.steps` steps of GRPO without KL, resuming from `checkpoints`. Ctrl-C saves and raises Interrupted.

    environments: {name: Environment}, of which `config.environments` take turns. thinking_share: share of prompts with
    thinking on. threads: how many share the samples of each update (`minglm.parallel.replicas`).
    """
    first, replicas = 0, Replicas(model, threads)
    if (state := checkpoints.load()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    steps = range(first, config.steps)
    bar = tqdm(steps, initial=first, total=config.steps, desc=name, unit="step", disable=quiet or None)
    with stop_between_steps() as stop:
        for step in bar:
            began = time.perf_counter()
            tasks, thinking = draw_tasks(environments, config.environments, config.prompts, seed, step, thinking_share)
            groups = rollout(
                engine, tokenizer, environments, tasks, config.samples, config, thinking, seed * 7919 + step
            )
            metrics = summarize(groups) | learn(model, optimizer, groups, config, tokenizer.pad, step, replicas)
            log.write(
                "rl", stage=name, step=step + 1, seconds=round(time.perf_counter() - began, 3), **metrics
            )  # fmt: skip
            bar.set_postfix_str(f"reward {metrics['reward']:.3f}, live {metrics['live_groups']:.0%}", refresh=False)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            try:
                stop()
            except Interrupted:
                checkpoints.save(state)
                raise
            if checkpoints.due():
                checkpoints.save(state)


def learn(model, optimizer, groups, config, pad, step, replicas=None):
    """Turn rewarded groups into optimizer steps, one per share of the rollout. Returns metrics for the log."""
    rewards_PG = torch.tensor([[float(reward(t, config.fault_penalty)) for t in group] for group in groups])
    valid_PG = torch.tensor([[t.score.status != "infrastructure" for t in group] for group in groups])
    advantage_PG = advantages(rewards_PG, config.normalize_std, valid_PG)
    live_P = live_groups(rewards_PG, valid_PG)
    metrics = {"live_groups": round(float(live_P.float().mean()), 4), "skipped": int(live_P.sum()) < 2}
    if metrics["skipped"]:
        return metrics
    pairs = [
        (segment, float(advantage_PG[p, g]))
        for p, group in enumerate(groups) if live_P[p]
        for g, trajectory in enumerate(group) if valid_PG[p, g]
        for segment in trajectory.segments
    ]  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = config.peak_lr * min(1.0, (step + 1) / WARMUP_STEPS)
    metrics["trained_tokens"] = sum(len(segment.tokens) for segment, _ in pairs)
    for part in range(min(config.updates_per_rollout, len(pairs))):
        metrics |= update(model, optimizer, pairs[part :: config.updates_per_rollout], config, pad, replicas=replicas)
    return metrics
