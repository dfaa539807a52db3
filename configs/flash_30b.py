"""GLM-4.7-Flash, 30B parameters of which 3B are active, exactly as released: the one with latent attention.

    python -m minglm plan configs/flash_30b.py --gpus 8 --search
    python -m minglm launch configs/flash_30b.py:h100x8 --torchrun

Not in the paper: its successor for a single machine. Multi-head latent attention in place of grouped-query attention,
no QK-norm, 64 experts of which 4 and a shared one process each token, another vocabulary. Stages, schedule and
post-training are the paper's, the defaults of `minglm.config`.

Layouts for the 8 GPUs of one node. Four of them can share a row and not eight: each needs whole heads, and there are 20.
"""

from dataclasses import replace

from minglm.config import ModelConfig, OptimizerConfig, ParallelConfig, Precision, RunConfig


def flash_30b() -> RunConfig:
    """Configure GLM-4.7-Flash: 1 dense and 46 MoE layers, 20 heads of 256 over a latent of 512."""
    return RunConfig(
        name="flash_30b",
        model=ModelConfig(
            vocab_size=154880,
            hidden_size=2048,
            num_hidden_layers=47,
            first_k_dense_replace=1,
            num_attention_heads=20,
            num_key_value_heads=20,
            head_dim=256,
            kv_lora_rank=512,
            q_lora_rank=768,
            qk_nope_head_dim=192,
            qk_rope_head_dim=64,
            v_head_dim=256,
            intermediate_size=10240,
            moe_intermediate_size=1536,
            n_routed_experts=64,
            num_experts_per_tok=4,
            routed_scaling_factor=1.8,
            use_qk_norm=False,
            attention_bias=False,
            max_position_embeddings=202752,
        ),
        optimizer=OptimizerConfig(microbatch_tokens=16_384),
        dtype=Precision.BFLOAT16,
        recompute=True,
    )


def h100x8() -> RunConfig:
    """Lay Flash out on a node of 8 H100s, for rows of 4,096 tokens."""
    return replace(flash_30b(), parallel=ParallelConfig(fsdp=8, ep=8))


def h100x8_32k() -> RunConfig:
    """Lay Flash out on a node of 8 H100s, for rows of 32,768 tokens."""
    return replace(flash_30b(), parallel=ParallelConfig(fsdp=8, ep=8, cp=2))


def h100x8_128k() -> RunConfig:
    """Lay Flash out on a node of 8 H100s, for rows of 131,072 tokens."""
    return replace(flash_30b(), parallel=ParallelConfig(fsdp=8, ep=8, cp=4))
