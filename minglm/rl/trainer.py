"""The synchronous, co-located loop: roll out, reward, update, with one set of weights (paper 3.2, 3.5).

    for each step:  tasks -> P x G episodes -> advantages within each group -> clipped policy gradient, no KL

Groups whose samples all got the same reward carry no signal and are left out before any gradient is computed; with
fewer than two live groups the step is skipped, because an optimizer that normalises would turn noise into a full-size
step. The gradient is computed in micro-batches of similar length with one denominator counted over the whole batch.
The MTP layer and the router's selection bias stay as they are. Every draw follows from the seed and the step, so a
resumed run repeats nothing and needs no random state.
"""

import math

import torch

from minglm.parallel.replicas import Replicas
from minglm.rewards.shaping import shaped_reward
from minglm.rl.aggregation import aggregate, denominator
from minglm.rl.grpo import advantages, live_groups, policy_loss

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
    logprobs_T, entropy_T = model.lm_head.token_log_probabilities(
        hidden_TD, tokens_BS[:, 1:][before_BS], temperature
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
    replicas, device = replicas or Replicas(model), model.device
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
    found = replicas.run(
        work, [pairs[i::count] for i in range(count)]
    )  # each gets short and long ones
    metrics = {
        key: (max if key == "ratio_max" else sum)(part[key] for part in found) for key in found[0]
    }
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if math.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm, norm)
        optimizer.step()
    optimizer.zero_grad()
    return metrics | {"grad_norm": float(norm)}


def reward(trajectory, fault_penalty):
    """Return the score of a trajectory, less the penalty if it has a fault."""
    flags = trajectory.faults() if fault_penalty else {}
    return shaped_reward(trajectory.score.value, flags, trajectory.switch_obeyed, fault_penalty)


def learn(model, optimizer, groups, config, pad, step, replicas=None):
    """Turn rewarded groups into optimizer steps, one per share of the rollout. Returns metrics for the log."""
    rewards_PG = torch.tensor(
        [[reward(t, config.fault_penalty) for t in group] for group in groups], dtype=torch.float32
    )
    valid_PG = torch.tensor([[t.valid for t in group] for group in groups])
    advantage_PG = advantages(rewards_PG, config.normalize_std, valid_PG)
    live_P = live_groups(rewards_PG, valid_PG)
    metrics = {
        "live_groups": round(float(live_P.float().mean()), 4),
        "skipped": int(live_P.sum()) < 2,
    }
    if metrics["skipped"]:
        return metrics
    pairs = [
        (segment, float(advantage_PG[p, g]))
        for p, group in enumerate(groups)
        if live_P[p]
        for g, trajectory in enumerate(group)
        if valid_PG[p, g]
        for segment in trajectory.segments
    ]
    for group in optimizer.param_groups:
        group["lr"] = config.peak_lr * min(1.0, (step + 1) / WARMUP_STEPS)
    metrics["trained_tokens"] = sum(len(segment.tokens) for segment, _ in pairs)
    for part in range(min(config.updates_per_rollout, len(pairs))):
        metrics |= update(
            model,
            optimizer,
            pairs[part :: config.updates_per_rollout],
            config,
            pad,
            replicas=replicas,
        )
    return metrics
