"""Make up the log of a run, with plausible curves: every kind of record that the report reads."""

import dataclasses
import math
import random

from minglm.report.records import (
    BitsPerByteRecord,
    ConversationsRecord,
    DataRecord,
    EndRecord,
    EvaluationRecord,
    MiningRecord,
    Moment,
    MTPAcceptanceRecord,
    PathologyRecord,
    RejectionRecord,
    RLRecord,
    SampleRecord,
    StageBeginRecord,
    StageEndRecord,
    StartRecord,
    StepRecord,
)

PRETRAINING = [
    ("general", "general text", 900_000, 64),
    ("code_reasoning", "code and reasoning", 420_000, 64),
    ("repository", "code across files", 150_000, 512),
    ("reasoning", "synthetic reasoning", 150_000, 512),
    ("long_agent", "long context, agents", 60_000, 2048),
]
EXPERTS = {
    "reasoning": ("reasoning", {"arithmetic": (0.42, 0.71), "code": (0.31, 0.35)}),
    "agent": ("agentic", {"retail": (0.55, 0.74), "functions": (0.6, 0.77)}),
    "chat": ("chat", {"instructions": (0.38, 0.62)}),
}
PATHOLOGIES = ("language_mixing", "repetition", "format")


def interval(share, n):
    """Return a normal interval of a share, good enough for a made-up log."""
    half = 1.96 * math.sqrt(max(share * (1 - share), 1e-4) / n)
    return max(0.0, share - half), min(1.0, share + half)


def by_problem(score, n):
    """Return scores of n problems whose mean is `score`: the same problems are the hard ones at every score."""
    return [min(1.0, max(0.0, n * score - number)) for number in range(n)]


def pathologies(stage, when, fault, flag, content, n=200):
    """Return the record of pathologies with these shares, in answers to n prompts of two kinds."""
    shares = {"fault": fault, "flag": flag, "content": content}
    low, high = interval(fault, n)
    return PathologyRecord(
        stage=stage,
        when=when,
        n=4 * n,
        low=low,
        high=high,
        incidence={"language_mixing": fault / 3, "repetition": 0.0, "format": fault, "any": fault},
        audit={"squeezed": 0.0, "strange": flag / 2, "unfinished": flag, "any": flag},
        content=content,
        by_kind={"provocation": shares, "constraints": shares},
        by_prompt={name: by_problem(share, n) for name, share in shares.items()},
    )


def evaluation(stage, env, group, thinking, score, n=200, valid_calls=None):
    """Return the record of a score, with avg@4 and pass@4."""
    low, high = interval(score, n)
    return EvaluationRecord(
        stage=stage,
        env=env,
        group=group,
        thinking=thinking,
        avg=score,
        low=low,
        high=high,
        pass_k=min(1, 1.3 * score),
        k=4,
        n=n,
        valid_calls=valid_calls,
        switch_ok=1.0,
        length=30.0 + 25 * thinking,
        by_problem=by_problem(score, n),
    )


def training(rng, stage, tokens, steps, seen, high, low, layers=3, late=False):
    """Yield the steps of one stage, with a loss that falls from high to low."""
    for i in range(steps):
        t = i / max(1, steps - 1)
        loss = low + (high - low) * math.exp(-5 * t) + rng.gauss(0, 0.05)
        worst = [
            1.1 + 0.25 * k + (0.2 if late else 1.5 * math.exp(-6 * t)) + abs(rng.gauss(0, 0.05))
            for k in range(layers)
        ]
        yield StepRecord(
            stage=stage,
            step=i,
            tokens=int(seen + tokens * (i + 1) / steps),
            batch_tokens=tokens // steps,
            tokens_per_second=round(9000 + rng.gauss(0, 200)),
            loss=loss,
            mtp_loss=loss + 0.6,
            balance_loss=1.01,
            learning_rate=1e-3,
            grad_norm=0.5 + 0.1 * rng.random(),
            mtp_weight=0.1 if late else 0.3,
            load_max_over_mean=worst,
            load_entropy=[0.98] * layers,
            dead_experts=0,
            bias_rate=0.0 if late else 0.001,
        )


