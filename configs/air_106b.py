"""GLM-4.5-Air, 106B parameters of which 12B are active, exactly as published (paper Table 1).

    python -m minglm plan configs/air_106b.py --gpus 64

Narrower than GLM-4.5 and half as deep; it also has no QK-norm, one dense layer, and routed experts that are not scaled.
Stages, schedule and post-training are the paper's, the defaults of `minglm.config`.
"""

from minglm.config import ModelConfig, OptimizerConfig, Precision, RunConfig


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
    )
