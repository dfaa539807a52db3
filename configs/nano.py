"""The whole recipe in about a minute, for tests and for a first look: too small and too short to learn its tasks."""

from minglm.config import (
    DataConfig,
    EvaluationConfig,
    ExpertConfig,
    MiningConfig,
    ModelConfig,
    OptimizerConfig,
    Packing,
    PostTrainingConfig,
    RewardConfig,
    RLConfig,
    RunConfig,
    SFTConfig,
    StageConfig,
    StagesConfig,
)

LONG_ROPE_THETA = 1_000_000.0
"""Rotary base of the stages with long rows, as in the paper (10,000 before)."""


def nano() -> RunConfig:
    """Configure 0.2 M parameters, one CPU core, about a minute."""
    return RunConfig(
        name="nano",
        model=model(),
        data=DataConfig(
            corpus_megabytes=0.3,
            fim_rate=0.3,
            fim_characters=150,  # so that a rewritten span fits into a row
            synthetic_documents=200,
            trajectories=100,
        ),
        stages=stages(),
        optimizer=OptimizerConfig(
            peak_lr=2e-2,  # Muon on matrices this small takes a large step
            warmup_tokens=4_000,
            batch_tokens_start=1024,
            batch_tokens_end=2048,
            batch_ramp_tokens=30_000,
            microbatch_tokens=2048,
        ),
        posttraining=posttraining(),
        evaluation=EvaluationConfig(
            problems=4,
            provoking_problems=4,
            samples=2,
            max_new_tokens=24,
            heldout_tokens=2_000,
        ),
    )


def model() -> ModelConfig:
    """Configure 1 dense and 1 MoE layer, 4 heads of 16, 8 experts of which 2 and a shared one process each token."""
    return ModelConfig(
        vocab_size=512,
        hidden_size=48,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        initializer_range=0.06,  # larger than 0.02, because the width is small
    )


def stages() -> StagesConfig:
    """Configure the five stages of pre- and mid-training."""
    return StagesConfig(
        general=StageConfig(
            teaches="prose, code, facts",
            tokens=60_000,
            sequence_length=64,
            mixture={"prose": 2, "code": 2, "qa": 1, "science": 1},
        ),
        code_reasoning=StageConfig(
            teaches="code and mathematics",
            tokens=28_000,
            sequence_length=64,
            mixture={"code": 1, "math": 1},
        ),
        repository=StageConfig(
            teaches="code across files",
            tokens=8_000,
            sequence_length=512,
            mixture={"repository": 1},
            packing=Packing.BEST_FIT,
            rope_theta=LONG_ROPE_THETA,
        ),
        reasoning=StageConfig(
            teaches="worked solutions",
            tokens=8_000,
            sequence_length=512,
            mixture={
                "tasks:arithmetic": 2,
                "tasks:instructions": 1,
                "tasks:code": 1,
                "math": 1,
            },
            packing=Packing.BEST_FIT,
            rope_theta=LONG_ROPE_THETA,
        ),
        long_agent=StageConfig(
            teaches="long documents, agents",
            tokens=8_000,
            sequence_length=2048,
            mixture={"tasks:retail": 1, "long": 1},
            packing=Packing.BEST_FIT,
            rope_theta=LONG_ROPE_THETA,
        ),
    )


def posttraining() -> PostTrainingConfig:
    """Configure three experts, the unified model, and two stages of RL: two steps each."""
    cold_start = SFTConfig(
        samples=8,
        epochs=1.0,
        batch_tokens=1024,
        sequence_length=1024,
        peak_lr=5e-3,
    )
    short = {"steps": 2, "prompts": 2, "samples": 2, "max_new_tokens": 24}
    return PostTrainingConfig(
        reasoning=ExpertConfig(
            environments=("arithmetic", "code"),
            sft=cold_start,
            rl=RLConfig(environments=("arithmetic",), **short),
        ),
        agent=ExpertConfig(
            environments=("retail",),
            sft=cold_start,
            rl=RLConfig(environments=("retail",), max_turns=2, normalize_std=False, **short),
        ),
        chat=ExpertConfig(
            environments=("instructions",),
            sft=cold_start,
            rl=RLConfig(
                environments=("instructions", "constraints"),
                reward=RewardConfig(
                    critic=1.0, rubric=0.5, reward_model=1.0, pairs=16, pairs_lr=1e-3
                ),
                **short,
            ),
        ),
        unified=SFTConfig(
            samples=64,
            epochs=1.0,
            batch_tokens=1024,
            sequence_length=1024,
            peak_lr=5e-3,
        ),
        prompts_per_environment=4,
        responses_per_prompt=2,
        drop_shortest=0.0,  # the gain was measured on large models, and prompts are few here
        general_rl=RLConfig(
            environments=("arithmetic", "retail", "instructions", "functions"), max_turns=2, **short
        ),
        pathology_rl=RLConfig(
            environments=("arithmetic",),
            mining=MiningConfig(kinds=("provocation", "constraints:4-5"), pool=4, answers=1),
            fault_penalty=1.0,
            **short,
        ),
    )
