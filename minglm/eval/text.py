"""Scores of a checkpoint: tasks by avg@k and pass@k with intervals, bits per byte, MTP acceptance (paper 4).

    avg@k = mean over problems of the mean over k answers;   pass@k = share of problems with a right answer among k
    bits per byte = sum over tokens of -log2 p / bytes of text;   acceptance = mean of sum_v min(p_v, q_v)

Problems are from the test split, which no training stage sees, and all different. The interval is over problems, not
answers, because the answers to one problem are not independent. Bits per byte does not depend on the tokenizer. The
acceptance is the probability that a token drafted by the MTP layer (q) survives the speculative test against the trunk
(p).
"""

import math
from statistics import fmean

import torch

from minglm.data.packing import fill
from minglm.model.mtp import targets
from minglm.rewards.pathology import FAULTS, detect
from minglm.rl.curriculum import interval, pass_at_k
from minglm.rl.rollout import rollout

TEST_SEED = 20_250_728  # problems are the same for every run and stage; the paper's release day


def tasks(engine, tokenizer, environment, config, thinking=True, seed=0):
    """Play held-out tasks of one environment.

    config: EvaluationConfig. Returns (record, trajectories): the record has avg, its interval low and high, pass_k, k,
    n, valid_calls (share of tool calls without a format fault, or None), switch_ok (share of answers that obey the
    thinking switch) and length (mean tokens produced).
    """
    problems = environment.test_tasks(config.problems, TEST_SEED)
    groups = rollout(
        engine, tokenizer, {environment.name: environment}, problems, config.samples, config,
        [thinking] * len(problems), seed,
    )  # fmt: skip
    everything = [t for group in groups for t in group]
    means = [fmean(t.score.value for t in group) for group in groups]
    low, high = interval(means)
    calls = sum(t.score.parts.get("calls", 0) for t in everything)
    valid = sum(t.score.parts.get("valid_calls", 0) for t in everything)
    return {
        "env": environment.name,
        "group": environment.group,
        "thinking": thinking,
        "avg": fmean(means),
        "low": low,
        "high": high,
        "pass_k": fmean(pass_at_k(len(g), sum(t.score.value >= 1 for t in g), len(g)) for g in groups),
        "k": config.samples,
        "n": len(problems),
        "valid_calls": valid / calls if calls and environment.tools() else None,
        "switch_ok": fmean(t.switch_obeyed for t in everything),
        "length": fmean(t.length for t in everything),
    }, everything


def faults(trajectories):
    """Incidence of each pathology in the last turns of provocation episodes, and the interval of any of them."""
    flags = [detect(t.texts[-1], t.task.label) for t in trajectories]
    found = {name: fmean(flag[name] for flag in flags) for name in FAULTS}
    any_fault = [float(any(flag.values())) for flag in flags]
    by_task = {}
    for trajectory, fault in zip(trajectories, any_fault, strict=True):
        by_task.setdefault(trajectory.task.id, []).append(fault)
    low, high = interval([fmean(values) for values in by_task.values()])
    return {"incidence": found | {"any": fmean(any_fault)}, "n": len(flags), "low": low, "high": high}


def _rows(documents, length, limit):
    """Documents cut into rows of `length` tokens, at most `limit` tokens in all, each row one span."""
    spans = [d[at : at + length] for d in documents for at in range(0, len(d), length)]
    spans = [span for span in spans if len(span) > 2][: max(1, limit // length)]
    return fill([[(span, None)] for span in spans], length, separate=True) if spans else None


@torch.inference_mode()
def bits_per_byte(model, tokenizer, documents, length, limit):
    """Bits per byte of the text of `documents` (arrays of ids), in rows of `length` tokens, up to `limit` tokens."""
    batch = _rows(documents, length, limit)
    nats = count = 0
    for part in batch.split(max(1, 8192 // length)):
        part = part.to(model.lm_head.weight.device)
        log_p = model(part.tokens_BS, part.positions_BS, part.documents_BS).float().log_softmax(-1)
        target_BS, counts_BS = targets(part.tokens_BS, part.mask_BS, part.documents_BS, 1)
        nats -= log_p.gather(2, target_BS[..., None])[..., 0][counts_BS].sum().item()
        predicted = part.tokens_BS[part.mask_BS].tolist()
        count += len(tokenizer.bytes(predicted, skip_special=True))
    return nats / math.log(2) / max(1, count)


@torch.inference_mode()
def mtp_acceptance(model, documents, length, limit):
    """Mean over positions of sum_v min(p, q): trunk and MTP layer, each guessing the token two positions on."""
    batch = _rows(documents, length, limit)
    overlap = count = 0.0
    for part in batch.split(max(1, 8192 // length)):
        part = part.to(model.lm_head.weight.device)
        out = model.hidden(part.tokens_BS, part.positions_BS, part.documents_BS, mtp=True)
        p = model.head(out.hidden_BSD[:, 1:]).float().softmax(-1)  # at t + 1, for token t + 2
        q = model.head(out.mtp_hidden_BSD[:, :-1]).float().softmax(-1)
        counts = targets(part.tokens_BS, part.mask_BS, part.documents_BS, 2)[1][:, :-1]
        overlap += torch.minimum(p, q).sum(-1)[counts].sum().item()
        count += int(counts.sum())
    return overlap / max(1.0, count)
