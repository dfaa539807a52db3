"""The main job: all of GLM-4.5 in minutes on two CPU cores (1.7 M parameters).

The stages have the paper's order and its ratios of sequence length (x8, then x4). Mid-training is longer than the
paper's 5% because a model this small has to learn its tasks there.
"""

from minglm.config import (
    BalanceConfig,
    DataConfig,
    EvaluationConfig,
    ExpertConfig,
    ModelConfig,
    OptimizerConfig,
    PostTrainingConfig,
    RLConfig,
    RunConfig,
    SFTConfig,
    StageConfig,
    StagesConfig,
)


def toy():
    """1.7 M parameters, 2 CPU cores, minutes."""
    return RunConfig(
        name="toy",
        model=ModelConfig(
            vocab_size=2048,
            hidden_size=96,
            num_hidden_layers=4,
            first_k_dense_replace=1,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=24,
            rope_theta=1_000_000.0,
            intermediate_size=288,
            moe_intermediate_size=48,
            n_routed_experts=16,
            num_experts_per_tok=4,
            max_position_embeddings=4096,
            initializer_range=0.06,
        ),
        data=DataConfig(
            corpus_megabytes=6.0,
            fim_rate=0.3,
            fim_characters=250,
            synthetic_documents=6000,
            trajectories=9000,
        ),
        stages=StagesConfig(
            general=StageConfig(
                "prose, code, facts",
                330_000,
                128,
                {"prose": 3, "code": 3, "qa": 2, "science": 1, "math": 1},
            ),
            code_reasoning=StageConfig(
                "code and mathematics", 155_000, 128, {"code": 4, "math": 4, "qa": 1, "science": 1}
            ),
            repository=StageConfig(
                "code across files",
                60_000,
                1024,
                {"repository": 3, "code": 1},
                "best_fit",
                1_000_000.0,
            ),
            reasoning=StageConfig(
                "worked solutions",
                1_000_000,
                1024,
                {
                    "tasks:arithmetic": 5,
                    "tasks:instructions": 6,
                    "tasks:code": 2,
                    "tasks:retail": 6,
                    "tasks:provocation": 1,
                    "qa": 1,
                    "prose": 1,
                    "code": 1,
                },
                "best_fit",
                1_000_000.0,
            ),
            long_agent=StageConfig(
                "long documents, agents",
                350_000,
                4096,
                {
                    "tasks:retail": 4,
                    "long": 1,
                    "tasks:arithmetic": 3,
                    "tasks:instructions": 4,
                    "tasks:provocation": 1,
                    "tasks:code": 1,
                    "prose": 1,
                    "code": 1,
                },
                "best_fit",
                1_000_000.0,
            ),
        ),
        optimizer=OptimizerConfig(
            peak_lr=2e-2,
            warmup_tokens=40_000,
            batch_tokens_start=1024,
            batch_tokens_end=2048,
            batch_ramp_tokens=330_000,
            microbatch_tokens=4096,
        ),
        balance=BalanceConfig(),
        posttraining=PostTrainingConfig(
            reasoning=ExpertConfig(
                ("arithmetic", "code"),
                SFTConfig(400, 2.0, 2048, 512, 3e-3),
                truncated_reasoning_share=0.6,
                rl=RLConfig(("arithmetic",), 42, 16, 8, 72, 1, peak_lr=3e-4),
            ),
            agent=ExpertConfig(
                ("retail",),
                SFTConfig(100, 2.0, 4096, 512, 2e-3),
                RLConfig(("retail",), 14, 6, 8, 48, 8, peak_lr=5e-4, normalize_std=False),
                distilled=2.0,
            ),
            chat=ExpertConfig(
                ("instructions",),
                SFTConfig(2000, 1.0, 4096, 512, 3e-3),
                RLConfig(("instructions",), 24, 16, 8, 64, 1, peak_lr=4e-4),
                distilled=2.5,
            ),
            unified=SFTConfig(10_000, 3.0, 4096, 512, 4e-3),
            prompts_per_environment=3000,
            responses_per_prompt=1,
            pathology_samples=600,
            general_rl=RLConfig(
                ("arithmetic", "retail", "instructions"),
                12,
                12,
                8,
                72,
                8,
                peak_lr=2e-4,
                fault_penalty=1.0,
            ),
            pathology_rl=RLConfig(
                ("provocation",) * 12 + ("arithmetic",) * 2 + ("instructions",) * 2 + ("retail",),
                46,
                16,
                8,
                72,
                8,
                peak_lr=5e-4,
                fault_penalty=1.0,
            ),
        ),
        evaluation=EvaluationConfig(
            problems=100, samples=2, max_new_tokens=80, heldout_tokens=10_000
        ),
    )