def reinforcement(rng, stage, rewards, steps=60):
    """Yield the steps of one RL stage, with rewards that rise along a sigmoid."""
    for i in range(steps):
        t = 1 / (1 + math.exp(-8 * (i / steps - 0.45)))
        by_env = {
            env: min(1.0, max(0.0, a + (b - a) * t + rng.gauss(0, 0.04)))
            for env, (a, b) in rewards.items()
        }
        incidence = {}
        if stage == "pathology_rl":
            incidence = {name: 0.2 * (1 - t) + 0.01 for name in PATHOLOGIES}
        record = RLRecord(
            stage=stage,
            step=i,
            seconds=1.0,
            reward=sum(by_env.values()) / len(by_env),
            reward_by_env=by_env,
            length=28 + 12 * t + rng.gauss(0, 1),
            truncated=0.01,
            switch_ok=1.0,
            valid_calls=0.97,
            incidence=incidence,
            live_groups=max(0.1, 0.8 - 0.4 * t + rng.gauss(0, 0.05)),
            skipped=i % 9 == 8,
        )
        if (
            stage == "agent.rl"
        ):  # whose rollouts ran in a process of their own, half of a step ahead
            rollout = ["rollout 0", "generate", i - 0.5, i + 0.25]
            spans = [["trainer", "train", i, i + 0.25], rollout]
            record = dataclasses.replace(record, spans=spans, staleness=[10, 30])
        if not record.skipped:  # a step without two live groups has no update to tell of
            record = dataclasses.replace(
                record,
                ratio_max=1.3,
                clip_share=0.02,
                entropy=0.6 - 0.3 * t,
                grad_norm=0.4,
                gap_mean=2e-6,
                gap_p99=8e-6,
                gap_worst=3e-5,
                gap_kl=4e-12,
            )
        yield record


def stage_end(stage, seconds, tokens, evaluation_seconds=0.0):
    """Return the record of the end of a stage."""
    return StageEndRecord(
        stage=stage, tokens=tokens, seconds=seconds, evaluation_seconds=evaluation_seconds
    )


