"""GLM-4.5-Air, 106B parameters of which 12B are active, exactly as published (paper Table 1).

    python -m minglm plan configs/air_106b.py --gpus 64 --search
    python -m minglm launch configs/air_106b.py:h100x64 --slurm
    python -m minglm data configs/air_106b.py --data.files /path/to/text

Narrower than GLM-4.5 and half as deep; it also has no QK-norm, one dense layer, and routed experts that are not scaled.
Stages, schedule and post-training are the paper's, the defaults of `minglm.config`. Layouts are like those of
`configs/glm45_355b.py`, for 32 and 64 GPUs.
"""

from dataclasses import replace

from minglm.config import ModelConfig, OptimizerConfig, ParallelConfig, Precision, RunConfig


def air_106b() -> RunConfig:
    """Configure GLM-4.5-Air: 1 dense and 45 MoE layers, 128 experts of which 8 and a shared one process each token."""
    return RunConfig(
        name="air_106b",
        model=ModelConfig(
            hidden_size=4096,
            num_hidden_layers=46,
            first_k_dense_replace=1,
            intermediate_size=10944,
            moe_intermediate_size=1408,
            n_routed_experts=128,
            routed_scaling_factor=1.0,
            use_qk_norm=False,
        ),
        optimizer=OptimizerConfig(microbatch_tokens=16_384),
        dtype=Precision.BFLOAT16,
        recompute=True,
    )


def h100x32() -> RunConfig:
    """Lay Air out on 4 nodes of 8 H100s, for rows of 4,096 tokens."""
    return replace(air_106b(), parallel=ParallelConfig(fsdp=32, ep=8))


def h100x32_32k() -> RunConfig:
    """Lay Air out on 4 nodes of 8 H100s, for rows of 32,768 tokens."""
    return replace(air_106b(), parallel=ParallelConfig(fsdp=32, ep=8, cp=2))


def h100x32_128k() -> RunConfig:
    """Lay Air out on 4 nodes of 8 H100s, for rows of 131,072 tokens."""
    return replace(air_106b(), parallel=ParallelConfig(fsdp=32, ep=8, cp=8))


def h100x64() -> RunConfig:
    """Lay Air out on 8 nodes of 8 H100s, for rows of 4,096 tokens."""
    return replace(air_106b(), parallel=ParallelConfig(fsdp=64, ep=8))


def h100x64_32k() -> RunConfig:
    """Lay Air out on 8 nodes of 8 H100s, for rows of 32,768 tokens."""
    return replace(air_106b(), parallel=ParallelConfig(fsdp=64, ep=8, cp=2))


def h100x64_128k() -> RunConfig:
    """Lay Air out on 8 nodes of 8 H100s, for rows of 131,072 tokens."""
    return replace(air_106b(), parallel=ParallelConfig(fsdp=64, ep=8, cp=8))
