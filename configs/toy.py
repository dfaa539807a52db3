"""The main job: all of GLM-4.5 in minutes on two CPU cores (1.7 M parameters).

The stages have the paper's order and its ratios of sequence length (x8, then x4). Mid-training is longer than the
paper's 5% because a model this small has to learn its tasks there.
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
    RewardConfig,
    RLConfig,
    RunConfig,
    SFTConfig,
    StageConfig,
    StagesConfig,
)

LONG_ROPE_THETA = 1_000_000.0
"""Rotary base of the stages with long rows, as in the paper (10,000 before)."""


def toy() -> RunConfig:
    """Configure 1.7 M parameters, 2 CPU cores, minutes."""
    return RunConfig(
        name="toy",
        model=model(),
        data=DataConfig(
            corpus_megabytes=6.0,
            fim_rate=0.3,
            fim_characters=250,  # so that a rewritten span fits into a row
            synthetic_documents=6000,
            trajectories=7000,
        ),
        stages=stages(),
        optimizer=OptimizerConfig(
            peak_lr=2e-2,  # Muon on matrices this small takes a large step
            warmup_tokens=40_000,
            batch_tokens_start=1024,
            batch_tokens_end=2048,
            batch_ramp_tokens=350_000,  # all of the first stage
            microbatch_tokens=4096,
        ),
        posttraining=PostTrainingConfig(
            reasoning=reasoning_expert(),
            agent=agent_expert(),
            chat=chat_expert(),
            unified=SFTConfig(
                samples=10_000,
                epochs=2.0,
                batch_tokens=4096,
                sequence_length=512,
                peak_lr=4e-3,
            ),
            # What a cold start can nearly do, and what it seldom can.
            asked=("arithmetic:4,5x3", "search:short:2-3"),
            # Five steps in one sum of nine, three hops in two questions of seven.
            shown=("arithmetic:1-4x8,5x4", "search:short:1x2,2x3,3x2"),
            prompts_per_environment=1500,
            responses_per_prompt=1,
            drop_shortest=0.0,  # the gain was measured on large models, and prompts are few here
            general_rl=general_rl(),
            pathology_rl=pathology_rl(),
        ),
        evaluation=EvaluationConfig(
            problems=200,
            brief_problems=50,
            provoking_problems=100,
            samples=4,
            max_new_tokens=80,
            heldout_tokens=10_000,
        ),
    )


def model() -> ModelConfig:
    """Configure 1 dense and 3 MoE layers, 4 heads of 48, 16 experts of which 4 and a shared one process each token."""
    return ModelConfig(
        vocab_size=2048,
        hidden_size=96,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,  # QK-Norm bounds a score by the root of it, and narrower heads learn to copy later
        rope_theta=LONG_ROPE_THETA,
        intermediate_size=288,
        moe_intermediate_size=48,
        n_routed_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=4096,
        initializer_range=0.06,  # larger than 0.02, because the width is small
    )


def stages() -> StagesConfig:
    """Configure the five stages of pre- and mid-training; solved tasks are sources of the last two."""
    return StagesConfig(
        general=StageConfig(
            teaches="prose, code, facts",
            tokens=350_000,
            sequence_length=128,
            mixture={"prose": 3, "code": 3, "qa": 2, "science": 1, "math": 1, "digit_copies": 5},
            packing=Packing.BEST_FIT,  # what a row of digits copies must not be in another document
        ),
        code_reasoning=StageConfig(
            teaches="code and mathematics",
            tokens=200_000,
            sequence_length=128,
            mixture={"code": 4, "math": 4, "qa": 1, "science": 1, "copies": 8},
            packing=Packing.BEST_FIT,
        ),
        repository=StageConfig(
            teaches="code across files",
            tokens=60_000,
            sequence_length=1024,
            mixture={"repository": 3, "code": 1},
            packing=Packing.BEST_FIT,
            rope_theta=LONG_ROPE_THETA,
        ),
        reasoning=StageConfig(
            teaches="worked solutions",
            tokens=1_500_000,
            sequence_length=1024,
            mixture={
                "tasks:arithmetic": 4,
                "tasks:instructions": 5,
                "tasks:code": 3,
                "tasks:search:short": 7,
                "tasks:retail": 4,
                "tasks:provocation": 1,
                "qa": 1,
                "prose": 1,
                "code": 1,
            },
            packing=Packing.BEST_FIT,
            rope_theta=LONG_ROPE_THETA,
        ),
        long_agent=StageConfig(
            teaches="long documents, agents",
            tokens=300_000,
            sequence_length=4096,
            mixture={
                "tasks:search:short": 3,
                "tasks:retail": 2,
                "long": 1,
                "tasks:arithmetic": 3,
                "tasks:instructions": 4,
                "tasks:provocation": 1,
                "tasks:code": 1,
                "prose": 1,
                "code": 1,
            },
            packing=Packing.BEST_FIT,
            rope_theta=LONG_ROPE_THETA,
        ),
    )


def reasoning_expert() -> ExpertConfig:
    """Configure the expert for sums and code."""
    return ExpertConfig(
        environments=("arithmetic", "code"),
        sft=SFTConfig(
            samples=400,
            epochs=2.0,
            batch_tokens=2048,
            sequence_length=512,
            peak_lr=3e-3,
        ),
        rl=RLConfig(
            environments=("arithmetic",) * 3 + ("code",),
            steps=80,
            prompts=16,
            samples=8,
            max_new_tokens=72,
            max_turns=1,
            peak_lr=8e-4,
            curriculum=CurriculumConfig(
                pool=600,  # with 200 the same sums return too often, and are learned by heart
                search=8,
                moderate_lowest=0.1,  # one right answer of eight
                moderate_share=0.75,
                guard_problems=40,
            ),
            dynamic_temperature=DynamicTemperatureConfig(
                window=15, gain=0.02, spacing=0.2, problems=60
            ),
        ),
    )


def agent_expert() -> ExpertConfig:
    """Configure the expert for tool calls in several turns."""
    return ExpertConfig(
        environments=("search:short", "retail"),
        sft=SFTConfig(
            samples=100,
            epochs=2.0,
            batch_tokens=4096,
            sequence_length=512,
            peak_lr=2e-3,
        ),
        rl=RLConfig(
            environments=("search:short",) * 3 + ("retail",),
            steps=30,
            prompts=12,
            samples=8,
            max_new_tokens=48,
            max_turns=8,
            peak_lr=8e-4,
            normalize_std=False,
        ),
        distilled=2.0,
    )


def chat_expert() -> ExpertConfig:
    """Configure the expert for following instructions."""
    return ExpertConfig(
        environments=("instructions",),
        sft=SFTConfig(
            samples=2000,
            epochs=1.0,
            batch_tokens=4096,
            sequence_length=512,
            peak_lr=3e-3,
        ),
        rl=RLConfig(
            environments=("instructions",),
            reward=RewardConfig(critic=0.5),  # half of the constraints earn something
            steps=120,
            prompts=24,
            samples=8,
            max_new_tokens=40,
            max_turns=1,
            peak_lr=8e-4,  # twice as much moves faster at first, and then no further
        ),
        distilled=5.0,
    )


def general_rl() -> RLConfig:
    """Configure RL of the unified model on all tasks."""
    return RLConfig(
        environments=("arithmetic", "search:short", "retail", "instructions"),
        steps=12,
        prompts=12,
        samples=8,
        max_new_tokens=72,
        max_turns=8,
        peak_lr=2e-4,
        fault_penalty=1.0,
    )


def pathology_rl() -> RLConfig:
    """Configure RL against language mixing, loops and broken format; some other tasks keep what was learned."""
    return RLConfig(
        # Environments take turns, so a repeated name has more prompts.
        environments=("arithmetic",) * 2 + ("instructions",) * 2 + ("retail",),
        mining=MiningConfig(
            kinds=(
                "constraints:4-5",
            ),  # longer than any request that it has seen, and of other kinds
            pool=300,
        ),
        steps=46,
        prompts=16,
        samples=8,
        max_new_tokens=72,
        max_turns=8,
        peak_lr=5e-4,
        fault_penalty=1.0,
    )
