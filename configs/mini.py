"""The whole recipe on one GPU: GLM-4.5 with every width divided by eight, 0.8 B parameters, for your own corpus.

    python -m minglm plan configs/mini.py
    python -m minglm run configs/mini.py --data.files /path/to/text /path/to/code

An eighth of GLM-4.5 in width, heads, FFN, experts and depth. It keeps the width of a head, 160 experts of which 8 and a
shared one process each token, QK-norm, and the stages' ratio of tokens and their lengths. It is planned for a night on
an 80 GB GPU with Triton kernels and recomputed layers. Learning rate, warm-up and batch size are guesses by scale that
nobody has tried at this size: watch `grad_norm` and `left_out` for the first hour. Tasks and their lengths are the toy's.
"""

from minglm.config import (
    CurriculumConfig,
    DataConfig,
    DynamicTemperatureConfig,
    EvaluationConfig,
    ExpertConfig,
    MiningConfig,
    ModelConfig,
    OptimizerConfig,
    Packing,
    PostTrainingConfig,
    Precision,
    RewardConfig,
    RLConfig,
    RunConfig,
    SFTConfig,
    StageConfig,
    StagesConfig,
)

LONG_ROPE_THETA = 1_000_000.0
"""Rotary base of the stages with long rows, as in the paper (10,000 before)."""


def mini() -> RunConfig:
    """Configure 0.8 B parameters for one 80 GB GPU."""
    return RunConfig(
        name="mini",
        model=model(),
        data=DataConfig(
            corpus_megabytes=20_000.0,
            near_duplicates=0.7,
            synthetic_documents=200_000,
            trajectories=200_000,
        ),
        stages=stages(),
        optimizer=OptimizerConfig(
            peak_lr=2e-3,
            warmup_tokens=60_000_000,
            batch_tokens_start=262_144,
            batch_tokens_end=1_048_576,
            batch_ramp_tokens=130_000_000,
            microbatch_tokens=131_072,  # one row of the longest stage
            spike_factor=20.0,  # a run without supervision skips spikes
            rollback_after=20,
        ),
        posttraining=posttraining(),
        evaluation=EvaluationConfig(max_new_tokens=4096, every_tokens=250_000_000),
        dtype=Precision.BFLOAT16,
        recompute=True,
    )


def model() -> ModelConfig:
    """Configure 1 dense and 11 MoE layers, 12 heads of 128 that share one key/value head, 160 experts."""
    return ModelConfig(
        vocab_size=32_768,
        hidden_size=640,
        num_hidden_layers=12,
        first_k_dense_replace=1,
        num_attention_heads=12,
        num_key_value_heads=1,
        intermediate_size=1536,
        moe_intermediate_size=192,
    )


def stages() -> StagesConfig:
    """Configure the five stages of pre- and mid-training, 6 B tokens in all."""
    return StagesConfig(
        general=StageConfig(
            teaches="prose, code, facts",
            tokens=3_900_000_000,
            sequence_length=4096,
            mixture={"prose": 6, "code": 3, "qa": 0.2, "science": 0.1, "math": 0.1},
        ),
        code_reasoning=StageConfig(
            teaches="code and mathematics",
            tokens=1_820_000_000,
            sequence_length=4096,
            mixture={"code": 6, "prose": 3, "math": 1},
        ),
        repository=StageConfig(
            teaches="code across files",
            tokens=130_000_000,
            sequence_length=32_768,
            mixture={"repository": 3, "code": 1},
            packing=Packing.BEST_FIT,
            rope_theta=LONG_ROPE_THETA,
        ),
        reasoning=StageConfig(
            teaches="worked solutions",
            tokens=130_000_000,
            sequence_length=32_768,
            mixture={
                "tasks:arithmetic": 2,
                "tasks:instructions": 2,
                "tasks:code": 2,
                "tasks:retail": 2,
                "tasks:provocation": 0.5,
                "prose": 2,
                "code": 2,
            },
            packing=Packing.BEST_FIT,
            rope_theta=LONG_ROPE_THETA,
        ),
        long_agent=StageConfig(
            teaches="long documents, agents",
            tokens=26_000_000,
            sequence_length=131_072,
            mixture={"tasks:retail": 3, "long": 3, "repository": 2, "prose": 2},
            packing=Packing.BEST_FIT,
            rope_theta=LONG_ROPE_THETA,
        ),
    )


def posttraining() -> PostTrainingConfig:
    """Configure three experts, the unified model, and two stages of RL."""
    cold_start = SFTConfig(
        samples=20_000,
        epochs=2.0,
        batch_tokens=131_072,
        sequence_length=8192,
        peak_lr=2e-4,
    )
    rollouts = {"prompts": 32, "samples": 16, "max_new_tokens": 2048}
    return PostTrainingConfig(
        reasoning=ExpertConfig(
            environments=("arithmetic", "science", "logic", "code"),
            sft=cold_start,
            rl=RLConfig(
                environments=("arithmetic", "science", "logic", "code"),
                steps=200,
                peak_lr=5e-6,
                # Screening costs the answers of about 30 steps, and each probe of the temperature those of 12.
                curriculum=CurriculumConfig(pool=300, search=16),
                dynamic_temperature=DynamicTemperatureConfig(
                    window=20, spacing=0.2, problems=100, samples=4
                ),
                **rollouts,
            ),
        ),
        agent=ExpertConfig(
            environments=("search", "retail", "functions", "swe"),
            sft=cold_start,
            rl=RLConfig(
                environments=("search", "retail", "functions", "swe"),
                steps=200,
                max_turns=16,
                peak_lr=5e-6,
                normalize_std=False,
                **rollouts,
            ),
        ),
        chat=ExpertConfig(
            environments=("instructions", "constraints"),
            sft=cold_start,
            rl=RLConfig(
                environments=("instructions", "constraints"),
                reward=RewardConfig(critic=1.0, rubric=0.5, reward_model=1.0),
                steps=200,
                peak_lr=5e-6,
                **rollouts,
            ),
        ),
        unified=SFTConfig(
            samples=100_000,
            epochs=2.0,
            batch_tokens=131_072,
            sequence_length=8192,
            peak_lr=2e-4,
        ),
        prompts_per_environment=20_000,
        responses_per_prompt=2,
        drop_shortest=0.0,  # the gain was measured on large models, and prompts are few here
        general_rl=RLConfig(
            environments=("arithmetic", "instructions", "constraints", "retail", "functions"),
            steps=100,
            max_turns=8,
            peak_lr=2e-6,
            **rollouts,
        ),
        pathology_rl=RLConfig(
            environments=("arithmetic", "instructions"),
            mining=MiningConfig(kinds=("provocation", "constraints:4-5"), pool=2000),
            steps=50,
            fault_penalty=1.0,
            peak_lr=2e-6,
            **rollouts,
        ),
    )
