"""GLM-4.5, 355B parameters of which 32B are active, exactly as published; 4.6 and 4.7 as variants (paper Table 1).

    python -m minglm plan configs/glm45_355b.py --gpus 512
    python -m minglm plan configs/glm45_355b.py:glm46 --gpus 512

Model, stages, schedule and post-training are the defaults of `minglm.config`, which are the paper's numbers. What the
paper does not say is set here for a cluster of 80 GiB GPUs: bfloat16 products, and 16,384 tokens per GPU and forward
pass, enough work to hide the gathering of the weights.
"""

from dataclasses import replace

from minglm.config import ModelConfig, OptimizerConfig, Precision, RunConfig


def glm45_355b() -> RunConfig:
    """Configure GLM-4.5: 3 dense and 89 MoE layers, 160 experts of which 8 and a shared one process each token, QK-norm."""
    return RunConfig(
        name="glm45_355b",
        model=ModelConfig(),
        optimizer=OptimizerConfig(microbatch_tokens=16_384),
        dtype=Precision.BFLOAT16,
    )


def glm46() -> RunConfig:
    """Configure GLM-4.6: the same body for contexts up to 200K."""
    return replace(glm45_355b(), name="glm46", model=ModelConfig(max_position_embeddings=202752))


def glm47() -> RunConfig:
    """Configure GLM-4.7: the shape of 4.6; training and chat template differ."""
    return replace(glm46(), name="glm47")