def pretraining_records(rng):
    """Yield the five stages of pre- and mid-training, then scores of the base model."""
    seen, high = 0, 6.2
    for number, (stage, teaches, tokens, length) in enumerate(PRETRAINING):
        yield StageBeginRecord(
            stage=stage, teaches=teaches, tokens=tokens, sequence_length=length, learning_rate=1e-3
        )
        low = high - 1.6 / (number + 1)
        yield from training(rng, stage, tokens, tokens // 10_000, seen, high, low, late=number > 0)
        seen = seen + tokens
        high = high - 1.4 / (number + 1)
        yield stage_end(stage, tokens / 9000, tokens)
    for source in ("prose", "code"):
        yield BitsPerByteRecord(stage="long_agent", source=source, value=1.6 + rng.random() / 5)
    yield MTPAcceptanceRecord(stage="long_agent", value=0.58)


def posttraining_records(rng):
    """Yield scores of the base, then experts, unified model, general and pathology RL, with scores after each."""
    for group, envs in EXPERTS.values():
        calls = 0.97 if group == "agentic" else None
        for env, (before, _) in envs.items():
            yield evaluation("long_agent", env, group, True, 0.9 * before, valid_calls=calls)
    for expert, (group, envs) in EXPERTS.items():
        calls = 0.97 if group == "agentic" else None
        yield StageBeginRecord(
            stage=f"{expert}.sft",
            teaches="cold start",
            tokens=200_000,
            sequence_length=256,
            learning_rate=5e-4,
        )
        yield from training(rng, f"{expert}.sft", 200_000, 40, 0, 2.4, 0.9, late=True)
        yield stage_end(f"{expert}.sft", 25.0, 200_000)
        for env, (before, _) in envs.items():
            yield evaluation(f"{expert}.sft", env, group, True, before, valid_calls=calls)
        yield from reinforcement(rng, f"{expert}.rl", dict(list(envs.items())[:1]))
        yield stage_end(f"{expert}.rl", 70.0, 0, 9.0)
        for env, (_, after) in envs.items():
            yield evaluation(f"{expert}.rl", env, group, True, after, valid_calls=calls)
        for env, (before, _) in list(envs.items())[:1]:
            yield evaluation(
                f"{expert}.control", env, group, True, before + 0.02, valid_calls=calls
            )
        yield stage_end(f"{expert}.control", 60.0, 300_000)
    yield RejectionRecord(
        counts={
            "reasoning, code: answers": 4000,
            "reasoning, code: correct": 1300,
            "agent, retail: answers": 800,
            "agent, retail: correct": 12,
        }
    )
    yield ConversationsRecord(
        stage="unified",
        examples={"code": 900, "retail": 800},
        too_long={"retail": 35},
        tokens={"code": 60_000, "retail": 180_000},
    )
    yield from training(rng, "unified", 400_000, 60, 0, 2.2, 0.8, late=True)
    yield stage_end("unified", 60.0, 400_000)
    yield from everywhere("unified", 0.99)
    yield from reinforcement(
        rng, "general_rl", {env: v for _, envs in EXPERTS.values() for env, v in envs.items()}
    )
    yield stage_end("general_rl", 80.0, 300_000)
    yield pathologies("general_rl", Moment.BEFORE, 0.42, 0.5, 0.3)
    yield MiningRecord(
        stage="pathology_rl",
        asked={"provocation": 200, "constraints": 200},
        provoking={"constraints": 90},
        answers=1600,
        faulty=0.1,
        seconds=4.0,
    )
    yield from reinforcement(rng, "pathology_rl", {"instructions": (0.5, 0.93)})
    yield stage_end("pathology_rl", 30.0, 90_000)
    yield pathologies("pathology_rl", Moment.AFTER, 0.03, 0.25, 0.3)
    yield from everywhere("pathology_rl", 0.98)


def everywhere(stage, share):
    """Yield scores on every task, as a share of the expert's, with thinking and (lower) without."""
    for group, envs in EXPERTS.values():
        for env, (_, best) in envs.items():
            calls = 0.985 if group == "agentic" else None
            yield evaluation(stage, env, group, True, share * best, valid_calls=calls)
            yield evaluation(stage, env, group, False, 0.6 * best, valid_calls=calls)


def fake_log(seed=0):
    """Return all records of a made-up run, in the order the pipeline writes them."""
    rng = random.Random(seed)
    versions = {
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "device": "cpu",
        "threads": 2,
        "commit": "0123456789ab",
    }
    cleaning = {
        "exact_copies": 3,
        "decontamination": {"n": 13, "removed": {"prose": 2, "qa": 16}},
        "near_duplicates": {"code": 5},
        "lowest_quality": {"prose": 7},
        "repeated": {"prose": 8},
    }
    text = "<|user|>\n3 + 4 * 2 = ?<|assistant|>\n<think>4 * 2 = 8; 3 + 8 = 11</think>\n11<|user|>"
    return [
        StartRecord(config_hash="abcdef012345", name="toy", seed=seed, versions=versions),
        DataRecord(
            tokens={"prose": 1_200_000, "code": 2_300_000},
            documents=9000,
            cleaning=cleaning,
            seconds=20,
            skipped=11,
            skipped_log="data/documents/skipped.log",
        ),
        *pretraining_records(rng),
        *posttraining_records(rng),
        SampleRecord(stage="pathology_rl", title="thinking", text=text),
        SampleRecord(stage="pathology_rl", title="fences inside", text="```py\n1\n```"),
        EndRecord(seconds=812.0),
    ]
