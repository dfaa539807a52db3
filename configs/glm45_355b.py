"""GLM-4.5, 355B parameters of which 32B are active, exactly as published; 4.6 and 4.7 as variants (paper Table 1).

    python -m minglm plan configs/glm45_355b.py --gpus 512 --search
    python -m minglm launch configs/glm45_355b.py:h100x512 --slurm
    python -m minglm plan configs/glm45_355b.py:glm46 --gpus 512

Model, stages, schedule and post-training are the defaults of `minglm.config`, which are the paper's numbers. What the
paper does not say is set here for a cluster of 80 GiB GPUs: bfloat16 products, recomputed layers, and 16,384 tokens per
GPU and forward pass, enough work to hide the gathering of the weights.

Layouts: the experts of a layer are divided among the 8 GPUs of a node, since the exchange of tokens belongs on NVLink, and
all weights are sharded over all GPUs. Rows of 32,768 tokens are shared by two GPUs, rows of 131,072 by eight. A layout is
not part of the result: one run goes from `h100x512` to `h100x512_32k` to `h100x512_128k`, each with --until STAGE.
"""

from dataclasses import replace

from minglm.config import ModelConfig, OptimizerConfig, ParallelConfig, Precision, RunConfig


def glm45_355b() -> RunConfig:
    """Configure GLM-4.5: 3 dense and 89 MoE layers, 160 experts of which 8 and a shared one process each token, QK-norm."""
    return RunConfig(
        name="glm45_355b",
        model=ModelConfig(),
        optimizer=OptimizerConfig(microbatch_tokens=16_384),
        dtype=Precision.BFLOAT16,
        recompute=True,
    )


def glm46() -> RunConfig:
    """Configure GLM-4.6: the same body for contexts up to 200K."""
    return replace(glm45_355b(), name="glm46", model=ModelConfig(max_position_embeddings=202752))


def glm47() -> RunConfig:
    """Configure GLM-4.7: the shape of 4.6; training and chat template differ."""
    return replace(glm46(), name="glm47")


def h100x256() -> RunConfig:
    """Lay GLM-4.5 out on 32 nodes of 8 H100s, for rows of 4,096 tokens."""
    return replace(glm45_355b(), parallel=ParallelConfig(fsdp=256, ep=8))


def h100x256_32k() -> RunConfig:
    """Lay GLM-4.5 out on 32 nodes of 8 H100s, for rows of 32,768 tokens."""
    return replace(glm45_355b(), parallel=ParallelConfig(fsdp=256, ep=8, cp=2))


def h100x256_128k() -> RunConfig:
    """Lay GLM-4.5 out on 32 nodes of 8 H100s, for rows of 131,072 tokens."""
    return replace(glm45_355b(), parallel=ParallelConfig(fsdp=256, ep=8, cp=8))


def h100x512() -> RunConfig:
    """Lay GLM-4.5 out on 64 nodes of 8 H100s, for rows of 4,096 tokens."""
    return replace(glm45_355b(), parallel=ParallelConfig(fsdp=512, ep=8))


def h100x512_32k() -> RunConfig:
    """Lay GLM-4.5 out on 64 nodes of 8 H100s, for rows of 32,768 tokens."""
    return replace(glm45_355b(), parallel=ParallelConfig(fsdp=512, ep=8, cp=2))


def h100x512_128k() -> RunConfig:
    """Lay GLM-4.5 out on 64 nodes of 8 H100s, for rows of 131,072 tokens."""
    return replace(glm45_355b(), parallel=ParallelConfig(fsdp=512, ep=8, cp=8))
