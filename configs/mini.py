"""The whole paper on one GPU: GLM-4.5 with every width divided by eight, 0.8 B parameters, for a corpus of your own.

    python -m minglm plan configs/mini.py
    python -m minglm run configs/mini.py --data.files /path/to/text /path/to/code

An eighth of GLM-4.5 in width, heads, FFN, experts and depth; the width of a head, 160 experts of which 8 and a shared
one serve a token, QK-norm, the ratio of the stages' tokens and their lengths are its own. Planned for a night on an
80 GB GPU with Triton kernels, layers recomputed. Learning rate, warm-up and batch are guesses by scale that nobody has
tried yet at this size: watch `grad_norm` and `left_out` for the first hour. Tasks and their lengths are the toy's.
"""

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


def mini():
    """1 dense and 11 MoE layers, 12 heads of 128 that share one key/value head, 160 experts, one 80 GB GPU."""
    sft, rl = (
        SFTConfig(20_000, 2.0, 131_072, 8192, 2e-4),
        {"prompts": 32, "samples": 16, "max_new_tokens": 2048},
    )
    return RunConfig(
        name="mini",
        model=ModelConfig(
            vocab_size=32_768,
            hidden_size=640,
            num_hidden_layers=12,
            first_k_dense_replace=1,
            num_attention_heads=12,
            num_key_value_heads=1,
            intermediate_size=1536,
            moe_intermediate_size=192,
        ),
        data=DataConfig(
            corpus_megabytes=20_000.0,
            near_duplicates=0.7,
            synthetic_documents=200_000,
            trajectories=200_000,
        ),
        stages=StagesConfig(
            general=StageConfig(
                "prose, code, facts",
                3_900_000_000,
                4096,
                {"prose": 6, "code": 3, "qa": 0.2, "science": 0.1, "math": 0.1},
            ),
            code_reasoning=StageConfig(
                "code and mathematics", 1_820_000_000, 4096, {"code": 6, "prose": 3, "math": 1}
            ),
            repository=StageConfig(
                "code across files",
                130_000_000,
                32_768,
                {"repository": 3, "code": 1},
                "best_fit",
                1_000_000.0,
            ),
            reasoning=StageConfig(
                "worked solutions",
                130_000_000,
                32_768,
                {
                    "tasks:arithmetic": 2,
                    "tasks:instructions": 2,
                    "tasks:code": 2,
                    "tasks:retail": 2,
                    "tasks:provocation": 0.5,
                    "prose": 2,
                    "code": 2,
                },
                "best_fit",
                1_000_000.0,
            ),
            long_agent=StageConfig(
                "long documents, agents",
                26_000_000,
                131_072,
                {"tasks:retail": 3, "long": 3, "repository": 2, "prose": 2},
                "best_fit",
                1_000_000.0,
            ),
        ),
        optimizer=OptimizerConfig(
            peak_lr=2e-3,
            warmup_tokens=60_000_000,
            batch_tokens_start=262_144,
            batch_tokens_end=1_048_576,
            batch_ramp_tokens=130_000_000,
            microbatch_tokens=131_072,
            spike_factor=20.0,
            rollback_after=20,
        ),
        posttraining=PostTrainingConfig(
            reasoning=ExpertConfig(
                ("arithmetic", "code"), sft, RLConfig(("arithmetic",), 200, peak_lr=5e-6, **rl)
            ),
            agent=ExpertConfig(
                ("retail",),
                sft,
                RLConfig(("retail",), 200, max_turns=8, peak_lr=5e-6, normalize_std=False, **rl),
            ),
            chat=ExpertConfig(
                ("instructions",), sft, RLConfig(("instructions",), 200, peak_lr=5e-6, **rl)
            ),
            unified=SFTConfig(100_000, 2.0, 131_072, 8192, 2e-4),
            prompts_per_environment=20_000,
            responses_per_prompt=2,
            pathology_samples=2000,
            general_rl=RLConfig(
                ("arithmetic", "retail", "instructions"), 100, max_turns=8, peak_lr=2e-6, **rl
            ),
            pathology_rl=RLConfig(
                ("provocation",) * 6 + ("arithmetic", "instructions"),
                50,
                fault_penalty=1.0,
                peak_lr=2e-6,
                **rl,
            ),
        ),
        evaluation=EvaluationConfig(max_new_tokens=4096, every_tokens=250_000_000),
        dtype="bfloat16",
        recompute=True,
    )
