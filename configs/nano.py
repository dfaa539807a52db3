"""The whole pipeline in about a minute, for tests and for a first look: too small and too short to learn its tasks."""

from minglm.config import (
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


def nano():
    """0.2 M parameters, one CPU core, about a minute."""
    sft, rl = (
        SFTConfig(8, 1.0, 1024, 1024, 5e-3),
        {"steps": 2, "prompts": 2, "samples": 2, "max_new_tokens": 24},
    )
    return RunConfig(
        name="nano",
        model=ModelConfig(
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
            initializer_range=0.06,
        ),
        data=DataConfig(
            corpus_megabytes=0.3,
            fim_rate=0.3,
            fim_characters=150,
            synthetic_documents=200,
            trajectories=100,
        ),
        stages=StagesConfig(
            general=StageConfig(
                "prose, code, facts", 60_000, 64, {"prose": 2, "code": 2, "qa": 1, "science": 1}
            ),
            code_reasoning=StageConfig("code and mathematics", 28_000, 64, {"code": 1, "math": 1}),
            repository=StageConfig(
                "code across files", 8_000, 512, {"repository": 1}, "best_fit", 1_000_000.0
            ),
            reasoning=StageConfig(
                "worked solutions",
                8_000,
                512,
                {"tasks:arithmetic": 2, "tasks:instructions": 1, "tasks:code": 1, "math": 1},
                "best_fit",
                1_000_000.0,
            ),
            long_agent=StageConfig(
                "long documents, agents",
                8_000,
                2048,
                {"tasks:retail": 1, "long": 1},
                "best_fit",
                1_000_000.0,
            ),
        ),
        optimizer=OptimizerConfig(
            peak_lr=2e-2,
            warmup_tokens=4_000,
            batch_tokens_start=1024,
            batch_tokens_end=2048,
            batch_ramp_tokens=30_000,
            microbatch_tokens=2048,
        ),
        posttraining=PostTrainingConfig(
            reasoning=ExpertConfig(("arithmetic", "code"), sft, RLConfig(("arithmetic",), **rl)),
            agent=ExpertConfig(
                ("retail",), sft, RLConfig(("retail",), max_turns=2, normalize_std=False, **rl)
            ),
            chat=ExpertConfig(("instructions",), sft, RLConfig(("instructions",), **rl)),
            unified=SFTConfig(64, 1.0, 1024, 1024, 5e-3),
            prompts_per_environment=4,
            responses_per_prompt=2,
            pathology_samples=8,
            general_rl=RLConfig(("arithmetic", "retail", "instructions"), max_turns=2, **rl),
            pathology_rl=RLConfig(("provocation", "arithmetic"), fault_penalty=1.0, **rl),
        ),
        evaluation=EvaluationConfig(problems=4, samples=2, max_new_tokens=24, heldout_tokens=2_000),
    )
